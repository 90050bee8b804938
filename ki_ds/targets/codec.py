"""Packed planes of teacher predictions, and their form on disk (FORMAT.md).

n rows, K kept ids a row, S scalars, E entries that hold in all.

In memory a target is planes of small integers that the loss reads as they are: ids, rising, in a 16-bit plane (and an
8-bit plane above it where the vocabulary needs it); and beside each id how far its log-probability lies below
the row's largest, in quanta (`ki_ds.targets.quanta`), or, for sampled targets, how often it was drawn.
`ki_ds.kernels.select.pack` packs them.

On disk rows are ragged and every id is its distance from the one before it: of a set of K ids only log₂(V choose K)
bits are left, and their order by probability is not stored twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from ki_ds.targets.quanta import QUANTA, from_scalar, to_scalar
from ki_ds.targets.scalars import Scalar, name_of, parse_name, stored

LEVEL = 1  # of zstd: the planes hold no repetitions worth a search, only skewed bytes
LOG_PROBABILITY, COUNT = "log-probability", "count"  # what the values are
KEYS = {"vocabulary", "k", "values", "quantum", "scalars"}


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
    scalars: tuple[Scalar, ...] = ("first", "truth")  # what is stored of each row beside its entries

    def __post_init__(self) -> None:
        if not (0 < self.vocabulary <= 1 << 24 and 0 < self.k <= 1024 and self.k <= self.vocabulary):
            raise ValueError(f"expected 0 < k ≤ 1024, k ≤ vocabulary ≤ 2^24, found {self.k} and {self.vocabulary}")
        if not 0 <= self.quantum <= 1 or len(self.scalars) > 64:
            raise ValueError(f"a quantum of {self.quantum} nats, {len(self.scalars)} scalars")

    @property
    def counts(self) -> bool:
        """Whether the values are counts of draws, and not log-probabilities."""
        return self.quantum == 0

    @property
    def tails(self) -> tuple[float, ...]:
        """The temperatures at which the tail's weight is stored."""
        return tuple(scalar for scalar in self.scalars if not isinstance(scalar, str))

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Where the tail's weight is stored and the distortion is measured; 1 is always among them."""
        return tuple(sorted({1.0, *self.tails}))

    @property
    def record(self) -> dict[str, Any]:
        """As in a shard's header."""
        return {
            "vocabulary": self.vocabulary, "k": self.k, "values": COUNT if self.counts else LOG_PROBABILITY,
            "quantum": self.quantum, "scalars": [name_of(scalar) for scalar in self.scalars],
        }  # fmt: skip

    @classmethod
    def read(cls, said: Any) -> Codec:
        """The inverse of `record`.

        Raises:
            ValueError: it is not a codec.
        """
        if not isinstance(said, dict) or set(said) != KEYS:
            raise ValueError(f"expected the keys {', '.join(sorted(KEYS))}")
        whole = all(type(said[name]) is int for name in ("vocabulary", "k"))
        names, values, quantum = said["scalars"], said["values"], said["quantum"]
        named = isinstance(names, list) and all(isinstance(name, str) for name in [*names, values])
        if not whole or not named or type(quantum) not in (int, float):
            raise ValueError(f"a key of the wrong type in {str(said)[:200]}")
        if not 0 <= quantum <= 1:
            raise ValueError(f"a quantum of {str(quantum)[:50]} nats")
        if values != (LOG_PROBABILITY if quantum > 0 else COUNT):
            raise ValueError(f"values {values!r} with a quantum of {quantum}")
        scalars = tuple(map(parse_name, names))
        if (quantum > 0 and "first" not in scalars) or len(set(scalars)) < len(scalars):
            raise ValueError(f"expected scalars of different names, one of them first, found {str(names)[:200]}")
        return cls(said["vocabulary"], said["k"], float(quantum), scalars)

    @property
    def _bytes_of_id(self) -> int:
        return 3 if self.vocabulary > 1 << 16 else 2

    def _place(self, scalar: Scalar) -> int:
        return self.scalars.index(scalar if isinstance(scalar, str) else stored(scalar))

    def stores(self, scalar: Scalar) -> bool:
        """Whether there is such a scalar."""
        return (scalar if isinstance(scalar, str) else stored(scalar)) in self.scalars

    def scalar(self, planes: Planes, scalar: Scalar) -> np.ndarray:
        """float32 [n] nats of one scalar."""
        return from_scalar(planes.scalars_Sn[self._place(scalar)])

    def store(self, given: Mapping[Scalar, np.ndarray], rows: int) -> np.ndarray:
        """int16 [S, rows] of the codec's scalars, from float [rows] nats.

        Raises:
            ValueError: one is not a number.
        """
        stored_Sn = np.empty((len(self.scalars), rows), np.int16)
        for scalar, into in zip(self.scalars, stored_Sn, strict=True):
            nats = np.asarray(given[scalar], np.float64)
            if np.isnan(nats).any():
                row = int(np.flatnonzero(np.isnan(nats))[0])
                raise ValueError(f"{name_of(scalar)} is not a number in row {row}")
            into[:] = to_scalar(nats)
        return stored_Sn

    def empty(self, rows: int) -> Planes:
        """Rows without a target."""
        high = np.zeros((rows, self.k), np.uint8) if self._bytes_of_id == 3 else None
        ids, values = np.zeros((rows, self.k), np.uint16), np.zeros((rows, self.k), np.uint8)
        return Planes(ids, high, values, np.zeros(rows, np.uint16), np.zeros((len(self.scalars), rows), np.int16))

    def log_probabilities(self, planes: Planes) -> np.ndarray:
        """float32 [n, K] nats as stored, at temperature 1; -inf where an entry does not hold. Not for counts."""
        first = self.scalar(planes, "first")[:, None]
        return np.where(planes.kept(), first - self.below(planes), -np.inf).astype(np.float32)

    def below(self, planes: Planes) -> np.ndarray:
        """float32 [n, K] nats that each entry lies below its row's most probable id. Not for counts."""
        below: np.ndarray = (self.quantum * QUANTA).astype(np.float32)[planes.values_nK]
        return below

    def prefix(self, planes: Planes, k: int) -> Planes:
        """The k most probable entries of every row (ties within a quantum by id); what is cut joins the tail."""
        if k >= planes.ids_nK.shape[1]:
            return planes
        if self.counts:
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
        for temperature in self.tails:
            lost = np.where(held, np.exp(cut * (-self.quantum / temperature)), 0).sum(axis=1)
            with np.errstate(divide="ignore"):
                tail = np.logaddexp(self.scalar(planes, temperature), np.log(lost))
            scalars[self._place(temperature)] = to_scalar(tail)
        ids = words >> 8
        high = (ids >> 16).astype(np.uint8) if self._bytes_of_id == 3 else None
        return Planes(ids.astype(np.uint16), high, words.astype(np.uint8), count, scalars)

    # ------------------------------------------------------------------------------------------------- frames

    def encode(self, planes: Planes, ends: np.ndarray) -> list[list[bytes]]:
        """The uncompressed frames of sequences whose rows end at `ends`, each as its parts.

        Parts: counts and scalars, high bytes; low bytes; the ids' gaps, lowest bytes; second bytes; (third bytes;)
        values.
        """
        ids = planes.ids()
        gaps = np.diff(ids, axis=1, prepend=np.uint32(0))
        values = planes.values_nK
        if not self.counts:
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
            numbers, columns = self._columns(data, n)
            octets.append(numbers)
            for part, column in zip(parts, columns, strict=True):
                part.append(column)
        high_low = np.concatenate(octets, axis=2).astype(np.uint16)
        numbers = (high_low[0] << 8) | high_low[1]
        ids, values = self._unpack([np.concatenate([np.zeros(0, np.uint8), *part]) for part in parts], numbers[0])
        high = (ids >> 16).astype(np.uint8) if width == 3 else None
        return Planes(ids.astype(np.uint16, copy=False), high, values, numbers[0], numbers[1:].view(np.int16))

    def split(self, data: bytes, rows: int, most: int) -> Iterator[tuple[bytes, int]]:
        """A frame as frames of fewer rows, (frame, rows), of at most so many slots (rows · K) where K fits.

        Raises:
            ValueError: as `decode`.
        """
        octets, columns = self._columns(data, rows)
        size, begin = max(most // self.k, 1), 0
        for start in range(0, rows, size):
            part = octets[:, :, start : start + size]
            end = begin + _sum(part)
            yield b"".join([part.tobytes(), *(column[begin:end].tobytes() for column in columns)]), part.shape[2]
            begin = end

    def _columns(self, data: bytes, rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """uint8 [2, 1 + S, rows], high and low bytes of counts and scalars; and the columns of entries."""
        flat, width = np.frombuffer(data, np.uint8), self._bytes_of_id + 1
        at = rows * (2 + 2 * len(self.scalars))
        entries, rest = divmod(len(flat) - at, width)
        if entries < 0 or rest:
            raise ValueError(f"{len(flat)} bytes do not make a frame of {rows} rows")
        octets = flat[:at].reshape(2, len(self.scalars) + 1, rows)
        if _sum(octets) != entries:
            raise ValueError(f"the counts of its rows do not sum to its {entries} entries")
        return octets, np.split(flat[at:], width)

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
        if not self.counts:
            values = values.max(axis=1, keepdims=True, initial=0) - values
        if kept is not None:
            ids[~kept] = 0
            values[~kept] = 0
        return ids, values


def _sum(octets: np.ndarray) -> int:
    """Of the counts in the high and low bytes of a frame's numbers."""
    return 256 * int(octets[0, 0].sum(dtype=np.int64)) + int(octets[1, 0].sum(dtype=np.int64))


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
