"""The knowledge-inheritance loss by chunks of rows: no [N, V] tensor of the whole batch, any device torch runs on.

Definition and letters as in `reference.py`. The gradient of the logits is written over the chunk's own logits,

    dloss/dz = w [(1 - α)(softmax(z) - onehot(label)) + α τ (softmax(z / τ) - scatter(p))]          (τ² · 1/τ = τ)

and, with a tail, softmax(z / τ)_v (1 - p_tail / Σ_{u not kept} softmax(z / τ)_u) for the ids v that are not kept,
and reduced at once to the gradients of hidden states, weight and bias, all accumulated in fp32 (or wider), so that the
backward pass only multiplies by the incoming scale. Reads fp16, bf16, fp32 or fp64; never writes its inputs.

The driver is shared with the Triton kernels; `eager_chunk_loss` is what torch alone makes of a chunk. The kept ids are
taken out of the logits first, so that what remains is summed without cancellation however sure the student is.
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

# (product [n, V], rows, τ, logits, gain | None, with gradient?) -> [3] loss, ce, kl; the gradient ends in the product
ChunkLoss = Callable[[Tensor, Rows, float, LogitTransform, "Tensor | None", bool], Tensor]


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
    logits: LogitTransform,
    chunk_loss: ChunkLoss | None = None,
) -> KILoss:
    """Chunk by chunk; arguments as in `ki_ds.kernels.ki_loss`."""
    differentiate = torch.is_grad_enabled()  # inside `forward` it is always off
    how = (rows, temperature, vocabulary, logits, chunk_loss or eager_chunk_loss, differentiate)
    return KILoss(*_Chunked.apply(hidden_ND, weight_VD, bias_V, *how))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        temperature: float,
        vocabulary: int | None,
        logits: LogitTransform,
        chunk_loss: ChunkLoss,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = rows.weights_N.dtype
        used, used_bias = head(weight, bias, vocabulary)
        wanted = [differentiate and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden, grad_weight, grad_bias = (
            torch.empty(x.shape, dtype=wide, device=x.device) if x is not None and want else None
            for x, want in zip((hidden, weight, bias), wanted, strict=True)
        )
        for gradient in (grad_weight, grad_bias):
            if gradient is not None:  # padding rows, or all where there is no chunk
                gradient[len(used) if len(hidden) else 0 :] = 0
        gain = half_gain(rows, temperature, logits) if hidden.dtype == torch.float16 and any(wanted) else None
        size = chunk_rows(len(hidden), len(used), hidden)
        buffer = logits_buffer(min(size, len(hidden)), len(used), hidden)
        sums = torch.zeros(3, dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), size):
            part = hidden[start : start + size]
            product = buffer[: len(part)]
            multiply(part, used, used_bias, product)
            here = slice(start, start + len(part))
            sums += chunk_loss(product, rows.part(here), temperature, logits, gain, any(wanted))
            # `product` now holds the gradient
            if grad_hidden is not None:
                add_product(grad_hidden[here], product, used, first=True)
            if grad_weight is not None:
                add_product(grad_weight[: len(used)], product.T, part, first=start == 0)
            if grad_bias is not None:
                total = product.sum(dim=0, dtype=wide)
                grad_bias[: len(used)] = total if start == 0 else grad_bias[: len(used)] + total
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, gain)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        loss, ce, kl = (x.clone() for x in sums)  # a view could not be changed in place
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _ce: Tensor, _kl: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: what comes out would count as constant
            raise RuntimeError('ki_loss has no second derivative here; impl="reference" has')
        *gradients, gain = ctx.saved_tensors
        scale = grad_loss if gain is None else grad_loss / gain
        scaled = [
            None if x is None else torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


def half_gain(rows: Rows, temperature: float, logits: LogitTransform) -> Tensor:
    """The power of two that brings the logits' gradients into the range of fp16, whatever the loss scale is later."""
    largest = rows.weights_N.abs().amax() if len(rows.weights_N) else rows.weights_N.new_ones(())
    bound = (largest * max(temperature, 1.0) * logits.scale).clamp(min=2.0**-40)
    return torch.exp2(HALF_RANGE - torch.ceil(torch.log2(bound)))


