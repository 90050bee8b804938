"""The teacher's side: from hidden states and a head to packed predictions, without leaving the device.

N rows, D hidden size, V vocabulary, K kept ids, T temperatures.

    top_k    the K most probable ids
    top_p    of these, the smallest set that reaches mass p
    sampled  ids drawn with replacement from softmax(z / τ), as counts: unbiased where the other two are not
             (Anshumann et al. 2025, "Sparse logit sampling")

Ties go to the lowest ids. Everything is counted from the row's largest logit, z_first: of the ids that are not kept
rest_nt = Σ exp((z_v - z_first) / τ_t) is summed, which needs no subtraction; what is below fp32's smallest number is 0.
Computes in float32 (masses of top_p and cumulated masses of draws in float64), never writes its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ki_ds.kernels.dispatch import Impl, choose
from ki_ds.kernels.logit_transform import IDENTITY, LogitTransform, head, logits_buffer, multiply
from ki_ds.kernels.select.pack import Predictions, Selected, pack
from ki_ds.targets.quanta import LARGEST
from ki_ds.targets.scalars import Scalar, scalars_of, stored
from ki_ds.targets.selection import Selection

LOGIT_BYTES = {"chunked": 64 << 20, "triton": 128 << 20}  # of logits at once
CACHED_BYTES = 4 << 20  # of these, what a CPU selects from at once, so that it stays in the cache
GROUP = 32  # consecutive ids of which only the largest logit is looked at first
BLOCK = 256  # consecutive ids whose mass is cumulated as one


def select_targets(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    selection: Selection,
    quantum: float,
    temperatures: Sequence[float] = (),
    uniforms_NK: Tensor | None = None,
    *,
    vocabulary: int | None = None,
    logit_transform: LogitTransform = IDENTITY,
    impl: Impl = "auto",
) -> Predictions:
    """What is kept of a model's predictions, packed.

    Args:
        hidden_ND: what the language-model head is applied to, one a row.
        weight_VD, bias_V: the head; the bias may be None.
        labels_N: int64, the true token; the truth of an id outside the vocabulary is NaN.
        quantum: nats, of the values; 0 for `sampled`.
        temperatures: where the tail's weight and the distortion are wanted, beside 1.
        uniforms_NK: float64 in [0, 1), one for each draw; for `sampled` only.
        vocabulary: rows of the head that tokens belong to; None: all.
        logit_transform: what the model makes of the head's product.
        impl: `reference` (all logits at once), `chunked`, `triton` (its kernel serves top_k and top_p; draws are the
            chunked ones, on the device), or `auto`.

    Returns:
        Planes of K = min(selection.k, V) entries. Where a logit is NaN or infinite, or all are -inf, the truth is NaN;
        -inf forbids an id.

    Raises:
        ValueError: arguments that do not fit together, or an implementation that cannot run here.
    """
    weight_VD, bias_V = head(weight_VD, bias_V, vocabulary)
    rows, vocabulary = len(hidden_ND), len(weight_VD)
    _check(hidden_ND, weight_VD, bias_V, labels_N, selection, quantum, temperatures, uniforms_NK)
    logit_transform.check()
    how = choose("select_targets", impl, hidden_ND.device, hidden_ND.dtype)
    temperatures = sorted({1.0, *temperatures})
    at_once = rows if how == "reference" else LOGIT_BYTES[how] // (vocabulary * hidden_ND.itemsize)
    parts: list[Selected] = []
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        buffer_NV = logits_buffer(min(rows, max(at_once, 1)), vocabulary, hidden_ND)
        for chunk in _slices(rows, at_once):
            labels, uniforms = labels_N[chunk], None if uniforms_NK is None else uniforms_NK[chunk]
            product_NV = buffer_NV[: len(labels)]
            multiply(hidden_ND[chunk], weight_VD, bias_V, product_NV)
            if how == "triton" and not selection.counts:
                parts.append(_select_triton(product_NV, labels, selection, temperatures, logit_transform))
                continue
            for here in _slices(len(labels), _eager_rows(how, vocabulary, selection, hidden_ND)):
                part, drawn = logit_transform.of(product_NV[here].float()), None if uniforms is None else uniforms[here]
                parts.append(select(part, labels[here], selection, temperatures, drawn))
        return pack(_joined(parts), min(selection.k, vocabulary), quantum, temperatures, vocabulary > 1 << 16)


def _check(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    selection: Selection,
    quantum: float,
    temperatures: Sequence[float],
    uniforms_NK: Tensor | None,
) -> None:
    sampled = selection.counts
    if selection.kind not in ("top_k", "top_p", "sampled"):
        raise ValueError(f"a selection {selection.kind!r}; expected top_k, top_p or sampled")
    if not all(0 < t < math.inf for t in (*temperatures, selection.temperature)):
        raise ValueError(f"temperatures {[*temperatures, selection.temperature]}; expected finite ones above 0")
    for name, found, shape in (("weight", weight_VD, weight_VD.shape), ("bias", bias_V, weight_VD.shape[:1])):
        if found is not None and (found.dtype != hidden_ND.dtype or found.shape != shape or not len(found)):
            expected = f"expected {hidden_ND.dtype}, the hidden states' type, and {tuple(shape)}, one row or more"
            raise ValueError(f"the head's {name} is {found.dtype} of shape {tuple(found.shape)}; {expected}")
    if len(labels_N) != len(hidden_ND):
        raise ValueError(f"labels has {len(labels_N)} rows, hidden states {len(hidden_ND)}")
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden size {hidden_ND.shape[1]}, but the head takes {weight_VD.shape[1]}")
    if not 0 <= quantum <= 1 or (quantum == 0) != sampled:
        raise ValueError(f"a quantum of {quantum} nats for {selection.kind}: expected 0 for sampled, else up to 1")
    if selection.k < 1 or (sampled and selection.k > LARGEST):
        raise ValueError(f"{selection.kind}: k = {selection.k}; expected 1 or more, and at most {LARGEST} draws")
    drawn = (len(hidden_ND), selection.k)
    if sampled and (uniforms_NK is None or uniforms_NK.shape != drawn or uniforms_NK.dtype != torch.float64):
        raise ValueError(f"sampled: expected float64 uniforms of shape {drawn}")


def _eager_rows(impl: str, vocabulary: int, selection: Selection, hidden_ND: Tensor) -> int:
    """Rows of a chunk that torch selects from at once; each draw looks into a block of its own, in float64."""
    if impl == "reference":
        return len(hidden_ND)
    width = max(vocabulary, 4 * BLOCK * selection.k) if selection.counts else vocabulary
    return (LOGIT_BYTES[impl] if hidden_ND.is_cuda else CACHED_BYTES) // (4 * width)


def _slices(rows: int, size: int) -> Iterator[slice]:
    """Runs of so many rows, at least one; an empty one where there are none."""
    size = max(size, 1)
    return (slice(start, start + size) for start in range(0, max(rows, 1), size))


def _joined(parts: list[Selected]) -> Selected:
    """Rows one after the other."""
    scalars = {name: torch.cat([part.scalars[name] for part in parts]) for name in parts[0].scalars}
    return Selected(torch.cat([p.ids_NK for p in parts]), torch.cat([p.given_NK for p in parts]), scalars)


# ---------------------------------------------------------------------------------------------------------- selection


def select(
    logits_NV: Tensor,
    labels_N: Tensor,
    selection: Selection,
    temperatures: Sequence[float] = (),
    uniforms_NK: Tensor | None = None,
) -> Selected:
    """Select ids of each row, with the scalars that `scalars_of` lists; arguments as in `select_targets`.

    The tail at τ: log Σ_{v not kept} exp((log p_v - log p_first) / τ), from which tempered probabilities follow.
    """
    logits = logits_NV.float()
    truth_N = _of_label(logits, labels_N)
    if selection.counts:
        assert uniforms_NK is not None
        ids, counts = draw(logits, uniforms_NK, selection.temperature)
        total_N = logits.logsumexp(dim=1)
        truth_N = (truth_N - total_N).masked_fill(~torch.isfinite(total_N), torch.nan)  # an infinite logit gives -inf
        return Selected(ids, counts, {"truth": truth_N})
    temperatures = sorted({1.0, *temperatures})
    ids = top_k(logits, min(selection.k, logits.shape[1]))
    kept_NK = logits.gather(1, ids)
    others_NV = (logits - kept_NK[:, :1]).scatter_(1, ids, -torch.inf)
    sums: list[Tensor] = []
    weight, last = others_NV, 0.0
    for temperature in reversed(temperatures):
        # a square costs less than an exponential
        weight = weight.square_() if last == 2 * temperature else (others_NV * (1 / temperature)).exp_()
        last = temperature
        sums.insert(0, weight.sum(dim=1))
    return _selected(ids, kept_NK, torch.stack(sums, dim=1), truth_N, selection, temperatures)


def _select_triton(
    product_NV: Tensor,
    labels_N: Tensor,
    selection: Selection,
    temperatures: Sequence[float],
    logit_transform: LogitTransform,
) -> Selected:
    """The same, of the head's product in a `logits_buffer`."""
    from ki_ds.kernels.select.triton_select import largest

    k = min(selection.k, product_NV.shape[1])
    ids_NK, kept_NK, rest_NT = largest(product_NV, k, temperatures, logit_transform)
    truth_N = logit_transform.of(_of_label(product_NV, labels_N).float())
    return _selected(ids_NK.long(), kept_NK, rest_NT, truth_N, selection, temperatures)


