"""The stream: data order as a pure function of (corpus, seed, sample).

Sample i of a corpus names a pair (sequence, view). With n sequences, i lies in epoch e = i // n; the sequence is
perm_e(i mod n), a pseudo-random permutation that costs O(1) memory (a Feistel network with cycle walking, Black and
Rogaway 2002); the view is e mod `views`. Several corpora are interleaved with low discrepancy, also by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ki_ds.corpus.hashing import counter_hash, derive_key, mix64

ROUNDS = 6
FINEST_SHARE = 1 << 15  # denominators of a mix's shares; with samples below 2^47 their products fit into int64
Samples = np.ndarray  # int64, any shape unless said otherwise


class Permutation:
    """A pseudo-random permutation of range(size), keyed, invertible, vectorised, without a table."""

    def __init__(self, size: int, key: int):
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got {size}")
        self.size = size
        self.half_bits = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
        self.mask = np.uint64((1 << int(self.half_bits)) - 1)
        self.keys = [int(k) for k in counter_hash(key, np.arange(ROUNDS))]

    def _pass(self, values: np.ndarray, inverse: bool) -> np.ndarray:
        left, right = values >> self.half_bits, values & self.mask
        with np.errstate(over="ignore"):
            for key in self.keys[::-1] if inverse else self.keys:
                if inverse:
                    left, right = right ^ (mix64(left + np.uint64(key)) & self.mask), left
                else:
                    left, right = right, left ^ (mix64(right + np.uint64(key)) & self.mask)
        return (left << self.half_bits) | right

    def _walk(self, values: Samples, inverse: bool) -> Samples:
        flat = np.asarray(values, dtype=np.int64).ravel()
        if flat.size and (flat.min() < 0 or flat.max() >= self.size):
            raise ValueError(f"values must lie in [0, {self.size})")
        result = self._pass(flat.astype(np.uint64), inverse)
        while len(outside := np.flatnonzero(result >= self.size)):  # under four passes on average
            result[outside] = self._pass(result[outside], inverse)
        return result.astype(np.int64).reshape(np.shape(values))

    def __call__(self, values: Samples) -> Samples:
        """Images of the values."""
        return self._walk(values, inverse=False)

    def inverse(self, values: Samples) -> Samples:
        """Preimages of the values."""
        return self._walk(values, inverse=True)


@dataclass(frozen=True)
class CorpusStream:
    """The endless stream over one corpus of `size` sequences."""

    size: int
    views: int
    seed: int
    corpus: str  # the corpus's content digest

    def permutation(self, epoch: int) -> Permutation:
        """The order of an epoch."""
        return Permutation(self.size, derive_key("order", self.seed, self.corpus, epoch))

    def pairs(self, samples: Samples) -> tuple[Samples, Samples]:
        """Samples [N] to (sequences [N], views [N])."""
        samples = np.asarray(samples, dtype=np.int64)
        epochs, places = np.divmod(samples, self.size)
        sequences = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            sequences[here] = self.permutation(int(epoch))(places[here])
        return sequences, epochs % self.views

    def first_samples(self, samples: Samples) -> Samples:
        """Where each sample's (sequence, view) pair stood in the first `views` epochs, the order of the targets."""
        samples = np.asarray(samples, dtype=np.int64)
        stored = samples.copy()
        late = samples >= self.views * self.size
        if late.any():
            sequences, views = self.pairs(samples[late])
            found = np.empty_like(sequences)
            for view in np.unique(views):
                here = views == view
                found[here] = view * self.size + self.permutation(int(view)).inverse(sequences[here])
            stored[late] = found
        return stored


class Mix:
    """A low-discrepancy interleave of weighted streams by arithmetic: sample -> (which stream, place in it).

    Stream 0 takes n_0(i) = floor((i·p + q/2) / q) of the first i samples (p/q its share of the whole); the rest is
    divided in the same way. Exact integers throughout: no drift at any sample below 2^47.
    """

    def __init__(self, weights: Sequence[float]):
        if not weights or min(weights) <= 0:
            raise ValueError("weights must be positive")
        self.shares = [
            Fraction(weights[i] / sum(weights[i:])).limit_denominator(FINEST_SHARE) for i in range(len(weights) - 1)
        ]
        if not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"a weight is less than about 1/{FINEST_SHARE} of the rest, too little to ever be read")

    def _count(self, share: Fraction, samples: Any) -> Any:
        return (samples * share.numerator + share.denominator // 2) // share.denominator

    def counts(self, sample: int) -> list[int]:
        """How many of the first `sample` samples fall to each stream."""
        counts, rest = [], sample
        for share in self.shares:
            here = self._count(share, rest)
            counts.append(here)
            rest -= here
        return [*counts, rest]

    def __call__(self, samples: Samples) -> tuple[Samples, Samples]:
        """Samples [N] to (stream index [N], place in that stream [N])."""
        places = np.array(samples, dtype=np.int64)
        streams = np.full(places.shape, len(self.shares), dtype=np.int64)
        open_ = np.ones(places.shape, dtype=bool)
        for index, share in enumerate(self.shares):
            before = self._count(share, places)
            chosen = open_ & (self._count(share, places + 1) > before)
            streams[chosen] = index
            places = np.where(chosen, before, np.where(open_, places - before, places))
            open_ &= ~chosen
        return streams, places
