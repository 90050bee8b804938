"""What can be refused of a teacher before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ki_ds.errors import UserError
from ki_ds.experiment.schema import Inference
from ki_ds.models import flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(settings: Inference, processes: int, teachers: Mapping[str, Any], objective: str) -> None:
    """Check that teachers can be run as the experiment's `inference` says.

    Args:
        teachers: Hugging Face configurations by the models' names.

    Raises:
        UserError: the ranks cannot be grouped, the machine lacks the precision, or a teacher cannot be cut.
    """
    size = settings.tensor_parallel
    if processes % size:
        raise UserError(
            f"inference.tensor_parallel: {size} does not divide the {processes} processes; expected a divisor, or "
            f"--processes with a multiple of {size}"
        )
    if settings.precision != "fp32":
        _check_precision(settings.precision)
    for name, config in teachers.items() if size > 1 else ():
        _check_tensor_parallel(config, objective, size, f"models.{name}")


def _check_precision(precision: str) -> None:
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().supported_dtypes()
    if DTYPES[precision] not in found:
        able = [name for name in ("bf16", "fp32") if DTYPES[name] in found and name != precision]
        raise UserError(
            f'inference.precision: this machine ({get_accelerator().device_name()}) cannot compute in "{precision}"; '
            f"expected {' or '.join(able)}"
        )


def _check_tensor_parallel(config: Any, objective: str, size: int, place: str) -> None:
    from deepspeed.module_inject.auto_tp import AutoTP

    outline = flops.outline(config, objective)
    try:
        AutoTP.tp_parser(outline)
    except AssertionError:
        raise UserError(
            f"{place}: DeepSpeed cannot cut a {config.model_type} model for inference.tensor_parallel {size}; expected "
            "1, or inference.engine with ZeRO stage 3"
        ) from None
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise UserError(f"{place}: {name} is {heads}; expected inference.tensor_parallel {size} to divide it")
