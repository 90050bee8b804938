"""What an engine JSON asks for beside precision and ZeRO: activation checkpointing, apex, NVMe, monitors."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import torch.utils.checkpoint

from ki_ds.engine import apex, ops
from ki_ds.engine.config import EngineConfig
from ki_ds.errors import UserError
from ki_ds.launch import distributed
from ki_ds.models.language_model import LanguageModel

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # of monitors


def prepare(model: LanguageModel, config: EngineConfig) -> None:
    """Make this machine and the model ready for an engine JSON; all ranks call this.

    Raises:
        UserError: a package, a compiler or a folder is missing, or the model cannot do it.
    """
    for name in config.monitors if distributed.rank() == 0 else ():  # the only one that writes
        package = PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"{name}: the package {package} is missing; pip install {package}, or leave {name} out")
    offloads = {"offload_optimizer": config.offload_optimizer, "offload_param": config.offload_parameters}
    for key, offload in offloads.items():
        if offload.device == "nvme":
            folder = offload.nvme_path
            if not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(f"zero_optimization.{key}.nvme_path: {folder} is not a folder that can be written")
            for name in ("PinMemoryBuilder", "AsyncIOBuilder"):
                ops.load(name, f'zero_optimization.{key}: "nvme"')
    for key in config.quantized:
        ops.load("QuantizerBuilder", f"zero_optimization.{key}")
    if config.layer_norm == "apex":
        apex.swap_layer_norms(model)
    if config.activation_checkpointing:
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
