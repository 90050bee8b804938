"""Packed planes of teacher predictions, and their form on disk (FORMAT.md).

n rows, K kept ids a row, S scalars, E entries that hold in all.

In memory a target is planes of small integers that the loss reads as they are: ids, rising, in a 16-bit plane (and an
8-bit plane above it where the vocabulary needs it); and beside each id how far its log-probability lies below
the row's largest (or, for sampled targets, how often it was drawn). Rounding to the nearest quantum q costs at most
about q²/24 nats of KL in the mean and q²/8 in any row. From 192 quanta down on, where probabilities are below e^-11 of
the row's largest and count at high temperatures only, values go in steps of 8 quanta: the last is 696 quanta down.

On disk rows are ragged and every id is its distance from the one before it: of a set of K ids only log₂(V choose K)
bits are left, and their order by probability is not stored twice.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

LARGEST = 255  # of the values plane
FINE, COARSE = 192, 8  # up to FINE a value is a quantum, from there on COARSE quanta
NAT = 256  # units of a scalar in a nat
MINUS_INFINITY = -(1 << 15)  # the scalar that says so
CACHED = 1 << 15  # entries quantised at once, so that they stay in the cache
LEVEL = 1  # of zstd: the planes hold no repetitions worth a search, only skewed bytes
VALUES = ("log-probability", "count")
KEYS = {"vocabulary", "k", "values", "quantum", "scalars"}


QUANTA = np.arange(LARGEST + 1) + (COARSE - 1) * np.maximum(np.arange(LARGEST + 1) - FINE, 0)  # of each value
QUANTA.flags.writeable = False


def quantum(mean_nats: float, lowest_temperature: float = 1.0) -> float:
    """The largest quantum q, a multiple of 1/1024 nat, with q²/24 ≤ four fifths of the bound on the mean KL; the rest
    is for the scatter of small shards. At a temperature τ the divergence is q²/24τ².

    Raises:
        ValueError: the bound is so tight that no quantum meets it.
    """
    steps = math.floor(1024 * min(lowest_temperature, 1.0) * math.sqrt(24 * 0.8 * mean_nats))
    if steps < 1:
        raise ValueError(f"a mean distortion of {mean_nats:g} nats is below what the smallest quantum, 1/1024, gives")
    return steps / 1024


@dataclass(frozen=True)
class Planes:
    """Targets of n rows."""

    ids_nK: np.ndarray  # uint16, low bits; rising within a row; 0 where an entry does not hold
    high_nK: np.ndarray | None  # uint8, bits above 16
    values_nK: np.ndarray  # uint8: index of QUANTA below the row's first id, or a count; 0 where none holds
    count_n: np.ndarray  # uint16, entries that hold
    scalars_Sn: np.ndarray  # int16, in 1/256 nat

    def __len__(self) -> int:
        return len(self.count_n)

    def rows(self, rows: slice) -> Planes:
        """A run of rows, without copying."""
        high = None if self.high_nK is None else self.high_nK[rows]
        return Planes(self.ids_nK[rows], high, self.values_nK[rows], self.count_n[rows], self.scalars_Sn[:, rows])

    def kept(self) -> np.ndarray:
        """bool [n, K]: which entries hold."""
        return np.arange(self.ids_nK.shape[1]) < self.count_n[:, None]

    def ids(self) -> np.ndarray:
        """uint32 [n, K]."""
        ids = self.ids_nK.astype(np.uint32)
        return ids if self.high_nK is None else ids | (self.high_nK.astype(np.uint32) << 16)


def concatenate(parts: list[Planes]) -> Planes:
    """Rows of several targets of one codec, one after the other."""
    if len(parts) == 1:
        return parts[0]
    high = None if parts[0].high_nK is None else np.concatenate([p.high_nK for p in parts if p.high_nK is not None])
    ids, values, count = (np.concatenate([getattr(p, n) for p in parts]) for n in ("ids_nK", "values_nK", "count_n"))
    return Planes(ids, high, values, count, np.concatenate([p.scalars_Sn for p in parts], axis=1))


@dataclass(frozen=True)
class Codec:
    """How the rows of a folder are packed; stands in every shard's header."""

    vocabulary: int
    k: int  # the most entries a row has
    quantum: float  # nats; 0 for counts
    values: str = "log-probability"
    scalars: tuple[str, ...] = ("first", "truth")

    def __post_init__(self) -> None:
        if not (0 < self.vocabulary <= 1 << 24 and 0 < self.k <= 1024 and self.k <= self.vocabulary):
            raise ValueError(f"expected 0 < k ≤ 1024, k ≤ vocabulary ≤ 2^24, found {self.k} and {self.vocabulary}")
        if self.values not in VALUES or (self.quantum > 0) != (self.values == VALUES[0]):
            raise ValueError(f"values {self.values!r} with a quantum of {self.quantum}")
        if not 0 <= self.quantum <= 1 or len(self.scalars) > 64:
            raise ValueError(f"a quantum of {self.quantum} nats, {len(self.scalars)} scalars")

    @property
    def header(self) -> dict[str, Any]:
        """As in a shard's header."""
        return {
            "vocabulary": self.vocabulary, "k": self.k, "values": self.values, "quantum": self.quantum,
            "scalars": list(self.scalars),
        }  # fmt: skip

    @classmethod
    def read(cls, header: Any) -> Codec:
        """The inverse of `header`.

        Raises:
            ValueError: the header is not one.
        """
        if not isinstance(header, dict) or set(header) != KEYS:
            raise ValueError(f"expected the keys {', '.join(sorted(KEYS))}")
        whole = all(type(header[name]) is int for name in ("vocabulary", "k"))
        scalars, values = header["scalars"], header["values"]
        named = isinstance(scalars, list) and all(isinstance(name, str) for name in [*scalars, values])
        if not whole or not named or type(header["quantum"]) not in (int, float):
            raise ValueError(f"a key of the wrong type in {str(header)[:200]}")
        if not 0 <= header["quantum"] <= 1:
            raise ValueError(f"a quantum of {str(header['quantum'])[:50]} nats")
        temperatures = [float(name.removeprefix("tail@")) for name in scalars if name.startswith("tail@")]
        lacking = values == VALUES[0] and "first" not in scalars
        if lacking or len(set(scalars)) < len(scalars) or not all(0 < t < math.inf for t in temperatures):
            raise ValueError(f"expected scalars of different names, one of them first, found {str(scalars)[:200]}")
        return cls(header["vocabulary"], header["k"], float(header["quantum"]), values, tuple(scalars))

    @property
    def _bytes_of_id(self) -> int:
        return 3 if self.vocabulary > 1 << 16 else 2

    def scalar(self, planes: Planes, name: str) -> np.ndarray:
        """float32 [n] nats of one scalar."""
        stored = planes.scalars_Sn[self.scalars.index(name)]
        return np.where(stored == MINUS_INFINITY, -np.inf, stored * np.float32(1 / NAT)).astype(np.float32)

    def store(self, given: dict[str, np.ndarray], rows: int) -> np.ndarray:
        """int16 [S, rows] of the codec's scalars, from float [rows] nats.

        Raises:
            ValueError: one is not a number.
        """
        stored = np.empty((len(self.scalars), rows), np.int16)
        for name, into in zip(self.scalars, stored, strict=True):
            nats = np.asarray(given[name], np.float64)
            if np.isnan(nats).any():
                raise ValueError(f"{name} is not a number in row {int(np.flatnonzero(np.isnan(nats))[0])}")
            into[:] = _fixed(nats)
        return stored

    def empty(self, rows: int) -> Planes:
        """Rows without a target."""
        high = np.zeros((rows, self.k), np.uint8) if self._bytes_of_id == 3 else None
        ids, values = np.zeros((rows, self.k), np.uint16), np.zeros((rows, self.k), np.uint8)
        return Planes(ids, high, values, np.zeros(rows, np.uint16), np.zeros((len(self.scalars), rows), np.int16))

    # --------------------------------------------------------------------------------------------------- pack

    def pack(
        self, ids_nK: np.ndarray, given_nK: np.ndarray, scalars: dict[str, np.ndarray]
    ) -> tuple[Planes, np.ndarray]:
        """Quantise rows of distinct ids in any order.

        Args:
            ids_nK: integers below the vocabulary.
            given_nK: log-probabilities in nats, where -inf leaves an entry out; or counts, where 0 does.
            scalars: float [n] nats for each name of the codec's.

        Returns:
            The planes, and [n] KL(original ‖ decoded) in nats, both renormalised over the kept entries, at that of
            the codec's temperatures where it is largest.

        Raises:
            ValueError: a scalar, or a log-probability, is not a number; a count is above 255.
        """
        if self.values == "count":
            if given_nK.size and (given_nK.max() > LARGEST or given_nK.min() < 0):
                raise ValueError(f"a count of {given_nK.max()}: expected 0 to {LARGEST}")
            kept, values = given_nK > 0, given_nK.astype(np.uint8)
            distortion_n = np.zeros(len(ids_nK), np.float32)
        else:
            logp = given_nK.astype(np.float32, copy=False)
            kept = np.isfinite(logp)
            if not (kept | np.isneginf(logp)).all():
                raise ValueError("a log-probability is not a number")
            values, distortion_n = self._quantise(logp, kept)
        # a row in one sort: 32-bit words of id and value; what does not hold comes last
        words = (ids_nK.astype(np.uint32) << np.uint32(8)) | values
        if kept.all():
            count = np.full(len(ids_nK), ids_nK.shape[1], np.uint16)
            words.sort(axis=1)
        else:
            count = kept.sum(axis=1).astype(np.uint16)
            words[~kept] = np.uint32(0xFFFFFFFF)
            words.sort(axis=1)
            words = words[:, : self.k]
            words[np.arange(words.shape[1]) >= count[:, None]] = 0
        if len(count) and int(count.max()) > self.k:
            raise ValueError(f"a row of {count.max()} entries, more than K = {self.k}")
        return self._planes(words, count, self.store(scalars, len(words))), distortion_n

    def _planes(self, words: np.ndarray, count: np.ndarray, scalars: np.ndarray) -> Planes:
        n, width = words.shape
        octets = np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(n, width, 4)
        if width < self.k:  # narrower than the codec allows
            octets = np.concatenate([octets, np.zeros((n, self.k - width, 4), np.uint8)], axis=1)
        ids = octets[:, :, 1].astype(np.uint16) | (octets[:, :, 2].astype(np.uint16) << 8)
        high = octets[:, :, 3].copy() if self._bytes_of_id == 3 else None
        return Planes(ids, high, octets[:, :, 0].copy(), count, scalars)

    def _quantise(self, logp: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, K] values; float32 [n] KL(original ‖ decoded), the largest over the temperatures."""
        values, distortion = np.empty(logp.shape, np.uint8), np.zeros(len(logp), np.float32)
        size = max(CACHED // max(logp.shape[1], 1), 1)
        for start in range(0, len(logp), size):
            here = slice(start, start + size)
            values[here], distortion[here] = self._quantise_few(logp[here], kept[here])
        return values, distortion

    def _quantise_few(self, logp: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = logp.max(axis=1, keepdims=True, initial=-np.inf)
        every = bool(kept.all())
        with np.errstate(invalid="ignore"):
            below = first - logp if every else np.where(kept, first - logp, np.float32(0))
        values = np.rint(below * np.float32(1 / self.quantum))
        decoded = values * np.float32(self.quantum)
        far = np.nonzero(values > FINE)  # few
        if len(far[0]):
            coarse = np.rint((below[far] * np.float32(1 / self.quantum) - FINE) * np.float32(1 / COARSE))
            values[far] = np.minimum(FINE + coarse, LARGEST)
            decoded[far] = self.quantum * QUANTA[values[far].astype(np.uint8)]
        excess = decoded - below
        distortion = np.zeros(len(logp), np.float32)
        # KL = Σ p·d + log(Σ exp(-b) / Σ exp(-a)) for a = below, b = decoded, d = b - a; without cancellation
        weight, found, last = below, decoded, 0.0
        for temperature in reversed(self.temperatures):
            if last == 2 * temperature:  # a square costs less than an exponential
                weight, found = weight * weight, found * found
            else:
                scale = np.float32(-1 / temperature)
                weight, found = np.exp(below * scale), np.exp(decoded * scale)
            if not every:
                weight[~kept] = found[~kept] = 0
            last, total = temperature, np.maximum(weight.sum(axis=1), np.float32(1e-30))  # a row without entries
            moved = np.einsum("nk,nk->n", weight, excess) / (total * np.float32(temperature))
            distortion = np.maximum(distortion, np.log1p((found - weight).sum(axis=1) / total) + moved)
        return values.astype(np.uint8), distortion

    def log_probabilities(self, planes: Planes) -> np.ndarray:
        """float32 [n, K] nats as stored, at temperature 1; -inf where an entry does not hold. Not for counts."""
        first = self.scalar(planes, "first")[:, None]
        return np.where(planes.kept(), first - self.below(planes), -np.inf).astype(np.float32)

    def below(self, planes: Planes) -> np.ndarray:
        """float32 [n, K] nats that each entry lies below its row's most probable id. Not for counts."""
        return (self.quantum * QUANTA).astype(np.float32)[planes.values_nK]

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Where the tail's weight is stored and the distortion is measured; 1 is always among them."""
        named = (float(name.removeprefix("tail@")) for name in self.scalars if name.startswith("tail@"))
        return tuple(sorted({1.0, *named}))

    def prefix(self, planes: Planes, k: int) -> Planes:
        """The k most probable entries of every row (ties within a quantum by id); what is cut joins the tail."""
        if k >= planes.ids_nK.shape[1]:
            return planes
        if self.values == "count":
            raise ValueError("counts of draws cannot be shortened")
        kept = planes.kept()
        order = np.where(kept, (planes.values_nK.astype(np.uint32) << 24) | planes.ids(), np.uint32(0xFFFFFFFF))
        order.sort(axis=1)
        cut = QUANTA[order[:, k:] >> 24]
        held = np.arange(k, order.shape[1]) < planes.count_n[:, None]
        count = np.minimum(planes.count_n, k).astype(np.uint16)
        words = (order[:, :k] << 8) | (order[:, :k] >> 24)
        words[np.arange(k) >= count[:, None]] = np.uint32(0xFFFFFFFF)
        words.sort(axis=1)
        words[np.arange(k) >= count[:, None]] = 0
        scalars = planes.scalars_Sn.copy()
        for name, into in zip(self.scalars, scalars, strict=True):
            if name.startswith("tail@"):
                lost = np.where(held, np.exp(cut * (-self.quantum / float(name[5:]))), 0).sum(axis=1)
                with np.errstate(divide="ignore"):
                    tail = np.logaddexp(self.scalar(planes, name), np.log(lost))
                into[:] = _fixed(tail)
        return Codec(self.vocabulary, k, self.quantum, self.values, self.scalars)._planes(words, count, scalars)

    # ------------------------------------------------------------------------------------------------- frames

    def encode(self, planes: Planes, ends: np.ndarray) -> list[list[bytes]]:
        """The uncompressed frames of sequences whose rows end at `ends`, each as its parts.

        Parts: counts and scalars, high bytes; low bytes; the ids' gaps, lowest bytes; second bytes; (third bytes;)
        values.
        """
        ids = planes.ids()
        gaps = np.diff(ids, axis=1, prepend=np.uint32(0))
        values = planes.values_nK
        if self.values == "log-probability":
            values = values.max(axis=1, keepdims=True, initial=0) - values  # height above the row's last: fewer bits
        if (planes.count_n == self.k).all():
            gaps, values = gaps.reshape(-1), values.reshape(-1)
        else:
            kept = planes.kept()
            gaps, values = gaps[kept], values[kept]
        octets = gaps.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
        columns = [octets[:, i].tobytes() for i in range(self._bytes_of_id)] + [values.tobytes()]
        numbers = np.concatenate([planes.count_n[None].view(np.int16), planes.scalars_Sn]).astype("<i2", copy=False)
        numbers = numbers.view(np.uint8).reshape(len(self.scalars) + 1, -1, 2)
        entries = np.concatenate([[0], np.cumsum(planes.count_n, dtype=np.int64)])
        frames, begin = [], 0
        for end in ends:
            few = (numbers[:, begin:end, i].tobytes() for i in (1, 0))
            a, b = entries[begin], entries[end]
            frames.append([*few, *(column[a:b] for column in columns)])
            begin = end
        return frames

    def frame_bytes(self, rows: int, entries: int) -> int:
        """Length of an uncompressed frame."""
        return rows * (2 + 2 * len(self.scalars)) + entries * (self._bytes_of_id + 1)

    def decode(self, frames: list[bytes], rows: list[int]) -> Planes:
        """The rows of several frames, one after the other; the inverse of `encode`.

        Raises:
            ValueError: a frame's length does not fit its counts; a count exceeds K; ids do not rise or exceed the
                vocabulary.
        """
        width, scalars = self._bytes_of_id, len(self.scalars)
        octets: list[np.ndarray] = [np.zeros((2, scalars + 1, 0), np.uint8)]
        parts: list[list[np.ndarray]] = [[] for _ in range(width + 1)]
        for data, n in zip(frames, rows, strict=True):
            flat = np.frombuffer(data, np.uint8)
            at = n * (2 + 2 * scalars)
            entries, rest = divmod(len(flat) - at, width + 1)
            if entries < 0 or rest:
                raise ValueError(f"{len(flat)} bytes do not make a frame of {n} rows")
            octets.append(flat[:at].reshape(2, scalars + 1, n))
            if 256 * int(octets[-1][0, 0].sum(dtype=np.int64)) + int(octets[-1][1, 0].sum(dtype=np.int64)) != entries:
                raise ValueError(f"the counts of its rows do not sum to its {entries} entries")
            for index, part in enumerate(parts):
                part.append(flat[at + index * entries : at + (index + 1) * entries])
        high_low = np.concatenate(octets, axis=2).astype(np.uint16)
        numbers = (high_low[0] << 8) | high_low[1]
        ids, values = self._unpack([np.concatenate([np.zeros(0, np.uint8), *part]) for part in parts], numbers[0])
        high = (ids >> 16).astype(np.uint8) if width == 3 else None
        return Planes(ids.astype(np.uint16, copy=False), high, values, numbers[0], numbers[1:].view(np.int16))

    def _unpack(self, columns: list[np.ndarray], count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids [n, K] and values [n, K] from the columns of entries."""
        n, k = len(count), self.k
        if n and int(count.max()) > k:
            raise ValueError(f"a row has {count.max()} entries, more than K = {k}")
        full = bool((count == k).all())
        kept = None if full else np.arange(k) < count[:, None]
        wide: Any = np.uint16 if self._bytes_of_id == 2 else np.uint32
        flat: Any = columns[0].astype(wide)
        for index, column in enumerate(columns[1:-1], 1):
            flat |= column.astype(wide) << wide(8 * index)
        if kept is None:
            gaps, values = flat.reshape(n, k), columns[-1].reshape(n, k)
        else:
            gaps, values = np.zeros((n, k), wide), np.zeros((n, k), np.uint8)
            gaps[kept], values[kept] = flat, columns[-1]
        last = gaps.sum(axis=1, dtype=np.uint32 if wide is np.uint16 else np.uint64)
        if n and int(last.max()) >= self.vocabulary:  # so no sum below can wrap
            raise ValueError(f"an id of {last.max()} in a vocabulary of {self.vocabulary}")
        rising = gaps[:, 1:] > 0
        if not (rising if kept is None else rising | ~kept[:, 1:]).all():
            raise ValueError("the ids of a row do not rise")
        ids = _running_sums(gaps)
        if self.values == "log-probability":
            values = values.max(axis=1, keepdims=True, initial=0) - values
        if kept is not None:
            ids[~kept] = 0
            values[~kept] = 0
        return ids, values


def _fixed(nats: np.ndarray) -> np.ndarray:
    """Nats in the units of a scalar; what is out of its range is held at the range's end."""
    held = np.clip(np.rint(nats * NAT), MINUS_INFINITY + 1, -MINUS_INFINITY - 1)
    return np.where(np.isneginf(nats), MINUS_INFINITY, held)


def _running_sums(gaps_nK: np.ndarray) -> np.ndarray:
    """Along each row, in the array's own type; none may wrap.

    16-bit numbers go four at a time: a product by 0x0001000100010001 holds the running sums of the four in a word.
    """
    if gaps_nK.dtype != np.uint16 or gaps_nK.shape[1] % 4 or sys.byteorder != "little":
        return np.add.accumulate(gaps_nK, axis=1, dtype=gaps_nK.dtype)
    ones = np.uint64(0x0001_0001_0001_0001)
    within = gaps_nK.view(np.uint64) * ones
    words = within >> np.uint64(48)
    before = np.add.accumulate(words, axis=1) - words
    return (before * ones + within).view(np.uint16)


def compressor() -> zstandard.ZstdCompressor:
    """For one thread at a time."""
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(LEVEL, write_content_size=True)
    )


def compress(zstd: zstandard.ZstdCompressor, parts: list[bytes]) -> list[bytes]:
    """One standard zstd frame, in pieces: each part in blocks of its own, since bytes of different skew need different
    codes; then the end."""
    stream = zstd.compressobj(size=sum(map(len, parts)))
    pieces = [stream.compress(part) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for part in parts]
    return [*pieces, stream.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH)]
