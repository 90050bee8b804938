"""The knowledge-inheritance loss: one public function, several implementations with the same numbers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ki_ds.kernels.chunked import ki_loss_chunked
from ki_ds.kernels.packed import PackedTargets
from ki_ds.kernels.reference import KILoss, ki_loss_reference

__all__ = ["KILoss", "PackedTargets", "ki_loss"]

_IMPLEMENTATIONS = {"reference": ki_loss_reference, "chunked": ki_loss_chunked}


def ki_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    targets: PackedTargets | None = None,
    alpha_N: Tensor | None = None,
    temperature: float = 1.0,
    impl: Literal["auto", "reference", "chunked"] = "auto",
) -> KILoss:
    """Σ_n (1 - α_n) CE_n + α_n τ² KL(teacher_n(τ) ‖ student_n(τ)), with its gradient (equations 1 to 4).

    Args:
        hidden_ND: what the language-model head is applied to, one row a target position.
        weight_VD, bias_V: the head; the bias may be None.
        labels_N: int64, the true token; a negative label leaves the row out.
        targets: the teacher's packed predictions for the same rows; None where no row has a teacher.
        alpha_N: α of each row; None counts as 0. Rows without a target (count 0) count as α = 0.
        temperature: τ, for teacher and student alike.
        impl: `auto` takes `chunked`.

    Returns:
        Sums over the rows, in nats; `loss` alone is differentiable.

    Raises:
        ValueError: the shapes do not fit together, or the temperature is not positive.
    """
    rows = hidden_ND.shape[0]
    for name, found in (("labels", labels_N), ("alpha", alpha_N), ("targets", targets)):
        if found is not None and len(found) != rows:
            raise ValueError(f"{name} has {len(found)} rows, hidden states {rows}")
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden size {hidden_ND.shape[1]}, but the head takes {weight_VD.shape[1]}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    if impl != "auto" and impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected auto, {', '.join(_IMPLEMENTATIONS)}")
    function = _IMPLEMENTATIONS["chunked" if impl == "auto" else impl]
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return function(hidden_ND, weight_VD, bias_V, labels_N, targets, alpha_N, temperature)
