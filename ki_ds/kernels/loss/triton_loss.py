# mypy: disallow-untyped-defs=False
"""The loss of a chunk of logits and its gradient in one Triton kernel, one program a row.

Formulas and legend as in `reference.py` and `chunked.py`, whose driver calls `chunk_loss`. Of a row of V logits in the
inputs' type the kernel reads

    once      the K kept ids' products (into a scratch of K fp32 numbers); then -inf takes their place, so that all that
              follows sums over the rest alone and a tail needs no difference of nearly equal sums
    twice     the row: the rest's largest logit and sums in one pass, then, out of the L2 cache, the gradient over it

and writes the gradients of the K entries last. Targets are decoded in registers from their planes, K at most 128 at a
time. All arithmetic is fp32. No sum depends on the order in which programs run: two runs give the same bits. Nothing
but block sizes and the kind of target is a compile-time constant.

More letters: `teacher` is an entry's log weight at τ, before it is normalised by lse_p; _t is at τ, as in `chunked.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ki_ds.kernels.device import soft_capped
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
def _logit(x, scale, cap, CAP: tl.constexpr):
    """The logit of a product; -inf, which marks what is left out, stays."""
    z = x * scale
    if CAP:
        z = tl.where(x == float("-inf"), x, soft_capped(z, cap))
    return z


@triton.jit
def _load(row, cols, padded, vocabulary, scale, cap, CAP: tl.constexpr):
    """Logits at some columns. The row is padded to a width that vector loads like; what is there does not count."""
    x = tl.load(row + cols, mask=cols < padded, other=float("-inf")).to(tl.float32)
    return _logit(tl.where(cols < vocabulary, x, float("-inf")), scale, cap, CAP)


@triton.jit
def _exponentials(z, largest, temperature, POWER: tl.constexpr):
    """exp(z - largest) and exp((z - largest) / τ), for τ = 1 and 2 with one exponential."""
    if POWER == 1:
        e = tl.exp(z - largest)
        e_t = e
    elif POWER == 2:
        e_t = tl.exp((z - largest) * 0.5)
        e = e_t * e_t
    else:
        e = tl.exp(z - largest)
        e_t = tl.exp((z - largest) / temperature)
    return e, e_t


# ------------------------------------------------------------------------------------------------- a row, or its rest


@triton.jit
def _sum(row, padded, vocabulary, scale, cap, temperature, POWER: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of what a row holds; the sums of exp(z - largest) and of exp((z - largest) / τ)."""
    largest = LOWEST
    total = 0.0
    total_t = 0.0
    for start in range(0, padded, BLOCK):
        z = _load(row, start + tl.arange(0, BLOCK), padded, vocabulary, scale, cap, CAP)
        new = tl.maximum(largest, tl.max(z, axis=0))
        e, e_t = _exponentials(z, new, temperature, POWER)
        total = total * tl.exp(largest - new) + tl.sum(e, axis=0)
        if POWER != 1:
            total_t = total_t * tl.exp((largest - new) / temperature) + tl.sum(e_t, axis=0)
        largest = new
    if POWER == 1:
        total_t = total
    return largest, total, total_t


