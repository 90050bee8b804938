# mypy: disallow-untyped-defs=False
"""The loss of a chunk of logits and its gradient in one Triton kernel, one program a row.

Letters and formulas as in `reference.py` and `chunked.py`, whose driver calls `chunk_loss`. Of a row of V logits in the
inputs' type the kernel reads

    once      the K kept ids' logits (into a scratch of K fp32 numbers); then -inf takes their place, so that all that
              follows sums over the other ids alone and a tail needs no difference of nearly equal sums
    twice     the row: log-sum-exps at 1 and at τ in one pass, then, out of the L2 cache, the gradient over the logits

and corrects the K entries last. Targets are decoded in registers from their planes, K at most 128 at a time. All
arithmetic is fp32. No sum depends on the order in which programs run: two runs give the same bits. Nothing but block
sizes and the kind of target is a compile-time constant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ki_ds.kernels.logit_transform import ALIGNMENT, LogitTransform
from ki_ds.kernels.loss.reference import Rows
from ki_ds.targets.quanta import COARSE, FINE

BLOCK_K = 128  # kept ids at a time
# columns at a time, and warps: so many that the rows under way, read twice, fit in the L2 cache (300 KB a processor)
NARROW, WIDE = (4096, 16), (8192, 32)
WIDE_BYTES = 128 << 10  # a row's, from where on a processor has one program
LOWEST = tl.constexpr(-3.0e38)  # a maximum over nothing, finite so that differences are numbers
FINE_, STEP = tl.constexpr(FINE), tl.constexpr(COARSE - 1)


@triton.jit
def soft_capped(z, cap):
    """cap · tanh(z / cap), by an exponential of a number below 0."""
    e = tl.exp(-2 * tl.abs(z) / cap)
    return tl.where(z < 0, -cap, cap) * ((1 - e) / (1 + e))


@triton.jit
def _logits(raw, scale, cap, CAP: tl.constexpr):
    """The logits that a model makes of its head's product; -inf, which marks what is left out, stays."""
    z = raw * scale
    if CAP:
        z = tl.where(raw == float("-inf"), raw, soft_capped(z, cap))
    return z


@triton.jit
def _load(row, cols, padded, vocabulary, scale, cap, CAP: tl.constexpr):
    """Logits at some columns. The row is padded to a width that vector loads like; what is there does not count."""
    raw = tl.load(row + cols, mask=cols < padded, other=float("-inf")).to(tl.float32)
    return _logits(tl.where(cols < vocabulary, raw, float("-inf")), scale, cap, CAP)


@triton.jit
def _exponentials(z, top, temperature, POWER: tl.constexpr):
    """exp(z - top) and exp((z - top) / τ), for τ = 1 and 2 with one exponential."""
    if POWER == 1:
        e = tl.exp(z - top)
        e_t = e
    elif POWER == 2:
        e_t = tl.exp((z - top) * 0.5)
        e = e_t * e_t
    else:
        e = tl.exp(z - top)
        e_t = tl.exp((z - top) / temperature)
    return e, e_t


