"""The knowledge-inheritance loss by chunks of rows: no [N, V] tensor of the whole batch, any device torch runs on.

Definition as in `reference.py`. The gradient of the logits z, of which x is the product before its transform,

    dloss/dz = w_ce (softmax(z) - onehot(label)) + w_kl (softmax(z / τ) - scatter(p))
    dloss/dz = w_ce (softmax(z) - onehot(label)) + w_kl softmax(z / τ) (1 - p_tail / q_rest)   with a tail, for the rest

is written over the chunk's own product, and reduced at once to the gradients of hidden states, weight and bias, all
accumulated in fp32 (or wider), so that the backward pass only multiplies by the incoming scale. Reads fp16, bf16, fp32
or fp64; never writes its inputs.

N rows, D hidden size, V vocabulary, K kept ids. _t: at the temperature τ, else at 1.

    kept, rest         the ids that a row's target names (α > 0), and all others; without a target all are rest
    kept_max, rest_max, row_max                  the largest logit of the kept ids, of the rest, and of both
    kept_down, rest_down                         kept_max - row_max, rest_max - row_max
    kept_total[_t], rest_total[_t]               Σ exp((z - kept_max) / τ) over the kept ids, and the rest's alike
    lse[_t]            log Σ_v exp((z_v - row_max) / τ) of the whole row: a row's common offset costs no digit
    logp, logq         the teacher's and the student's log-probabilities at τ; logq_rest: of the rest as one outcome
    excess             q_rest - p_tail; without a tail p_tail = 0
    factor             gain · dz/dx where that is the scale alone; under a cap, gain
    w_ce, w_kl         factor (1 - α) and factor α τ  (τ² · 1/τ = τ); both 0 without a label

The driver is shared with the Triton kernels; `eager_chunk_loss` is what torch alone makes of a chunk. The kept ids are
taken out of the logits first, so that the rest is summed without cancellation however sure the student is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ki_ds.kernels.logit_transform import ALIGNMENT, LogitTransform, head, logits_buffer, multiply
from ki_ds.kernels.loss.products import add_product
from ki_ds.kernels.loss.reference import KILoss, Rows, divergence

CHUNK_BYTES = 64 << 20  # of one chunk's logits, on the CPU
CACHE_BYTES = 1 << 20  # of the logits that a core works on at a time
LEAST_ROWS, MOST_ROWS = 2048, 4096  # of a chunk on a GPU: the weight gradient's traffic hides behind products
HALF_RANGE = 14  # gradients of the logits reach up to 2^14 in fp16, so that 38 bits are left below the largest

# (product_NV, rows, τ, logit transform, gain, with gradient?) -> loss, ce, kl [3, N]; the gradient ends in the product
ChunkLoss = Callable[[Tensor, Rows, float, LogitTransform, float, bool], Tensor]


def chunk_rows(rows: int, vocabulary: int, hidden: Tensor) -> int:
    """Rows of a chunk, all chunks about equal. On a GPU about as many bytes of bf16 logits as the fp32 weight gradient
    has; and a chunk's rows begin as aligned as the whole's, since Triton compiles anew for another alignment."""
    if hidden.is_cuda:
        most = min(max(2 * hidden.shape[1], LEAST_ROWS), MOST_ROWS)
    else:
        most = max(CHUNK_BYTES // (vocabulary * max(hidden.itemsize, 4)), 16)
    size = max(math.ceil(rows / max(math.ceil(rows / most), 1)), 1)
    return math.ceil(size / ALIGNMENT) * ALIGNMENT if hidden.is_cuda else size


def ki_loss_chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: Rows,
    temperature: float,
    vocabulary: int | None,
    logit_transform: LogitTransform,
    chunk_loss: ChunkLoss | None = None,
) -> KILoss:
    """Chunk by chunk; arguments as in `ki_ds.kernels.ki_loss`."""
    differentiate = torch.is_grad_enabled()  # inside `forward` it is always off
    how = (rows, temperature, vocabulary, logit_transform, chunk_loss or eager_chunk_loss, differentiate)
    return KILoss(*_Chunked.apply(hidden_ND, weight_VD, bias_V, *how))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows: Rows,
        temperature: float,
        vocabulary: int | None,
        logit_transform: LogitTransform,
        chunk_loss: ChunkLoss,
        differentiate: bool,
    ) -> tuple[Tensor, ...]:
        wide = rows.alpha_N.dtype
        count, (used_VD, used_bias_V) = len(hidden_ND), head(weight_VD, bias_V, vocabulary)
        inputs = (hidden_ND, weight_VD, bias_V)
        wanted = [differentiate and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden_ND, grad_weight_VD, grad_bias_V = (
            torch.empty(x.shape, dtype=wide, device=x.device) if x is not None and want else None
            for x, want in zip(inputs, wanted, strict=True)
        )
        used = len(used_VD)
        for gradient in (grad_weight_VD, grad_bias_V):
            if gradient is not None:  # padding rows, or all where there is no chunk
                gradient[used if count else 0 :] = 0
        gain = half_gain(temperature, logit_transform) if hidden_ND.dtype == torch.float16 and any(wanted) else 1.0
        size = chunk_rows(count, used, hidden_ND)
        buffer_NV = logits_buffer(min(size, count), used, hidden_ND)
        sums = torch.zeros(3, dtype=wide, device=hidden_ND.device)
        ce_N, kl_N = torch.empty(2, count, dtype=wide, device=hidden_ND.device).unbind()
        for start in range(0, count, size):
            here = slice(start, min(start + size, count))
            part_ND = hidden_ND[here]
            product_NV = buffer_NV[: len(part_ND)]
            multiply(part_ND, used_VD, used_bias_V, product_NV)
            found_3N = chunk_loss(product_NV, rows.part(here), temperature, logit_transform, gain, any(wanted))
            sums += found_3N.sum(dim=1)
            ce_N[here], kl_N[here] = found_3N[1], found_3N[2]
            # the product now holds the gradient
            if grad_hidden_ND is not None:
                add_product(grad_hidden_ND[here], product_NV, used_VD, first=True)
            if grad_weight_VD is not None:
                add_product(grad_weight_VD[:used], product_NV.T, part_ND, first=start == 0)
            if grad_bias_V is not None:
                total_V = product_NV.sum(dim=0, dtype=wide)
                grad_bias_V[:used] = total_V if start == 0 else grad_bias_V[:used] + total_V
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.gain, ctx.dtypes = gain, tuple(None if x is None else x.dtype for x in inputs)
        loss, ce, kl = (x.clone() for x in sums)  # a view could not be changed in place
        ctx.mark_non_differentiable(ce, kl, ce_N, kl_N)
        return loss, ce, kl, ce_N, kl_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: what comes out would count as constant
            raise RuntimeError('ki_loss has no second derivative here; impl="reference" has')
        scale = grad_loss / ctx.gain
        scaled = [
            None if x is None else torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


def half_gain(temperature: float, logit_transform: LogitTransform) -> float:
    """The power of two that brings the logits' gradients into the range of fp16, whatever the loss scale is later."""
    bound = max(max(temperature, 1.0) * logit_transform.scale, 2.0**-40)
    return 2.0 ** (HALF_RANGE - math.ceil(math.log2(bound)))


