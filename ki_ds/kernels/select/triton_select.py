# mypy: disallow-untyped-defs=False
"""The K largest logits of each row, and what the others weigh: a threshold instead of a sort.

N rows, V columns, K kept, T temperatures, x_NV the head's product in fp16, bf16 or fp32.

    z_nv    = scale · x_nv; or, capped, cap · tanh(scale · x_nv / cap)
    ids_NK  the columns of the K largest z, ties to the lowest; in rising order, and kept_NK their z
    rest_NT = Σ_{v not kept} exp((z_nv - max z_n) / τ_t)

One program a row, which it reads twice, in float32:

    1. Lane l takes the maximum over columns l, l + BLOCK, ...: K lanes lie at or above the K-th largest of these
       maxima, so K columns do, and seldom many more.
    2. The columns at or above that are listed in order, the exponentials of the others summed.
    3. The K-th largest of the listed is found by bisection, they are written, and what is left of them joins the sums.

A row of which the list cannot hold all (a thousand equal logits) is read whole in step 3. Floats are compared as
integers of the same order, so that bisection ends: after 32 steps at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ki_ds.kernels.device import soft_capped
from ki_ds.kernels.logit_transform import LogitTransform

LANES = 4096
TILE = 1024  # columns whose exponentials are summed at once
LISTED = 1024  # columns that a row's list holds at least; four times K where that is more
WARPS = 8
LOWEST = tl.constexpr(-(1 << 31))  # below the key of every number


@triton.jit
def _key(z):
    """int32 in the order of the floats, both zeros alike."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _read(row, listed, at, n, stride, scale, cap, CAP: tl.constexpr, LIST: tl.constexpr):
    """Column and logit at places of the list, or of the row itself; -inf from the n-th on."""
    if LIST:
        columns = tl.load(listed + at, mask=at < n, other=0)
        x = tl.load(row + columns, mask=at < n, other=0)
    else:
        columns = at
        x = tl.load(row + at, mask=at < stride, other=0)  # n has no known divisor, the stride has: a wide load
    z = x.to(tl.float32) * scale
    if CAP:
        z = soft_capped(z, cap)
    return columns, tl.where(at < n, z, float("-inf"))


