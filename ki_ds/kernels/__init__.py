"""The loss and the teacher's side: a public function each, in several implementations with the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ki_ds.kernels.dispatch import Impl, choose
from ki_ds.kernels.logit_transform import IDENTITY, LogitTransform, head
from ki_ds.kernels.loss.chunked import ki_loss_chunked
from ki_ds.kernels.loss.reference import KILoss, Rows, ki_loss_reference
from ki_ds.kernels.packed import PackedTargets
from ki_ds.kernels.select.eager import Predictions, select_targets

__all__ = ["IDENTITY", "KILoss", "LogitTransform", "PackedTargets", "Predictions", "ki_loss", "select_targets"]


def ki_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    targets: PackedTargets | None = None,
    alpha_N: Tensor | None = None,
    temperature: float = 1.0,
    *,
    vocabulary: int | None = None,
    logit_transform: LogitTransform = IDENTITY,
    impl: Impl = "auto",
) -> KILoss:
    """Σ_n [(1 - α_n) CE_n + α_n τ² KL(teacher_n(τ) ‖ student_n(τ))], with its gradient (equations 1 to 4).

    Args:
        hidden_ND: what the language-model head is applied to, one a row.
        weight_VD, bias_V: the head, in the hidden states' type; the bias may be None.
        labels_N: int64, the true token; a negative label leaves the row out.
        targets: the teacher's packed predictions for the same rows; None where no row has a teacher.
        alpha_N: α of each row, 0 to 1; None counts as 0. Rows without a target (count 0) count as α = 0. Where α
            is 0 no target is read. α is given, not learned: it gets no gradient.
        temperature: τ, for teacher and student alike.
        vocabulary: rows of the head that belong to a token; those behind are padding. None: all.
        logit_transform: scale and soft cap between the head's product and the softmax.
        impl: `auto` takes `triton` on a GPU, where it can, and `chunked` elsewhere.

    Returns:
        Sums over the rows, in nats, and CE and KL of each; `loss` alone is differentiable.

    Raises:
        ValueError: the shapes or types do not fit together, the temperature is not positive, or the implementation
            cannot run here.
    """
    rows = hidden_ND.shape[0]
    for name, found in (("labels", labels_N), ("alpha", alpha_N)):
        if found is not None and found.shape != (rows,):
            raise ValueError(f"{name} of shape {tuple(found.shape)}; expected ({rows},), one for each hidden state")
    if labels_N.dtype != torch.int64:
        raise ValueError(f"labels are {labels_N.dtype}; expected torch.int64")
    if targets is not None:
        targets.check(rows)
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden size {hidden_ND.shape[1]}, but the head takes {weight_VD.shape[1]}")
    for name, found in (("weight", weight_VD), ("bias", bias_V)):
        if found is not None and found.dtype != hidden_ND.dtype:
            raise ValueError(f"the head's {name} is {found.dtype}, the hidden states are {hidden_ND.dtype}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"the temperature must be positive, got {temperature}")
    logit_transform.check()
    head(weight_VD, bias_V, vocabulary)
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    rows_N = Rows.of(labels_N, targets, alpha_N, wide)
    arguments = (hidden_ND, weight_VD, bias_V, rows_N, temperature, vocabulary, logit_transform)
    chosen = choose("ki_loss", impl, hidden_ND.device, hidden_ND.dtype)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if chosen == "reference":
            return ki_loss_reference(*arguments)
        if chosen == "triton":
            from ki_ds.kernels.loss.triton_loss import chunk_loss

            return ki_loss_chunked(*arguments, chunk_loss)
        return ki_loss_chunked(*arguments)