def eager_chunk_loss(
    product_NV: Tensor, rows: Rows, temperature: float, logit_transform: LogitTransform, gain: float, gradient: bool
) -> Tensor:
    """[3, N]: loss, CE and KL of a chunk's rows; with `gradient`, dloss/dproduct · gain overwrites the product."""
    labels_N, alpha_N, targets = rows
    labelled_N = labels_N >= 0
    z_NV = logit_transform.of(product_NV.to(alpha_N.dtype))
    slope_NV = logit_transform.slope(z_NV) if gradient else None
    factor = gain * (1.0 if logit_transform.cap else logit_transform.scale)
    w_ce_N, w_kl_N = (1 - alpha_N) * labelled_N * factor, alpha_N * (temperature * factor)
    index_N1 = labels_N.clamp(min=0)[:, None]
    z_label_N = z_NV.gather(1, index_N1).squeeze(1)
    if targets is None:
        row_max_N, lse_N = _softmax_out(z_NV, w_ce_N, gradient)
        kl_N = torch.zeros_like(lse_N)
    else:
        kept_NK, ids_NK = targets.kept() & (alpha_N > 0)[:, None], targets.ids()
        logp_NK, logp_tail_N = targets.log_probabilities(temperature, z_NV.dtype)
        z_NK = z_NV.gather(1, ids_NK).masked_fill_(~kept_NK, -torch.inf)
        # where an entry does not hold, nothing is added to the id 0 that it points at
        z_NV.scatter_add_(1, ids_NK, torch.zeros_like(z_NK).masked_fill_(kept_NK, -torch.inf))
        row_max_N, lse_N, lse_t_N, logq_rest_N = _rest_out(
            z_NV, z_NK, w_ce_N, w_kl_N, logp_tail_N, temperature, gradient
        )
        z_NK -= row_max_N[:, None]
        logq_NK = z_NK / temperature - lse_t_N[:, None]
        kl_N = divergence(logp_NK, logq_NK, kept_NK)
        if logp_tail_N is not None:
            kl_N += divergence(logp_tail_N, logq_rest_N, torch.isfinite(logp_tail_N))
        kl_N *= alpha_N > 0
        if gradient:
            at_kept_NK = w_ce_N[:, None] * (z_NK - lse_N[:, None]).exp()
            at_kept_NK += w_kl_N[:, None] * (logq_NK.exp() - logp_NK.exp())
            z_NV.scatter_add_(1, ids_NK, at_kept_NK.masked_fill_(~kept_NK, 0))
    if gradient:
        z_NV.scatter_add_(1, index_N1, -w_ce_N[:, None])
        product_NV.copy_(z_NV if slope_NV is None else z_NV.mul_(slope_NV))
    ce_N = torch.where(labelled_N, (row_max_N - z_label_N) + lse_N, 0)
    return torch.stack([(1 - alpha_N) * ce_N + alpha_N * temperature**2 * kl_N, ce_N, kl_N])


