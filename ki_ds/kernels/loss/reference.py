"""The knowledge-inheritance loss by its definition (equations 1 to 4), eager and dense, any dtype, any device.

N rows, D hidden size, V vocabulary, K kept ids.

    z_NV   = hidden_ND · weight_VDᵀ + bias_V, scaled and capped as `logit_transform.py` says
    CE_n   = -log softmax(z_n)[label_n]
    q_n    = softmax(z_n / τ)
    KL_n   = Σ_k p_nk (log p_nk - log q_n[id_nk])  + with a tail: p_n,tail (log p_n,tail - log Σ_{v not kept} q_nv)
    loss   = Σ_n [(1 - α_n) CE_n + α_n τ² KL_n]  over the rows with label ≥ 0; α_n counts as 0 without a target

Everything faster is compared with this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ki_ds.kernels.logit_transform import LogitTransform, head
from ki_ds.kernels.packed import PackedTargets


class KILoss(NamedTuple):
    """Sums over rows, in nats, and what they are sums of; only `loss` carries a gradient."""

    loss: Tensor
    ce: Tensor  # over all rows with a label
    kl: Tensor  # over the rows with a label, a target and α > 0; without the factor τ²
    ce_N: Tensor
    kl_N: Tensor


class Rows(NamedTuple):
    """What the loss makes of its rows, beside their logits."""

    labels_N: Tensor  # int64; negative: left out
    alpha_N: Tensor  # 0 without a label or without a target
    targets: PackedTargets | None  # None: no row has one

    @classmethod
    def of(
        cls,
        labels_N: Tensor,
        targets: PackedTargets | None,
        alpha_N: Tensor | None,
        dtype: torch.dtype,
    ) -> Rows:
        """From the arguments of `ki_loss`; what does not count is not looked at and may hold anything."""
        labelled = labels_N >= 0
        if targets is None or alpha_N is None or not targets.ids_NK.shape[1]:
            return cls(labels_N, torch.zeros_like(labels_N, dtype=dtype), None)
        alpha = torch.where(labelled & (targets.count_N > 0), alpha_N.to(dtype), 0)
        return cls(labels_N, alpha, targets)

    def part(self, rows: slice) -> Rows:
        """A run of rows, without copying."""
        targets = None if self.targets is None else self.targets.rows(rows)
        return Rows(self.labels_N[rows], self.alpha_N[rows], targets)


def kept_ids(targets: PackedTargets, vocabulary: int) -> Tensor:
    """bool [N, V]: which ids a row keeps."""
    columns = torch.zeros(len(targets), vocabulary + 1, dtype=torch.bool, device=targets.count_N.device)
    return columns.scatter_(1, targets.ids().masked_fill(~targets.kept(), vocabulary), True)[:, :-1]


def divergence(logp: Tensor, logq: Tensor, holds: Tensor) -> Tensor:
    """p (log p - log q) where an entry holds and p > 0, summed over all dimensions but the first."""
    p = torch.where(holds, logp.exp(), 0)
    terms = torch.where(p > 0, p * (torch.where(p > 0, logp, 0) - torch.where(p > 0, logq, 0)), 0)
    return terms.flatten(1).sum(dim=1) if terms.ndim > 1 else terms


def ki_loss_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: Rows,
    temperature: float,
    vocabulary: int | None,
    logit_transform: LogitTransform,
) -> KILoss:
    """The definition; arguments as in `ki_ds.kernels.ki_loss`."""
    z_NV = torch.nn.functional.linear(hidden_ND, *head(weight_VD, bias_V, vocabulary))
    if z_NV.dtype in (torch.float16, torch.bfloat16):
        z_NV = z_NV.float()
    z_NV = logit_transform.of(z_NV)
    labels_N, alpha_N, targets = rows
    ce_N = -z_NV.log_softmax(dim=1).gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1) * (labels_N >= 0)
    kl_N = torch.zeros_like(ce_N)
    if targets is not None:
        logp_NK, tail_N = targets.log_probabilities(temperature, z_NV.dtype)
        logq_NV = (z_NV / temperature).log_softmax(dim=1)
        kl_N = divergence(logp_NK, logq_NV.gather(1, targets.ids()), targets.kept())
        if tail_N is not None:
            rest_N = logq_NV.masked_fill(kept_ids(targets, logq_NV.shape[1]), -torch.inf).logsumexp(dim=1)
            kl_N = kl_N + divergence(tail_N, rest_N, torch.isfinite(tail_N))
        kl_N = torch.where(alpha_N > 0, kl_N, 0)
    loss = ((1 - alpha_N) * ce_N + alpha_N * temperature**2 * kl_N).sum()
    ce_N, kl_N = ce_N.detach(), kl_N.detach()
    return KILoss(loss, ce_N.sum(), kl_N.sum(), ce_N, kl_N)
