"""The matrices of a model's linear layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ki_ds.models.partitioned import shape


def linear(model: nn.Module) -> Iterator[Any]:
    """The modules that multiply by a matrix `weight`: [out, in], and [in, out] of a `transposed` one."""
    return (module for module in model.modules() if isinstance(module, nn.Linear) or transposed(module))


def hidden(model: nn.Module, head_weight: Tensor) -> list[Any]:
    """The linear layers whose matrix is neither the head's nor an embedding's."""
    apart = {id(head_weight), *(id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding))}
    return [layer for layer in linear(model) if id(layer.weight) not in apart]


def muon_ratio(layer: Any) -> float:
    """What Muon's learning rate is multiplied by for a linear layer. DeepSpeed makes the step of a [rows, columns]
    matrix √max(1, rows / columns) long, which is meant for [out, in]; that of a transposed layer is [in, out]."""
    rows, columns = shape(layer.weight)
    return math.sqrt(columns / rows) if transposed(layer) else 1.0


def transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, which GPT-2 is made of."""
    return type(module).__name__ == "Conv1D"
