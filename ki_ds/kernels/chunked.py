"""The knowledge-inheritance loss by chunks of rows: no [N, V] tensor of the whole batch, any device torch runs on.

Definition and letters as in `reference.py`. The gradient of the logits is written over the chunk's own logits,

    dloss/dz = (1 - α)(softmax(z) - onehot(label)) + α τ (softmax(z / τ) - scatter(p))          (τ² · 1/τ = τ)

and, with a tail, softmax(z / τ)_v (1 - p_tail / Σ_{u not kept} softmax(z / τ)_u) for the ids v that are not kept,
and reduced at once to the gradients of hidden states, weight and bias, all accumulated in fp32 (or wider), so that the
backward pass only multiplies by the incoming scale. Reads fp16, bf16, fp32 or fp64; never writes its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ki_ds.kernels.packed import PackedTargets
from ki_ds.kernels.reference import KILoss, divergence, effective_alpha

CHUNK_BYTES = 32 << 20  # of one chunk's logits


def ki_loss_chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    targets: PackedTargets | None,
    alpha_N: Tensor | None,
    temperature: float,
) -> KILoss:
    """Chunk by chunk; arguments as in `ki_ds.kernels.ki_loss`."""
    differentiate = torch.is_grad_enabled()  # inside `forward` it is always off
    return KILoss(*_Chunked.apply(hidden_ND, weight_VD, bias_V, labels_N, targets, alpha_N, temperature, differentiate))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        targets: PackedTargets | None,
        alpha: Tensor | None,
        temperature: float,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = max(CHUNK_BYTES // (weight.shape[0] * wide.itemsize), 16)
        wanted = [differentiate and needed for needed in ctx.needs_input_grad]
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        effective = effective_alpha(labels, targets, alpha, wide)
        ce, kl, loss = (torch.zeros((), dtype=wide, device=hidden.device) for _ in range(3))
        for start in range(0, hidden.shape[0], rows):
            here = slice(start, start + rows)
            # products in the inputs' own dtype (tensor cores), everything after them in fp32
            logits = torch.nn.functional.linear(hidden[here], weight, bias).to(wide)
            part = None if targets is None or alpha is None else targets.rows(here)
            chunk = _chunk(logits, labels[here], part, effective[here], temperature, any(wanted[:3]))
            loss, ce, kl = loss + chunk[0], ce + chunk[1], kl + chunk[2]
            if any(wanted[:3]):
                gradient = logits.to(hidden.dtype)  # `logits` now holds the gradient
                if grad_hidden is not None:
                    grad_hidden[here] = gradient @ weight
                if grad_weight is not None:
                    grad_weight += gradient.T @ hidden[here]
                if grad_bias is not None:
                    grad_bias += logits.sum(dim=0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _ce: Tensor, _kl: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _chunk(
    logits: Tensor, labels: Tensor, targets: PackedTargets | None, alpha: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kl) of a chunk; with `gradient`, `logits` is overwritten by dloss/dlogits."""
    labelled = labels >= 0
    index = labels.clamp(min=0)[:, None]
    lse = logits.logsumexp(dim=1)
    ce_N = torch.where(labelled, lse - logits.gather(1, index).squeeze(1), 0)
    taught = torch.nonzero(alpha > 0).squeeze(1) if targets is not None else alpha.new_empty(0, dtype=torch.int64)
    kl_N = torch.zeros_like(ce_N)
    pull = None
    if targets is not None and len(taught):
        every = len(taught) == len(labels)
        scaled = (logits if every else logits[taught]) / temperature
        kept, ids = targets.kept()[taught], targets.ids()[taught]
        logp_all, tail_all = targets.log_probabilities(temperature, logits.dtype)
        logp = logp_all[taught]
        p = torch.where(kept, logp.exp(), 0)
        lse_scaled = scaled.logsumexp(dim=1)
        logq = scaled.gather(1, ids) - lse_scaled[:, None]
        kl = divergence(logp, logq, kept)
        if tail_all is not None:
            tail = tail_all[taught]
            # an entry that does not hold points at id 0, which may not be kept: it points at a kept one instead
            scaled.scatter_(1, torch.where(kept, ids, ids[:, :1]), -torch.inf)
            # in logarithms: what a sure student leaves to the other ids is 0 in fp32, its logarithm is not
            lse_rest = scaled.logsumexp(dim=1)
            rest = lse_rest - lse_scaled
            kl = kl + divergence(tail, rest, torch.isfinite(tail))
            if gradient:
                # Σ_{u not kept} q_u - p_tail, shared out by softmax over these ids; where all are kept, exp(-inf) = 0
                pull = scaled.sub_(lse_rest.clamp(min=torch.finfo(rest.dtype).min)[:, None]).exp_()
                pull *= (rest.exp() - tail.exp())[:, None]
                pull.scatter_add_(1, ids, torch.where(kept, logq.exp() - p, 0))
        elif gradient:
            pull = scaled.sub_(lse_scaled[:, None]).exp_().scatter_add_(1, ids, -p)
        kl_N[taught] = kl
        if pull is not None:
            pull *= (alpha[taught] * temperature)[:, None]
    loss = ((1 - alpha) * ce_N + alpha * temperature**2 * kl_N).sum()
    if gradient:
        push = torch.where(labelled, 1 - alpha, 0)
        logits.sub_(lse[:, None]).exp_().mul_(push[:, None])
        logits.scatter_add_(1, index, -push[:, None])
        if pull is not None:
            logits.index_add_(0, taught, pull)
    return loss, ce_N.sum(), kl_N.sum()
