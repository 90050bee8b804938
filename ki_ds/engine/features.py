"""What an engine JSON asks for beside precision and ZeRO: activation checkpointing, apex, NVMe, monitors."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import partial
from typing import Any

import torch.utils.checkpoint

from ki_ds.engine import apex, ops
from ki_ds.errors import UserError, nearest
from ki_ds.launch import distributed
from ki_ds.models.language_model import LanguageModel

CHECKPOINTING = (
    "partition_activations", "contiguous_memory_optimization", "number_checkpoints", "cpu_checkpointing",
    "synchronize_checkpoint_boundary", "profile",
)  # fmt: skip
LAYER_NORMS = ("torch", "apex")
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # block: package
QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients")


def check(config: dict[str, Any], source: str) -> None:
    """Check the blocks `activation_checkpointing` and `ki_ds`.

    Raises:
        UserError: an option that is unknown or that nothing would read.
    """
    block = config.get("activation_checkpointing", {})
    place = f"{source}: activation_checkpointing"
    if not isinstance(block, dict):
        raise UserError(f"{place}: found {json.dumps(block)}; expected an object, {{}} for the plain kind")
    for key, value in block.items():
        if key not in CHECKPOINTING:
            raise UserError(f"{place}.{key}: unknown option{nearest(key, CHECKPOINTING)}")
        if value:
            raise UserError(
                f"{place}.{key}: is not supported: what is turned on is the model's own checkpointing, "
                "which has no such option; leave it out"
            )
    block = config.get("ki_ds", {})
    if not isinstance(block, dict):
        raise UserError(f"{source}: ki_ds: found {json.dumps(block)}; expected an object")
    for key, value in block.items():
        if key != "layer_norm":
            raise UserError(f"{source}: ki_ds.{key}: unknown key{nearest(key, ['layer_norm'])}; allowed: layer_norm")
        if value not in LAYER_NORMS:
            raise UserError(f"{source}: ki_ds.layer_norm: found {json.dumps(value)}; allowed: {', '.join(LAYER_NORMS)}")


def prepare(model: LanguageModel, config: dict[str, Any]) -> None:
    """Make this machine and the model ready for a checked engine JSON; all ranks call this.

    Raises:
        UserError: a package, a compiler or a folder is missing, or the model cannot do it.
    """
    for name, package in MONITORS.items():
        wanted = config.get(name, {}).get("enabled") and distributed.rank() == 0  # the only one that writes
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{name}: the package {package} is missing; pip install {package}, or leave {name} out")
    zero = config.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        block = zero.get(key) or {}
        if block.get("device") == "nvme":
            folder = block["nvme_path"]
            if not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(f"zero_optimization.{key}.nvme_path: {folder} is not a folder that can be written")
            for name in ("PinMemoryBuilder", "AsyncIOBuilder"):
                ops.load(name, f'zero_optimization.{key}: "nvme"')
    for key in QUANTIZED:
        if zero.get(key):
            ops.load("QuantizerBuilder", f"zero_optimization.{key}")
    if config.get("ki_ds", {}).get("layer_norm") == "apex":
        apex.swap_layer_norms(model)
    if "activation_checkpointing" in config:
        recompute(model)


def recompute(model: LanguageModel) -> None:
    """Let the layers be computed again in the backward pass, instead of keeping what is inside them.

    Raises:
        UserError: the architecture does not support it.
    """
    backbone: Any = model.backbone
    if not getattr(backbone, "supports_gradient_checkpointing", False):
        raise UserError(f"activation_checkpointing: a {type(backbone).__name__} does not support it; leave it out")
    again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    backbone._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=again)
