"""Packed planes of teacher predictions, and their compressed form on disk.

n positions of one sequence, K kept ids a position. In memory a target is planes of small integers, read as they are by
the loss: ids in a 16-bit plane (and an 8-bit plane above it where the vocabulary needs it) and, for each id, how many
quanta its log-probability lies below the row's first. Rounding to the nearest quantum q costs about q²/24 nats of KL:
1.6e-4 at the default of 1/16; what is further than 255 quanta (16 nats) down is held at 255.

A frame on disk is the planes of one sequence in an order that compresses well, one after the other:
count u16 [n] | first f32 [n] | truth f32 [n] | ids' low bytes u8 [n, K] | ids' high bytes u8 [n, K]
| (ids' third bytes u8 [n, K]) | steps u8 [n, K], each as its difference from the one before it; then zstd.
Entries beyond a row's count are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

QUANTUM = 1 / 16
LARGEST_STEP = 255


@dataclass(frozen=True)
class Planes:
    """Targets of n positions."""

    ids_nK: np.ndarray  # uint16, low bits
    high_nK: np.ndarray | None  # uint8, bits above 16
    steps_nK: np.ndarray  # uint8, quanta below `first`
    count_n: np.ndarray  # uint16, entries that hold
    first_n: np.ndarray  # float32, log-probability of the most probable id, nats
    truth_n: np.ndarray  # float32, log-probability of the true token, nats

    def __len__(self) -> int:
        return len(self.count_n)

    def rows(self, rows: slice) -> Planes:
        """A run of rows, without copying."""
        high = None if self.high_nK is None else self.high_nK[rows]
        ids, steps, count = self.ids_nK[rows], self.steps_nK[rows], self.count_n[rows]
        return Planes(ids, high, steps, count, self.first_n[rows], self.truth_n[rows])

    def prefix(self, k: int) -> Planes:
        """The first k entries of every row: the targets a smaller K would have given."""
        high = None if self.high_nK is None else self.high_nK[:, :k]
        count = np.minimum(self.count_n, k).astype(np.uint16)
        return Planes(self.ids_nK[:, :k], high, self.steps_nK[:, :k], count, self.first_n, self.truth_n)


def empty(rows: int, k: int, vocabulary: int) -> Planes:
    """Rows without a target."""
    high = np.zeros((rows, k), np.uint8) if vocabulary > 1 << 16 else None
    scalar = np.zeros(rows, np.float32)
    return Planes(
        np.zeros((rows, k), np.uint16), high, np.zeros((rows, k), np.uint8), np.zeros(rows, np.uint16), scalar, scalar
    )


def concatenate(parts: list[Planes]) -> Planes:
    """Rows of several targets, one after the other; all with the same K and vocabulary."""
    high = None if parts[0].high_nK is None else np.concatenate([p.high_nK for p in parts if p.high_nK is not None])
    columns = [np.concatenate([getattr(p, name) for p in parts]) for name in ("ids_nK", "steps_nK", "count_n")]
    scalars = [np.concatenate([getattr(p, name) for p in parts]) for name in ("first_n", "truth_n")]
    return Planes(columns[0], high, columns[1], columns[2], scalars[0], scalars[1])


def pack(ids_nK: np.ndarray, logp_nK: np.ndarray, truth_n: np.ndarray, vocabulary: int) -> Planes:
    """Quantise rows that are ordered by falling probability; -inf entries are dropped."""
    count = np.isfinite(logp_nK).sum(axis=1).astype(np.uint16)
    kept = np.arange(ids_nK.shape[1]) < count[:, None]
    first = logp_nK[:, 0].astype(np.float32)
    below = np.where(kept, first[:, None] - np.where(kept, logp_nK, 0), 0)
    steps = np.minimum(np.rint(below / QUANTUM), LARGEST_STEP).astype(np.uint8)
    ids = np.where(kept, ids_nK, 0)
    high = (ids >> 16).astype(np.uint8) if vocabulary > 1 << 16 else None
    return Planes((ids & 0xFFFF).astype(np.uint16), high, steps, count, first, truth_n.astype(np.float32))


def distortion(logp_nK: np.ndarray, planes: Planes) -> np.ndarray:
    """[n] KL(original ‖ decoded) in nats, both renormalised over the kept entries, in float64."""
    kept = np.arange(logp_nK.shape[1]) < planes.count_n[:, None]
    one = np.where(kept, logp_nK, -np.inf).astype(np.float64)
    two = np.where(kept, -QUANTUM * planes.steps_nK.astype(np.float64), -np.inf)
    some = planes.count_n[:, None] > 0  # a row without entries has no normaliser
    one, two = (rows - np.where(some, np.logaddexp.reduce(rows, axis=1, keepdims=True), 0) for rows in (one, two))
    return np.sum(np.where(kept, np.exp(one) * (np.where(kept, one, 0) - np.where(kept, two, 0)), 0), axis=1)


def frame_bytes(rows: int, k: int, vocabulary: int) -> int:
    """Length of an uncompressed frame."""
    return rows * (2 + 4 + 4 + k * (4 if vocabulary > 1 << 16 else 3))


def encode(planes: Planes) -> bytes:
    """The uncompressed frame."""
    ids = planes.ids_nK
    parts = [
        planes.count_n.astype("<u2").tobytes(),
        planes.first_n.astype("<f4").tobytes(),
        planes.truth_n.astype("<f4").tobytes(),
        (ids & 0xFF).astype(np.uint8).tobytes(),
        (ids >> 8).astype(np.uint8).tobytes(),
        b"" if planes.high_nK is None else planes.high_nK.tobytes(),
        np.diff(planes.steps_nK, axis=1, prepend=np.uint8(0)).tobytes(),  # modulo 256
    ]
    return b"".join(parts)


def decode(data: bytes, rows: int, k: int, vocabulary: int) -> Planes:
    """The inverse of `encode`.

    Raises:
        ValueError: the data have another length than such a frame, or a count exceeds K.
    """
    expected = frame_bytes(rows, k, vocabulary)
    if len(data) != expected:
        raise ValueError(f"a frame of {rows} rows takes {expected} bytes, found {len(data)}")
    count = np.frombuffer(data, "<u2", rows)
    if rows and count.max() > k:
        raise ValueError(f"a row has {count.max()} entries, more than K = {k}")
    first, truth = (np.frombuffer(data, "<f4", rows, 2 * rows + 4 * i * rows) for i in range(2))
    planes = [
        np.frombuffer(data, np.uint8, rows * k, 10 * rows + i * rows * k).reshape(rows, k)
        for i in range(4 if vocabulary > 1 << 16 else 3)
    ]
    ids = planes[0].astype(np.uint16) | (planes[1].astype(np.uint16) << 8)
    high = planes[2].copy() if vocabulary > 1 << 16 else None
    steps = np.cumsum(planes[-1], axis=1, dtype=np.uint8)
    return Planes(ids, high, steps, count.copy(), first.copy(), truth.copy())