def eager_chunk_loss(
    product: Tensor, rows: Rows, temperature: float, form: LogitTransform, gain: Tensor | None, gradient: bool
) -> Tensor:
    """[3]: the sums of loss, CE and KL over a chunk; with `gradient`, dloss/dproduct · gain overwrites the product."""
    labels, weights, alpha, targets = rows
    logits = form.of(product.to(weights.dtype))
    slope = form.slope(logits) if gradient else None
    factor = (1.0 if form.cap else form.scale) * (1.0 if gain is None else gain)
    push, pull = weights * (1 - alpha) * factor, weights * alpha * (temperature * factor)
    index = labels.clamp(min=0)[:, None]
    label_logit = logits.gather(1, index).squeeze(1)
    if targets is None:
        most, lse = _sum_out(logits, push, gradient)
        kl = torch.zeros_like(lse)
    else:
        kept, ids = targets.kept() & (alpha > 0)[:, None], targets.ids()
        logp, tail = targets.log_probabilities(temperature, logits.dtype)
        z = logits.gather(1, ids).masked_fill_(~kept, -torch.inf)
        # where an entry does not hold, nothing is added to the id 0 that it points at
        logits.scatter_add_(1, ids, torch.zeros_like(z).masked_fill_(kept, -torch.inf))
        most, lse, lse_t, rest_t = _sums_out(logits, z, push, pull, tail, temperature, gradient)
        z -= most[:, None]
        logq = z / temperature - lse_t[:, None]
        kl = divergence(logp, logq, kept)
        if tail is not None:
            kl += divergence(tail, rest_t - lse_t, torch.isfinite(tail))
        kl *= alpha > 0
        if gradient:
            at_kept = push[:, None] * (z - lse[:, None]).exp() + pull[:, None] * (logq.exp() - logp.exp())
            logits.scatter_add_(1, ids, at_kept.masked_fill_(~kept, 0))
    if gradient:
        logits.scatter_add_(1, index, -push[:, None])
        product.copy_(logits if slope is None else logits.mul_(slope))
    ce = torch.where(labels >= 0, (most - label_logit) + lse, 0)
    each = weights * torch.stack([(1 - alpha) * ce + alpha * temperature**2 * kl, ce, kl])
    return each.sum(dim=1)


def _blocks(logits: Tensor) -> list[slice]:
    """Runs of rows that a CPU's caches hold from one operation to the next."""
    cached = CACHE_BYTES * torch.get_num_threads() // (logits.shape[1] * logits.itemsize)
    size = max(len(logits) if logits.is_cuda else cached, 1)
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _sum_out(logits: Tensor, push: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """[n] the largest of the rows, and their log-sum-exp less that; with `gradient`, push · softmax overwrites them."""
    most, lse = torch.empty_like(push), torch.empty_like(push)
    for here in _blocks(logits):
        block = logits[here]
        top = block.amax(dim=1, keepdim=True)
        total = block.sub_(top).exp_().sum(dim=1)
        most[here], lse[here] = top.squeeze(1), total.log()
        if gradient:
            block *= (push[here] / total)[:, None]
    return most, lse


def _sums_out(
    logits: Tensor,
    z_kept: Tensor,
    push: Tensor,
    pull: Tensor,
    tail: Tensor | None,
    temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[n] the largest logit; log-sum-exps at 1 and at τ of whole rows, and at τ of the ids that are not kept, all
    relative to it, so that a row's common offset costs no digit. `logits` are those of the ids that are not kept.

    With `gradient`, push · softmax(z) + pull · softmax(z / τ) · (1 - p_tail / rest) overwrites these logits.
    """
    lowest = torch.finfo(logits.dtype).min
    most, lse, lse_t, rest_t = (torch.empty_like(push) for _ in range(4))
    top_k = z_kept.amax(dim=1).clamp_(min=lowest)
    z_kept = z_kept - top_k[:, None]
    total_k, total_k_t = z_kept.exp().sum(dim=1), (z_kept / temperature).exp_().sum(dim=1)
    blocks = _blocks(logits)
    scratch = torch.empty_like(logits[blocks[0]]) if temperature != 1 else logits
    for here in blocks:
        block = logits[here]  # at 1
        other = scratch[: len(block)] if temperature != 1 else block  # at τ
        top = block.amax(dim=1).clamp_(min=lowest)  # finite where every id is kept
        block -= top[:, None]
        if temperature == 2:  # the square of an exponential is cheaper than another one
            other = block.mul_(0.5).exp_()
            total = torch.linalg.vecdot(block, block)
        else:
            if temperature != 1:
                torch.mul(block, 1 / temperature, out=other).exp_()
            total = block.exp_().sum(dim=1)
        total_t = other.sum(dim=1)
        most[here] = largest = torch.maximum(top, top_k[here])
        down, down_k = top - largest, top_k[here] - largest
        lse[here] = (total * down.exp() + total_k[here] * down_k.exp()).log()
        lse_t[here] = (total_t * (down / temperature).exp() + total_k_t[here] * (down_k / temperature).exp()).log()
        rest_t[here] = rest = down / temperature + total_t.log()
        if not gradient:
            continue
        share = (rest - lse_t[here]).exp()  # of the student's probability
        if tail is not None:
            share -= tail[here].exp()
        a = (push[here] * (down - lse[here]).exp())[:, None]
        b = torch.where(total_t > 0, pull[here] * share / total_t, 0)[:, None]
        if temperature == 1:
            block *= a + b
        elif temperature == 2:
            block *= torch.mul(block, a, out=scratch[: len(block)]).add_(b)
        else:
            block.mul_(a).add_(other.mul_(b))
    return most, lse, lse_t, rest_t