def _of_label(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """[N]; NaN where there is no such id."""
    last = logits_NV.shape[1] - 1
    found = logits_NV.gather(1, labels_N.clamp(0, last)[:, None]).squeeze(1)
    return found.masked_fill((labels_N < 0) | (labels_N > last), torch.nan)


def _selected(
    ids_NK: Tensor,
    kept_NK: Tensor,
    rest_NT: Tensor,
    truth_N: Tensor,
    selection: Selection,
    temperatures: Sequence[float],
) -> Selected:
    """From kept logits, in any order, and the sums over the other ids."""
    first_N = kept_NK.amax(dim=1)
    below_NK = kept_NK - first_N[:, None]
    total_N = (rest_NT[:, list(temperatures).index(1.0)] + below_NK.exp().sum(dim=1)).log()
    if selection.kind == "top_p":
        # by id, then stably by falling logit
        ids_NK, order = ids_NK.sort(dim=1)
        below_NK, order = below_NK.gather(1, order).sort(dim=1, descending=True, stable=True)
        ids_NK = ids_NK.gather(1, order)
        logp_NK = nucleus(below_NK - total_N[:, None], selection.p)
        cut_NK = below_NK.masked_fill(torch.isfinite(logp_NK), -torch.inf)
        rest_NT = rest_NT + torch.stack([(cut_NK * (1 / t)).exp().sum(dim=1) for t in temperatures], dim=1)
        below_NK = below_NK.masked_fill(torch.isneginf(logp_NK), -torch.inf)
    scalars: dict[Scalar, Tensor] = {"first": -total_N, "truth": truth_N - first_N - total_N}
    scalars |= zip(map(stored, temperatures), rest_NT.log().unbind(dim=1), strict=True)
    return Selected(ids_NK, below_NK, {scalar: scalars[scalar] for scalar in scalars_of(selection, temperatures)})


def top_k(logits_NV: Tensor, k: int) -> Tensor:
    """int64 [N, K]: the ids of the K largest logits, in falling order, ties by rising id.

    The K groups of consecutive ids whose largest logits are largest, again with ties to the lowest, hold them all.
    """
    rows, vocabulary = logits_NV.shape
    groups = vocabulary // GROUP
    ids = torch.arange(vocabulary, device=logits_NV.device)
    if groups <= k:
        return _order(logits_NV, ids).topk(k, dim=1).values.bitwise_not() & 0xFFFFFFFF
    maxima = logits_NV[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(dim=2)
    chosen = _order(maxima, ids[:groups]).topk(k, dim=1).values.bitwise_not() & 0xFFFFFFFF
    within = (chosen[:, :, None] * GROUP + ids[:GROUP]).flatten(1)
    within = torch.cat([within, ids[groups * GROUP :].expand(rows, -1)], dim=1)
    return _order(logits_NV.gather(1, within), within).topk(k, dim=1).values.bitwise_not() & 0xFFFFFFFF


def _order(values: Tensor, ids: Tensor) -> Tensor:
    """int64 that rise with a float32 and, both zeros being alike, fall with the id; its complement's low half."""
    bits = (values + 0.0).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (ids ^ 0xFFFFFFFF)


def nucleus(logp_NK: Tensor, p: float) -> Tensor:
    """Log-probabilities in falling order, -inf behind the smallest set that reaches mass p; all where none does."""
    if p >= 1:  # rounded sums reach 1 too early
        return logp_NK
    mass = logp_NK.double().exp()  # in float64, so that how a device orders its sums decides nothing
    before = mass.cumsum(dim=1) - mass
    keep = before < p
    keep[:, 0] = True
    return logp_NK.masked_fill(~keep, -torch.inf)


def draw(logits_NV: Tensor, uniforms_NK: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """K draws a row from softmax(logits / τ) by its inverse distribution function: rising ids [N, K] and counts [N, K],
    which are 0 behind the last distinct id. Cumulated over blocks of ids first, then within the blocks that are hit."""
    rows, vocabulary = logits_NV.shape
    blocks = -(-vocabulary // BLOCK)
    weights = logits_NV.new_zeros(rows, blocks * BLOCK)
    torch.sub(logits_NV, logits_NV.amax(dim=1, keepdim=True), out=weights[:, :vocabulary])
    weights[:, :vocabulary].mul_(1 / temperature).exp_()
    weights = weights.unflatten(1, (blocks, BLOCK))
    ends = weights.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    at = torch.minimum(uniforms_NK * ends[:, -1:], _under(ends[:, -1:]))
    block = torch.searchsorted(ends, at, right=True).clamp(max=blocks - 1)  # beyond it only where a logit is NaN
    at = at - torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    mass = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).double().cumsum(dim=2)
    # an id of probability 0 is never the first whose cumulated mass exceeds a number below the sum of all
    at = torch.minimum(at[:, :, None], _under(mass[:, :, -1:]))
    drawn = (block * BLOCK + torch.searchsorted(mass, at, right=True).squeeze(2)).clamp(max=vocabulary - 1)
    drawn = drawn.sort(dim=1).values
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(dim=1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))
    return torch.zeros_like(drawn).scatter_(1, place, drawn), counts


def _under(x: Tensor) -> Tensor:
    """The next smaller number."""
    return x.nextafter(torch.zeros_like(x))
