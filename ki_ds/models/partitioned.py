"""Models whose parameters ZeRO-3 has partitioned over the ranks, used outside of an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ki_ds.errors import UserError, reason


def shape(parameter: Tensor) -> tuple[int, ...]:
    """The whole shape of a parameter, of which this rank may hold a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def logits(model: Any, input_ids_BS: Tensor, place: str) -> Tensor:
    """[B, S, V], to try a model out.

    Raises:
        UserError: the model cannot be run on input ids alone.
    """
    try:
        found: Tensor = model(input_ids=input_ids_BS, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model raises
        raise UserError(
            f"{place}: a {type(model).__name__} cannot be run on input ids alone: {reason(error)}"
        ) from None
    return found


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Forward passes within this gather what is partitioned, a module's own parameters at a time; all ranks make the
    same ones. Nothing changes for a model that is whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    import deepspeed

    held: dict[nn.Module, list[Any]] = {}

    def before(module: nn.Module, _given: Any) -> None:
        whole = deepspeed.zero.GatheredParameters([*module.parameters(recurse=False)])
        whole.__enter__()
        held.setdefault(module, []).append(whole)

    def after(module: nn.Module, _given: Any, _found: Any) -> None:
        held[module].pop().__exit__(None, None, None)

    hooks: list[Any] = []
    for module in model.modules():
        if [*module.parameters(recurse=False)]:
            hooks += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, always_call=True),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