@triton.jit
def _write_gradient(
    row, padded, vocabulary, scale, cap, temperature, largest, a, b, w_ce, label,
    POWER: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a · exp(z - largest) + b · exp((z - largest) / τ), less w_ce at the label, over the row's logits."""
    for start in range(0, padded, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = _load(row, cols, padded, vocabulary, scale, cap, CAP)
        e, e_t = _exponentials(z, largest, temperature, POWER)
        g = a * e + b * e_t
        g = tl.where(cols == label, g - w_ce, g)
        if CAP:
            g = tl.where(z == float("-inf"), 0.0, g * (scale * (1 - (z / cap) * (z / cap))))
        tl.store(row + cols, g.to(row.dtype.element_ty), mask=cols < padded)


@triton.jit
def _write_zeros(row, padded, BLOCK: tl.constexpr):
    for start in range(0, padded, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(row + cols, tl.zeros((BLOCK,), row.dtype.element_ty), mask=cols < padded)


# ------------------------------------------------------------------------------------------------------- the kept ids


@triton.jit
def _entries(ids, high, values, first, count, quantum, temperature, HIGH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a run of entries: their places, which of them hold, their ids, and the teacher's log weights at τ."""
    k = first + tl.arange(0, BLOCK_K)
    holds = k < count
    token = tl.load(ids + k, mask=holds, other=0).to(tl.int32) & 0xFFFF
    if HIGH:
        token |= tl.load(high + k, mask=holds, other=0).to(tl.int32) << 16
    value = tl.load(values + k, mask=holds, other=0).to(tl.float32)
    if quantum == 0:  # counts
        teacher = tl.log(value)
    else:
        teacher = (value + STEP * tl.maximum(value - FINE_, 0.0)) * (-quantum / temperature)
    return k, holds, token, tl.where(holds, teacher, float("-inf"))


@triton.jit
def _set_aside(
    row, kept, ids, high, values, count, quantum, temperature, vocabulary, scale, cap,
    CAP: tl.constexpr, HIGH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Copy the kept ids' products to `kept`. Their largest logit, the teacher's largest log weight, and how many ids
    are no tokens."""
    kept_max = LOWEST
    teacher_max = LOWEST
    strange = 0
    for first in range(0, count, BLOCK_K):
        k, holds, token, teacher = _entries(ids, high, values, first, count, quantum, temperature, HIGH, BLOCK_K)
        x = tl.load(row + token, mask=holds & (token < vocabulary), other=float("-inf")).to(tl.float32)
        tl.store(kept + k, x, mask=holds)
        kept_max = tl.maximum(kept_max, tl.max(_logit(x, scale, cap, CAP), axis=0))
        teacher_max = tl.maximum(teacher_max, tl.max(teacher, axis=0))
        strange += tl.sum((holds & (token >= vocabulary)).to(tl.int32), axis=0)
    return kept_max, teacher_max, strange


@triton.jit
def _take_out(
    row, kept, ids, high, values, count, quantum, temperature, vocabulary, scale, cap, kept_max, teacher_max, total_p,
    POWER: tl.constexpr, CAP: tl.constexpr, HIGH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Put -inf in the kept ids' places. The sums over them of exp(z - kept_max) and exp((z - kept_max) / τ); and
    total_p, to which exp(teacher - teacher_max) is added."""
    total = 0.0
    total_t = 0.0
    for first in range(0, count, BLOCK_K):
        k, holds, token, teacher = _entries(ids, high, values, first, count, quantum, temperature, HIGH, BLOCK_K)
        tl.store(row + token, float("-inf"), mask=holds & (token < vocabulary))
        z = _logit(tl.load(kept + k, mask=holds, other=float("-inf")), scale, cap, CAP)
        e, e_t = _exponentials(z, kept_max, temperature, POWER)
        total += tl.sum(e, axis=0)
        total_t += tl.sum(e_t, axis=0)
        total_p += tl.sum(tl.exp(teacher - teacher_max), axis=0)
    return total, total_t, total_p


@triton.jit
def _finish_kept(
    row, kept, ids, high, values, count, quantum, temperature, vocabulary, scale, cap,
    row_max, lse, lse_t, lse_p, w_ce, w_kl, label, kl,
    CAP: tl.constexpr, HIGH: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the kept ids' divergence to `kl`, which comes back; with GRADIENT, write theirs."""
    for first in range(0, count, BLOCK_K):
        k, holds, token, teacher = _entries(ids, high, values, first, count, quantum, temperature, HIGH, BLOCK_K)
        z = _logit(tl.load(kept + k, mask=holds, other=float("-inf")), scale, cap, CAP)
        logq = (z - row_max) / temperature - lse_t
        p = tl.exp(teacher - lse_p)
        kl += tl.sum(tl.where(p > 0, p * (teacher - lse_p - logq), 0.0), axis=0)
        if GRADIENT:
            g = w_ce * tl.exp(z - row_max - lse) + w_kl * (tl.exp(logq) - p)
            g = tl.where(token == label, g - w_ce, g)
            if CAP:
                g *= scale * (1 - (z / cap) * (z / cap))
            tl.store(row + token, g.to(row.dtype.element_ty), mask=holds & (token < vocabulary))
    return kl


# ------------------------------------------------------------------------------------------------------ the two losses


@triton.jit
def _taught(
    row, padded, vocabulary, label, w_ce, w_kl, kept, ids, high, values, count, tail_at, quantum, temperature,
    scale, cap,
    HIGH: tl.constexpr, TAIL: tl.constexpr, POWER: tl.constexpr, CAP: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """row_max, lse and KL of a row with a target; with GRADIENT, its gradient over its product."""
    kept_max, teacher_max, strange = _set_aside(
        row, kept, ids, high, values, count, quantum, temperature, vocabulary, scale, cap, CAP, HIGH, BLOCK_K
    )  # fmt: skip
    tail = float("-inf")
    if TAIL:  # not before: registers are few
        tail = tl.load(tail_at)
        teacher_max = tl.maximum(teacher_max, tail)
    w_kl = tl.where(strange > 0, float("nan"), w_kl)
    kl = tl.where(strange > 0, float("nan"), 0.0)
    tl.debug_barrier()  # all threads have read before any writes
    kept_total, kept_total_t, total_p = _take_out(
        row, kept, ids, high, values, count, quantum, temperature, vocabulary, scale, cap, kept_max, teacher_max,
        tl.exp(tail - teacher_max), POWER, CAP, HIGH, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    rest_max, rest_total, rest_total_t = _sum(row, padded, vocabulary, scale, cap, temperature, POWER, CAP, BLOCK)
    # the whole row's sums, relative to its largest logit
    row_max = tl.maximum(rest_max, kept_max)
    rest_down = rest_max - row_max
    kept_down = kept_max - row_max
    lse = tl.log(rest_total * tl.exp(rest_down) + kept_total * tl.exp(kept_down))
    lse_t = tl.log(rest_total_t * tl.exp(rest_down / temperature) + kept_total_t * tl.exp(kept_down / temperature))
    lse_p = teacher_max + tl.log(total_p)
    logq_rest = rest_down / temperature + tl.log(rest_total_t) - lse_t
    excess = tl.exp(logq_rest)
    if TAIL:
        p_tail = tl.exp(tail - lse_p)
        excess -= p_tail
        kl += tl.where(p_tail > 0, p_tail * (tail - lse_p - logq_rest), 0.0)
    if GRADIENT:
        a = w_ce * tl.exp(rest_down - lse)
        b = tl.where(rest_total_t > 0, w_kl * excess / rest_total_t, 0.0)
        tl.debug_barrier()
        _write_gradient(
            row, padded, vocabulary, scale, cap, temperature, rest_max, a, b, w_ce, label, POWER, CAP, BLOCK
        )  # fmt: skip
        tl.debug_barrier()
    kl = _finish_kept(
        row, kept, ids, high, values, count, quantum, temperature, vocabulary, scale, cap,
        row_max, lse, lse_t, lse_p, w_ce, w_kl, label, kl, CAP, HIGH, GRADIENT, BLOCK_K,
    )  # fmt: skip
    return row_max, lse, kl


@triton.jit
def _untaught(
    row, padded, vocabulary, label, w_ce, temperature, scale, cap,
    CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """row_max and lse of a row of cross-entropy alone; with GRADIENT, its gradient over its product."""
    row_max, total, _ = _sum(row, padded, vocabulary, scale, cap, temperature, 1, CAP, BLOCK)
    if GRADIENT:
        tl.debug_barrier()
        _write_gradient(
            row, padded, vocabulary, scale, cap, temperature, row_max, w_ce / total, 0.0, w_ce, label, 1, CAP, BLOCK
        )  # fmt: skip
    return row_max, tl.log(total)


@triton.jit(do_not_specialize=["rows", "stride_k", "vocabulary"])
def ki_loss_rows(
    product, padded, vocabulary, rows, labels, alphas, ids, high, values, counts, tails, stride_k, kept,
    quantum, temperature, scale, cap, factor, sums,
    TAUGHT: tl.constexpr, HIGH: tl.constexpr, TAIL: tl.constexpr, POWER: tl.constexpr, CAP: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loss, CE and KL of a row into sums [3, rows]; with GRADIENT, dloss/dproduct · gain over its product."""
    n = tl.program_id(0).to(tl.int64)
    row = product + n * padded
    label = tl.load(labels + n)
    alpha = 0.0
    if TAUGHT:
        alpha = tl.load(alphas + n)
    loss = 0.0
    ce = 0.0
    kl = 0.0
    if label >= 0:
        # a label or an id that is no token makes the loss and the row's gradient not a number
        x_label = tl.load(row + label, mask=label < vocabulary, other=float("nan")).to(tl.float32)
        z_label = _logit(x_label, scale, cap, CAP)
        w_ce = tl.where(label < vocabulary, factor * (1 - alpha), float("nan"))
        if alpha > 0:
            at = n * stride_k
            count = tl.minimum(tl.load(counts + n).to(tl.int32), stride_k)
            row_max, lse, kl = _taught(
                row, padded, vocabulary, label, w_ce, factor * alpha * temperature, kept + at, ids + at, high + at,
                values + at, count, tails + n, quantum, temperature, scale, cap,
                HIGH, TAIL, POWER, CAP, GRADIENT, BLOCK, BLOCK_K,
            )  # fmt: skip
        else:
            row_max, lse = _untaught(
                row, padded, vocabulary, label, w_ce, temperature, scale, cap, CAP, GRADIENT, BLOCK
            )  # fmt: skip
        ce = (row_max - z_label) + lse
        loss = (1 - alpha) * ce + alpha * temperature * temperature * kl
    elif GRADIENT:
        _write_zeros(row, padded, BLOCK)
    tl.store(sums + n, loss)
    tl.store(sums + rows + n, ce)
    tl.store(sums + 2 * rows + n, kl)


def chunk_loss(
    product_NV: Tensor, rows: Rows, temperature: float, logit_transform: LogitTransform, gain: float, gradient: bool
) -> Tensor:
    """[3, N]: loss, CE and KL of a chunk's rows; with `gradient`, dloss/dproduct · gain overwrites the product.

    The product's rows must be ALIGNMENT apart, or a multiple; what lies between them is written too.
    """
    count, vocabulary = product_NV.shape
    padded = product_NV.stride(0)
    assert padded % ALIGNMENT == 0 and product_NV.stride(1) == 1
    targets, device = rows.targets, product_NV.device
    sums = torch.empty(3, count, device=device)
    ids = high = values = counts = rows.labels_N  # where there are no targets none is read, but all is compiled
    tails = kept = sums
    stride_k = 0
    if targets is not None:
        ids, values, counts = (x.contiguous() for x in (targets.ids_NK, targets.values_NK, targets.count_N))
        high = ids if targets.high_NK is None else targets.high_NK.contiguous()
        tails = sums if targets.tail_N is None else targets.tail_N.float().contiguous()
        stride_k = ids.shape[1]
        kept = torch.empty(count, stride_k, device=device)
    scale, cap = float(logit_transform.scale), float(logit_transform.cap)
    block, warps = WIDE if padded * product_NV.itemsize > WIDE_BYTES else NARROW
    with torch.cuda.device_of(product_NV):  # Triton launches on the current device
        ki_loss_rows[(count,)](
            product_NV, padded, vocabulary, count, rows.labels_N.contiguous(), rows.alpha_N,
            ids, high, values, counts, tails, stride_k, kept,
            0.0 if targets is None else targets.quantum, float(temperature), scale, cap,  # a whole one compiles anew
            gain * (1.0 if cap else scale), sums,
            TAUGHT=targets is not None, HIGH=targets is not None and targets.high_NK is not None,
            TAIL=targets is not None and targets.tail_N is not None,
            POWER=int(temperature) if temperature in (1, 2) else 0, CAP=cap > 0,
            GRADIENT=gradient, BLOCK=block, BLOCK_K=BLOCK_K, num_warps=warps,
        )  # fmt: skip
    return sums
