"""NVIDIA apex, for those who have built it: its fused optimizers and layer norm. Nothing here is needed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from ki_ds.errors import UserError, reason

BUILD = "build it from NVIDIA's source, github.com/NVIDIA/apex (see docs/docker.md)"
LAYER_NORM = 'ki_ds.layer_norm: "apex"'


def module(name: str, asked: str) -> Any:
    """A module of apex; `asked`: the setting of the engine JSON that needs it.

    Raises:
        UserError: apex is not there, cannot be loaded, or is an unrelated package of that name.
    """
    found = importlib.util.find_spec("apex")
    if found is None:
        raise UserError(f"{asked} needs NVIDIA apex, which is not installed; {BUILD}, or leave the setting out")
    if not any((Path(place) / "optimizers").is_dir() for place in found.submodule_search_locations or ()):
        raise UserError(
            f'{asked} needs NVIDIA apex, but the installed package "apex" is an unrelated one, a toolkit for Pyramid; '
            f"remove it (pip uninstall apex), and {BUILD}"
        )
    try:
        return importlib.import_module(f"apex.{name}")
    except ImportError as error:
        raise unbuilt(asked, error) from None


def unbuilt(asked: str, error: Exception) -> UserError:
    """The error of an apex without its compiled parts."""
    return UserError(f"{asked}: NVIDIA apex is there, but without its CUDA extensions ({reason(error)}); {BUILD}")


def swap_layer_norms(model: nn.Module) -> None:
    """Put apex's FusedLayerNorm in the place of every torch.nn.LayerNorm, on the same parameters.

    Raises:
        UserError: as `module`, or the model has no such layer.
    """
    fused = module("normalization", LAYER_NORM).FusedLayerNorm
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.LayerNorm and child.bias is not None  # apex knows none without a bias
    ]
    if not places:
        raise UserError(f"{LAYER_NORM}: this model has no torch.nn.LayerNorm with weight and bias; leave it out")
    for parent, name, child in places:
        try:
            other = fused(tuple(child.normalized_shape), eps=child.eps, elementwise_affine=True)
        except ImportError as error:
            raise unbuilt(LAYER_NORM, error) from None
        other.weight, other.bias = child.weight, child.bias
        setattr(parent, name, other.train(child.training))