@triton.jit
def _sums(
    row, padded, vocabulary, scale, cap, temperature, POWER: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest logit of a row; the sums of exp(z - largest) and of exp((z - largest) / τ)."""
    top = LOWEST
    total = 0.0
    total_t = 0.0
    for start in range(0, padded, BLOCK):
        z = _load(row, start + tl.arange(0, BLOCK), padded, vocabulary, scale, cap, CAP)
        new = tl.maximum(top, tl.max(z, axis=0))
        e, e_t = _exponentials(z, new, temperature, POWER)
        total = total * tl.exp(top - new) + tl.sum(e, axis=0)
        if POWER != 1:
            total_t = total_t * tl.exp((top - new) / temperature) + tl.sum(e_t, axis=0)
        top = new
    if POWER == 1:
        total_t = total
    return top, total, total_t


@triton.jit
def _gradient(
    row, padded, vocabulary, scale, cap, temperature, top, a, b, push, label,
    POWER: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a · exp(z - top) + b · exp((z - top) / τ), less `push` at the label, over the row's logits."""
    for start in range(0, padded, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = _load(row, cols, padded, vocabulary, scale, cap, CAP)
        e, e_t = _exponentials(z, top, temperature, POWER)
        g = a * e + b * e_t
        g = tl.where(cols == label, g - push, g)
        if CAP:
            g = tl.where(z == float("-inf"), 0.0, g * (scale * (1 - (z / cap) * (z / cap))))
        tl.store(row + cols, g.to(row.dtype.element_ty), mask=cols < padded)


@triton.jit
def _kept(ids, high, values, first, count, quantum, temperature, HIGH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a run of entries: their places, which of them hold, their ids, and their log weights at τ."""
    k = first + tl.arange(0, BLOCK_K)
    holds = k < count
    token = tl.load(ids + k, mask=holds, other=0).to(tl.int32) & 0xFFFF
    if HIGH:
        token |= tl.load(high + k, mask=holds, other=0).to(tl.int32) << 16
    value = tl.load(values + k, mask=holds, other=0).to(tl.float32)
    if quantum == 0:  # counts
        weight = tl.log(value)
    else:
        weight = (value + STEP * tl.maximum(value - FINE_, 0.0)) * (-quantum / temperature)
    return k, holds, token, tl.where(holds, weight, float("-inf"))


@triton.jit(do_not_specialize=["rows", "stride_k", "vocabulary"])
def ki_loss_rows(
    product, padded, vocabulary, rows, labels, weights, alphas, gain_at,
    ids, high, values, counts, tails, stride_k, kept_at,
    quantum, temperature, scale, cap, sums,
    TAUGHT: tl.constexpr, HIGH: tl.constexpr, TAIL: tl.constexpr, POWER: tl.constexpr, CAP: tl.constexpr,
    GAIN: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loss, CE and KL of a row into sums [3, rows]; with GRADIENT, dloss/dproduct · gain over its product."""
    n = tl.program_id(0).to(tl.int64)
    row = product + n * padded
    label = tl.load(labels + n)
    w = tl.load(weights + n)
    alpha = 0.0
    if TAUGHT:
        alpha = tl.load(alphas + n)
    loss = 0.0
    ce = 0.0
    kl = 0.0
    if w != 0:
        # a label or an id that is no token makes the loss and the row's gradient not a number
        z_label = tl.load(row + label, mask=(label >= 0) & (label < vocabulary), other=float("nan")).to(tl.float32)
        z_label = _logits(z_label, scale, cap, CAP)
        factor = w
        if GAIN:
            factor *= tl.load(gain_at)
        if not CAP:
            factor *= scale
        push = tl.where(label < vocabulary, factor * (1 - alpha), float("nan"))
        if alpha > 0:
            pull = factor * alpha * temperature
            ids += n * stride_k
            high += n * stride_k
            values += n * stride_k
            kept_at += n * stride_k
            count = tl.minimum(tl.load(counts + n).to(tl.int32), stride_k)
            top_k = LOWEST  # of the kept ids' logits
            top_p = LOWEST  # of the teacher's log weights
            strange = 0  # ids that are no tokens
            for first in range(0, count, BLOCK_K):
                k, holds, token, weight = _kept(ids, high, values, first, count, quantum, temperature, HIGH, BLOCK_K)
                known = holds & (token < vocabulary)
                raw = tl.load(row + token, mask=known, other=float("-inf")).to(tl.float32)
                tl.store(kept_at + k, raw, mask=holds)
                top_k = tl.maximum(top_k, tl.max(_logits(raw, scale, cap, CAP), axis=0))
                top_p = tl.maximum(top_p, tl.max(weight, axis=0))
                strange += tl.sum((holds & (token >= vocabulary)).to(tl.int32), axis=0)
            tail = float("-inf")
            if TAIL:
                tail = tl.load(tails + n)
                top_p = tl.maximum(top_p, tail)
            pull = tl.where(strange > 0, float("nan"), pull)
            kl = tl.where(strange > 0, float("nan"), 0.0)
            tl.debug_barrier()  # all threads have read before any writes
            total_k = 0.0
            total_k_t = 0.0
            total_p = tl.exp(tail - top_p)
            for first in range(0, count, BLOCK_K):
                k, holds, token, weight = _kept(ids, high, values, first, count, quantum, temperature, HIGH, BLOCK_K)
                known = holds & (token < vocabulary)
                tl.store(row + token, float("-inf"), mask=known)
                z = _logits(tl.load(kept_at + k, mask=holds, other=float("-inf")), scale, cap, CAP)
                e, e_t = _exponentials(z, top_k, temperature, POWER)
                total_k += tl.sum(e, axis=0)
                total_k_t += tl.sum(e_t, axis=0)
                total_p += tl.sum(tl.exp(weight - top_p), axis=0)
            tl.debug_barrier()
            top, total, total_t = _sums(row, padded, vocabulary, scale, cap, temperature, POWER, CAP, BLOCK)
            # the whole row's sums, of kept and other ids, relative to the larger of their largest logits
            most = tl.maximum(top, top_k)
            down = top - most
            down_k = top_k - most
            lse = tl.log(total * tl.exp(down) + total_k * tl.exp(down_k))
            lse_t = tl.log(total_t * tl.exp(down / temperature) + total_k_t * tl.exp(down_k / temperature))
            lse_p = top_p + tl.log(total_p)
            rest = down / temperature + tl.log(total_t) - lse_t  # log of what the student gives the other ids
            share = tl.exp(rest)
            if TAIL:
                p_tail = tl.exp(tail - lse_p)
                share -= p_tail
                kl += tl.where(p_tail > 0, p_tail * (tail - lse_p - rest), 0.0)
            if GRADIENT:
                a = push * tl.exp(down - lse)
                b = tl.where(total_t > 0, pull * share / total_t, 0.0)
                tl.debug_barrier()
                _gradient(row, padded, vocabulary, scale, cap, temperature, top, a, b, push, label, POWER, CAP, BLOCK)
                tl.debug_barrier()
            for first in range(0, count, BLOCK_K):
                k, holds, token, weight = _kept(ids, high, values, first, count, quantum, temperature, HIGH, BLOCK_K)
                z = _logits(tl.load(kept_at + k, mask=holds, other=float("-inf")), scale, cap, CAP)
                logq = (z - most) / temperature - lse_t
                p = tl.exp(weight - lse_p)
                kl += tl.sum(tl.where(p > 0, p * (weight - lse_p - logq), 0.0), axis=0)
                if GRADIENT:
                    g = push * tl.exp(z - most - lse) + pull * (tl.exp(logq) - p)
                    g = tl.where(token == label, g - push, g)
                    if CAP:
                        g *= scale * (1 - (z / cap) * (z / cap))
                    tl.store(row + token, g.to(row.dtype.element_ty), mask=holds & (token < vocabulary))
        else:
            most, total, total_t = _sums(row, padded, vocabulary, scale, cap, temperature, 1, CAP, BLOCK)
            lse = tl.log(total)
            if GRADIENT:
                tl.debug_barrier()
                a = push / total
                _gradient(row, padded, vocabulary, scale, cap, temperature, most, a, 0.0, push, label, 1, CAP, BLOCK)
        ce = w * ((most - z_label) + lse)
        kl = w * kl
        loss = (1 - alpha) * ce + alpha * temperature * temperature * kl
    elif GRADIENT:
        for start in range(0, padded, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(row + cols, tl.zeros((BLOCK,), row.dtype.element_ty), mask=cols < padded)
    tl.store(sums + n, loss)
    tl.store(sums + rows + n, ce)
    tl.store(sums + 2 * rows + n, kl)


def chunk_loss(
    product: Tensor, rows: Rows, temperature: float, form: LogitTransform, gain: Tensor | None, gradient: bool
) -> Tensor:
    """[3]: the sums of loss, CE and KL over a chunk; with `gradient`, dloss/dproduct · gain overwrites the product.

    The product's rows must be ALIGNMENT apart, or a multiple; what lies between them is written too.
    """
    count, vocabulary = product.shape
    padded = product.stride(0)
    assert padded % ALIGNMENT == 0 and product.stride(1) == 1
    targets, device = rows.targets, product.device
    sums = torch.empty(3, count, device=device)
    ids = high = values = counts = rows.labels_N  # where there are no targets none is read, but all is compiled
    tails = kept_at = sums
    stride_k = 0
    if targets is not None:
        ids, values, counts = (x.contiguous() for x in (targets.ids_NK, targets.values_NK, targets.count_N))
        high = ids if targets.high_NK is None else targets.high_NK.contiguous()
        tails = sums if targets.tail_N is None else targets.tail_N.float().contiguous()
        stride_k = ids.shape[1]
        kept_at = torch.empty(count, stride_k, device=device)
    block, warps = WIDE if padded * product.itemsize > WIDE_BYTES else NARROW
    with torch.cuda.device_of(product):  # Triton launches on the current device
        ki_loss_rows[(count,)](
            product, padded, vocabulary, count, rows.labels_N.contiguous(), rows.weights_N, rows.alpha_N,
            product if gain is None else gain, ids, high, values, counts, tails, stride_k, kept_at,
            0.0 if targets is None else targets.quantum, temperature, form.scale, form.cap, sums,
            TAUGHT=targets is not None, HIGH=targets is not None and targets.high_NK is not None,
            TAIL=targets is not None and targets.tail_N is not None,
            POWER=int(temperature) if temperature in (1, 2) else 0, CAP=form.cap > 0, GAIN=gain is not None,
            GRADIENT=gradient, BLOCK=block, BLOCK_K=BLOCK_K, num_warps=warps,
        )  # fmt: skip
    return sums.sum(dim=1)
