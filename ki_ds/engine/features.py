"""What an engine JSON asks for beside precision and ZeRO: activation checkpointing, torch.compile, apex, NVMe,
monitors."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.utils.checkpoint
from torch.utils.cpp_extension import get_cxx_compiler

from ki_ds.engine import apex, ops, optimizers
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
        _check_monitor(name)
    for setting, folder in _nvme(config).items():
        _check_folder(setting, folder)
    for operator in _operators(config):
        ops.load(*operator)
    if config.layer_norm == "apex":
        apex.swap_layer_norms(model)
    if config.activation_checkpointing:
        recompute(model)
    if config.compiled:
        _check_compiler()
        model.backbone.compile()  # not the loss: a masked model has another number of rows in every micro-batch


def requirements(config: EngineConfig) -> Iterator[Callable[[], Any]]:
    """Checks, each of which raises a UserError, that this machine has what an engine JSON needs, as far as that is seen
    without compiling anything."""
    yield from (partial(_check_monitor, name) for name in config.monitors)
    yield from (partial(_check_folder, setting, folder) for setting, folder in _nvme(config).items())
    yield from (partial(ops.check, *operator) for operator in _operators(config))
    yield partial(optimizers.check_machine, config)
    if config.compiled:
        yield _check_compiler
    if config.layer_norm == "apex":
        yield partial(apex.module, "normalization", apex.LAYER_NORM)


def _nvme(config: EngineConfig) -> dict[str, str]:
    """The folders to swap to, by the setting that names them."""
    offloads = {"offload_optimizer": config.offload_optimizer, "offload_param": config.offload_parameters}
    return {f"zero_optimization.{key}": one.nvme_path for key, one in offloads.items() if one.device == "nvme"}


def _operators(config: EngineConfig) -> list[tuple[str, str]]:
    """Operators of DeepSpeed beside the optimizer's, by their builders, each with the setting that asks for it."""
    swap = [(name, f'{key}: "nvme"') for key in _nvme(config) for name in ("PinMemoryBuilder", "AsyncIOBuilder")]
    return swap + [("QuantizerBuilder", f"zero_optimization.{key}") for key in config.quantized]


def _check_monitor(name: str) -> None:
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"{name}: the package {package} is missing; pip install {package}, or leave {name} out")


def _check_compiler() -> None:
    """What torch.compile needs: Triton on a GPU, a C++ compiler without one."""
    if torch.cuda.is_available():
        missing = None if importlib.util.find_spec("triton") else "Triton (pip install 'ki_ds[gpu]')"
    else:
        compiler = get_cxx_compiler()
        missing = None if shutil.which(compiler) else f"a C++ compiler ({compiler}; apt-get install g++)"
    if missing:
        raise UserError(f"ki_ds.compile: torch.compile needs {missing}; install it, or leave compile out")


def _check_folder(setting: str, folder: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{setting}.nvme_path: {folder} is not a folder that can be written")


def compile_errors(config: EngineConfig) -> tuple[type[Exception], ...]:
    """What a forward pass raises when the model cannot be compiled."""
    if not config.compiled:
        return ()
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


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