def _blocks(z_NV: Tensor) -> list[slice]:
    """Runs of rows that a CPU's caches hold from one operation to the next."""
    cached = CACHE_BYTES * torch.get_num_threads() // (z_NV.shape[1] * z_NV.itemsize)
    size = max(len(z_NV) if z_NV.is_cuda else cached, 1)
    return [slice(start, start + size) for start in range(0, len(z_NV), size)]


def _softmax_out(z_NV: Tensor, w_ce_N: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """row_max_N and lse_N; with `gradient`, w_ce · softmax(z) overwrites the logits."""
    row_max_N, lse_N = torch.empty_like(w_ce_N), torch.empty_like(w_ce_N)
    for here in _blocks(z_NV):
        block_NV = z_NV[here]
        max_N1 = block_NV.amax(dim=1, keepdim=True)
        total_N = block_NV.sub_(max_N1).exp_().sum(dim=1)
        row_max_N[here], lse_N[here] = max_N1.squeeze(1), total_N.log()
        if gradient:
            block_NV *= (w_ce_N[here] / total_N)[:, None]
    return row_max_N, lse_N


def _rest_out(
    rest_NV: Tensor,
    kept_NK: Tensor,
    w_ce_N: Tensor,
    w_kl_N: Tensor,
    logp_tail_N: Tensor | None,
    temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_max_N, lse_N, lse_t_N and logq_rest_N, from the rest's logits and the kept ids', -inf where there is none.

    With `gradient`, w_ce · softmax(z) + w_kl · softmax(z / τ) · (1 - p_tail / q_rest) overwrites the rest's logits.
    """
    lowest = torch.finfo(rest_NV.dtype).min
    row_max_N, lse_N, lse_t_N, logq_rest_N = (torch.empty_like(w_ce_N) for _ in range(4))
    kept_max_N = kept_NK.amax(dim=1).clamp_(min=lowest)
    kept_NK = kept_NK - kept_max_N[:, None]
    kept_total_N, kept_total_t_N = kept_NK.exp().sum(dim=1), (kept_NK / temperature).exp_().sum(dim=1)
    blocks = _blocks(rest_NV)
    scratch_NV = torch.empty_like(rest_NV[blocks[0]]) if temperature != 1 else rest_NV
    for here in blocks:
        block = rest_NV[here]  # [n, V], at 1
        block_t = scratch_NV[: len(block)] if temperature != 1 else block  # at τ
        rest_max, kept_max = block.amax(dim=1).clamp_(min=lowest), kept_max_N[here]  # finite where every id is kept
        block -= rest_max[:, None]
        if temperature == 2:  # the square of an exponential is cheaper than another one
            block_t = block.mul_(0.5).exp_()
            rest_total = torch.linalg.vecdot(block, block)
        else:
            if temperature != 1:
                torch.mul(block, 1 / temperature, out=block_t).exp_()
            rest_total = block.exp_().sum(dim=1)
        rest_total_t = block_t.sum(dim=1)
        row_max_N[here] = row_max = torch.maximum(rest_max, kept_max)
        rest_down, kept_down = rest_max - row_max, kept_max - row_max
        lse_N[here] = lse = (rest_total * rest_down.exp() + kept_total_N[here] * kept_down.exp()).log()
        rest_t, kept_t = (rest_down / temperature).exp(), (kept_down / temperature).exp()
        lse_t_N[here] = lse_t = (rest_total_t * rest_t + kept_total_t_N[here] * kept_t).log()
        logq_rest_N[here] = logq_rest = rest_down / temperature + rest_total_t.log() - lse_t
        if not gradient:
            continue
        excess = logq_rest.exp()
        if logp_tail_N is not None:
            excess -= logp_tail_N[here].exp()
        a = (w_ce_N[here] * (rest_down - lse).exp())[:, None]
        b = torch.where(rest_total_t > 0, w_kl_N[here] * excess / rest_total_t, 0)[:, None]
        if temperature == 1:
            block *= a + b
        elif temperature == 2:
            block *= torch.mul(block, a, out=scratch_NV[: len(block)]).add_(b)
        else:
            block.mul_(a).add_(block_t.mul_(b))
    return row_max_N, lse_N, lse_t_N, logq_rest_N
