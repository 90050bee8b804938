"""From kept log-probabilities, or counts of draws, to packed planes: the only packer, on whatever device they are.

N (or n) rows, K kept ids a row. What a value is, `ki_ds.targets.quanta` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ki_ds.targets.codec import Codec, Planes, concatenate
from ki_ds.targets.quanta import LARGEST, nats_below, nearest_values
from ki_ds.targets.scalars import Scalar

AT_ONCE = 1 << 18  # entries of arrays that are packed at once


@dataclass(frozen=True)
class Predictions:
    """Packed predictions (`ki_ds.targets.codec.Planes`, `PackedTargets`) as tensors of one device; nats."""

    ids_NK: Tensor  # int16, the low 16 bits; rising within a row, 0 where an entry does not hold
    high_NK: Tensor | None  # uint8, the bits above; None where the vocabulary fits in 16 bits
    values_NK: Tensor  # uint8, how far below the row's most probable id; or counts
    count_N: Tensor  # int32, entries that hold
    scalars: dict[Scalar, Tensor]  # float32 [N]
    distortion_N: Tensor  # float32, KL(original ‖ decoded) over the kept entries; the largest over the temperatures

    def on_host(self, copy: Callable[[Tensor], Tensor]) -> Predictions:
        """The same by a way of copying."""
        high = None if self.high_NK is None else copy(self.high_NK)
        ids, values, count, lost = (copy(x) for x in (self.ids_NK, self.values_NK, self.count_N, self.distortion_N))
        return Predictions(ids, high, values, count, {name: copy(x) for name, x in self.scalars.items()}, lost)


@dataclass(frozen=True)
class Selected:
    """Kept ids and what is said of them; scalars in nats."""

    ids_NK: Tensor  # int64
    given_NK: Tensor  # float32 log-probabilities less the row's largest, -inf where none holds; or int64 counts
    scalars: dict[Scalar, Tensor]  # float32 [N]


def pack(found: Selected, k: int, quantum: float, temperatures: Sequence[float], wide: bool) -> Predictions:
    """Packed rows of K entries, of which no more than K hold; with a high plane where `wide`.

    Args:
        quantum: nats; 0: what is given are counts.
        temperatures: where the distortion is measured.
    """
    if quantum == 0:
        kept, values = found.given_NK > 0, found.given_NK
        distortion_N = values.new_zeros(len(values), dtype=torch.float32)
    else:
        kept = torch.isfinite(found.given_NK)
        values, distortion_N = quantise(found.given_NK, kept, quantum, temperatures)
    # a row in one sort: words of id and value; what does not hold comes last
    words = ((found.ids_NK << 8) | values).masked_fill(~kept, torch.iinfo(torch.int64).max).sort(dim=1).values[:, :k]
    words = torch.nn.functional.pad(words, (0, k - words.shape[1]))  # where fewer were given
    count_N = kept.sum(dim=1)
    words = words.masked_fill(torch.arange(k, device=words.device) >= count_N[:, None], 0)
    ids = words >> 8
    high = (ids >> 16).to(torch.uint8) if wide else None
    return Predictions(
        ids.to(torch.int16), high, (words & 0xFF).to(torch.uint8), count_N.to(torch.int32), found.scalars, distortion_N
    )


def quantise(below_NK: Tensor, kept_NK: Tensor, quantum: float, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """int64 [N, K] values; float32 [N] KL(original ‖ decoded) in nats, the largest over the temperatures.

    Args:
        below_NK: log-probabilities less the row's largest, in nats; looked at only where `kept_NK`.
    """
    below = torch.where(kept_NK, -below_NK, 0)
    values = nearest_values(below, quantum)
    decoded = nats_below(values, quantum)
    distortion_N = below.new_zeros(len(below))
    # KL = Σ p·d + log(Σ exp(-b) / Σ exp(-a)) for a = below, b = decoded, d = b - a; without cancellation
    for temperature in temperatures:
        weight, found = ((x * (-1 / temperature)).exp() * kept_NK for x in (below, decoded))
        total = weight.sum(dim=1).clamp(min=1e-30)  # a row without entries
        moved = (weight * (decoded - below)).sum(dim=1) / (total * temperature)
        distortion_N = torch.maximum(distortion_N, ((found - weight).sum(dim=1) / total).log1p() + moved)
    return values.long(), distortion_N


def planes_of(found: Predictions, how: Codec) -> Planes:
    """Predictions on the host, as they are stored.

    Raises:
        ValueError: a scalar is not a number.
    """
    ids, values, count = (x.cpu().numpy() for x in (found.ids_NK, found.values_NK, found.count_N))
    high = None if found.high_NK is None else found.high_NK.cpu().numpy()
    scalars = how.store({scalar: x.cpu().numpy() for scalar, x in found.scalars.items()}, len(ids))
    return Planes(ids.view(np.uint16), high, values, count.astype(np.uint16), scalars)


def pack_arrays(
    how: Codec, ids_nK: np.ndarray, given_nK: np.ndarray, scalars: Mapping[Scalar, np.ndarray]
) -> tuple[Planes, np.ndarray]:
    """Pack rows of distinct ids, in any order, that were predicted elsewhere.

    Args:
        ids_nK: integers below the vocabulary.
        given_nK: log-probabilities in nats, where -inf leaves an entry out; or counts, where 0 does.
        scalars: float [n] nats for each of the codec's.

    Returns:
        The planes, and float32 [n] KL(original ‖ decoded) in nats, both renormalised over the kept entries, at that of
        the codec's temperatures where it is largest.

    Raises:
        ValueError: a scalar, or a log-probability, is not a number; a count is above 255; more than K entries hold.
    """
    if how.counts:
        if given_nK.size and (given_nK.max() > LARGEST or given_nK.min() < 0):
            raise ValueError(f"a count of {given_nK.max()}: expected 0 to {LARGEST}")
        kept = given_nK > 0
        given: np.ndarray = given_nK.astype(np.int64)
    else:
        logp = given_nK.astype(np.float32)
        kept = np.isfinite(logp)
        if not (kept | np.isneginf(logp)).all():
            raise ValueError("a log-probability is not a number")
        first = logp.max(axis=1, keepdims=True, initial=-np.inf)
        given = logp - np.where(np.isfinite(first), first, np.float32(0))
    most = int(kept.sum(axis=1).max(initial=0))
    if most > how.k:
        raise ValueError(f"a row of {most} entries, more than K = {how.k}")
    parts, distortion = [], []
    size = max(AT_ONCE // max(given.shape[1], 1), 1)
    for start in range(0, max(len(given), 1), size):
        here = slice(start, start + size)
        numbers = {scalar: torch.from_numpy(np.array(scalars[scalar][here], np.float64)) for scalar in how.scalars}
        chosen = Selected(torch.from_numpy(ids_nK[here].astype(np.int64)), torch.from_numpy(given[here]), numbers)
        found = pack(chosen, how.k, how.quantum, how.temperatures, how.vocabulary > 1 << 16)
        parts.append(planes_of(found, how))
        distortion.append(found.distortion_N.numpy())
    return concatenate(parts), np.concatenate(distortion)