@triton.jit
def _take(
    row, listed, n, threshold, ties, largest, inverse, ids, kept, room, stride, scale, cap,
    T: tl.constexpr, TILE: tl.constexpr, CAP: tl.constexpr, LIST: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write the columns above the threshold and the first `ties` at it, as far as there is room; how many these are,
    and the sums over the others."""
    rest = tl.zeros([T], tl.float32)
    above = 0
    equal = 0
    for start in range(0, n, TILE):
        at = start + tl.arange(0, TILE)
        columns, z = _read(row, listed, at, n, stride, scale, cap, CAP, LIST)
        key = tl.where(at < n, _key(z), LOWEST)
        more = (key > threshold).to(tl.int32)
        same = ((key == threshold) & (at < n)).to(tl.int32)
        both = tl.cumsum(more + (same << 16), 0)  # two sums in one; a tile is shorter than 2^15
        rank = equal + (both >> 16)
        take = (more > 0) | ((same > 0) & (rank <= ties))
        place = above + (both & 0xFFFF) + tl.minimum(rank, ties) - 1
        tl.store(ids + place, columns, mask=take & (place < room))
        if KEEP:
            tl.store(kept + place, z, mask=take & (place < room))
        below = tl.where(take, float("-inf"), z - largest)
        rest += tl.sum(tl.exp(below[None, :] * inverse[:, None]), axis=1)
        above += tl.sum(more, 0)
        equal += tl.sum(same, 0)
    return above + tl.minimum(equal, ties), rest


@triton.jit
def _finish(
    row, listed, n, low, high, K, largest, inverse, ids, kept, stride, scale, cap,
    T: tl.constexpr, TILE: tl.constexpr, CAP: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Write the K largest of n columns, of which K or more lie at or above the key `low`; the sums over the others."""
    above = 0  # columns beyond `high`
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        count = 0
        for start in range(0, n, TILE):
            at = start + tl.arange(0, TILE)
            _, z = _read(row, listed, at, n, stride, scale, cap, CAP, LIST)
            count += tl.sum(((_key(z) >= middle) & (at < n)).to(tl.int32), 0)
        # K of them: all are taken, and what lies above needs no count of its own
        above = tl.where(count < K, count, tl.where(count == K, 0, above))
        high = tl.where(count < K, middle - 1, tl.where(count == K, middle, high))
        low = tl.where(count < K, low, middle)
    _, rest = _take(
        row, listed, n, low, K - above, largest, inverse, ids, kept, K, stride, scale, cap, T, TILE, CAP, LIST, True
    )  # fmt: skip
    return rest


@triton.jit(do_not_specialize=["V", "K", "room", "scale", "cap"])
def select_kernel(
    x_ptr, inverse_ptr, listed_ptr, ids_ptr, kept_ptr, rest_ptr, stride, V, K, room, scale, cap,
    T: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One row; see the top of this file. `listed_ptr` is scratch, `room` columns a row."""
    n = tl.program_id(0).to(tl.int64)
    row = x_ptr + n * stride
    listed, ids, kept = listed_ptr + n * room, ids_ptr + n * K, kept_ptr + n * K
    inverse = tl.load(inverse_ptr + tl.arange(0, T))

    lanes = tl.full([BLOCK], LOWEST, tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, z = _read(row, listed, at, V, stride, scale, cap, CAP, False)
        lanes = tl.maximum(lanes, tl.where(at < V, _key(z), LOWEST))
    high = tl.max(lanes, 0)
    largest = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    low = tl.where(K <= BLOCK, tl.min(lanes, 0), LOWEST)
    end = tl.where(K <= BLOCK, high, LOWEST)
    while low < end:
        middle = (low | end) - ((low ^ end) >> 1)
        count = tl.sum((lanes >= middle).to(tl.int32), 0)
        end = tl.where(count < K, middle - 1, tl.where(count <= K + K // 8, middle, end))  # near enough
        low = tl.where(count < K, low, middle)

    found, rest = _take(
        row, listed, V, low, V, largest, inverse, listed, kept, room, stride, scale, cap, T, TILE, CAP, False, False
    )  # fmt: skip
    tl.debug_barrier()  # the list is read by other threads than wrote it
    if found <= room:
        rest += _finish(
            row, listed, found, low, high, K, largest, inverse, ids, kept, stride, scale, cap, T, TILE, CAP, True
        )  # fmt: skip
    else:
        rest = _finish(
            row, listed, V, low, high, K, largest, inverse, ids, kept, stride, scale, cap, T, TILE, CAP, False
        )  # fmt: skip
    tl.store(rest_ptr + n * T + tl.arange(0, T), rest)


def tile(temperatures: int) -> int:
    """Columns of a tile: fewer for more than two temperatures, so that no register is spilled."""
    return TILE if temperatures <= 2 else max(TILE // temperatures, 1)


def largest(
    product_NV: Tensor, k: int, temperatures: Sequence[float], logit_transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """int32 ids [N, K], rising; their float32 logits [N, K]; and the sums over the other ids [N, T].

    Args:
        product_NV: rows of a `logits_buffer`; what lies between its rows is read, and does not count.
    """
    rows, vocabulary = product_NV.shape
    padded = triton.next_power_of_2(len(temperatures))
    inverse = torch.tensor(
        [1 / t for t in temperatures] + [0.0] * (padded - len(temperatures)), device=product_NV.device
    )
    room = min(max(LISTED, 4 * k), vocabulary)
    listed, ids = (product_NV.new_empty(rows, n, dtype=torch.int32) for n in (room, k))
    kept, rest = (product_NV.new_empty(rows, n, dtype=torch.float32) for n in (k, padded))
    if rows:
        with torch.cuda.device_of(product_NV):  # Triton launches on the current device
            select_kernel[(rows,)](
                product_NV, inverse, listed, ids, kept, rest, product_NV.stride(0), vocabulary, k, room,
                float(logit_transform.scale), float(logit_transform.cap),
                T=padded, BLOCK=LANES, TILE=tile(padded), CAP=logit_transform.cap > 0, num_warps=WARPS,
            )  # fmt: skip
    return ids, kept, rest[:, : len(temperatures)]
