"""Looks for damage: every byte of every shard, and what the decoded numbers must satisfy."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ki_ds.errors import UserError
from ki_ds.exchange.teacher_inputs import TeacherInputs
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.quanta import FINE, NAT
from ki_ds.targets.shard import MOST_BYTES, Damaged, Frame, Shard

THREADS = 16  # at most
AT_ONCE = 1 << 18  # slots (rows · K) that are decoded at once
_large = threading.Lock()  # held by who looks at a sample of more than MOST_BYTES


@dataclass(frozen=True)
class Fault:
    """Something wrong in a shard."""

    shard: int  # its number
    message: str
    damaged: bool = True  # else it could not be looked at: missing, not readable now, of another version


def verify(
    shards: ShardFolder,
    deep: bool = False,
    inputs: TeacherInputs | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Fault]:
    """Every fault of a folder, in its order; shards are read in parallel.

    Args:
        deep: decode every row and check its probabilities too.
        inputs: check that the teacher saw exactly these inputs.
        advance: called with the number of samples that have been looked at.
    """

    def one(number: int) -> list[Fault]:
        found = [
            Fault(number, str(error), isinstance(error, Damaged)) for error in _shard(shards, number, deep, inputs)
        ]
        if advance:
            advance(min(shards.per_shard, shards.samples - number * shards.per_shard))
        return found

    faults: list[Fault] = []
    threads = min(os.cpu_count() or 1, THREADS)
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(shards), 64 * threads):
            for found in pool.map(one, range(begin, min(begin + 64 * threads, len(shards)))):
                faults += found
    return faults


def _shard(shards: ShardFolder, number: int, deep: bool, inputs: TeacherInputs | None) -> Iterator[UserError]:
    try:
        shard = shards.shard(number)
    except UserError as error:
        yield error
        return
    start, end = shard.header.start, shard.header.end
    for first, count in shard.batches(start, end):
        size = int(shard.entries(first, count)["raw"].sum(dtype=np.int64))
        with _large if size > MOST_BYTES else contextlib.nullcontext():
            yield from _batch(shard, first, count, deep, inputs)


def _batch(shard: Shard, first: int, count: int, deep: bool, inputs: TeacherInputs | None) -> Iterator[UserError]:
    frames: list[Frame] = []
    try:
        frames = shard.read(first, count)
    except UserError:  # one by one, to name each that is damaged
        for sample in range(first, first + count):
            try:
                frames += shard.read(sample)
            except UserError as error:
                yield error
    for message in _frames(shard, frames, deep, inputs):
        yield shard.bad(message)


def _frames(shard: Shard, frames: list[Frame], deep: bool, inputs: TeacherInputs | None) -> Iterator[str]:
    if not frames:
        return
    labels: list[np.ndarray | None] = [None] * len(frames)
    if inputs is not None:
        view = inputs.view(np.array([frame.sample for frame in frames]))
        _, tokens, ends = inputs.rows(view)
        labels = list(np.split(tokens, ends[:-1]))
        for frame, digest, label in zip(frames, inputs.viewer.digests(view).tolist(), labels, strict=True):
            if (frame.digest, frame.rows) != (digest, 0 if label is None else len(label)):
                yield f"sample {frame.sample}: the teacher saw another input than the corpus gives here"
    if not deep:
        return
    for frame, label in zip(frames, labels, strict=True):
        known, done = label if label is not None and len(label) == frame.rows else None, 0
        try:
            for data, rows in shard.codec.split(frame.data, frame.rows, AT_ONCE):
                planes, here = shard.codec.decode([data], [rows]), slice(done, done + rows)
                for row, message in _rows(shard.codec, planes, None if known is None else known[here]):
                    yield f"sample {frame.sample}, row {done + row}: {message}"
                done += rows
        except ValueError as error:
            yield f"sample {frame.sample}: {error}"


def _rows(how: Codec, planes: Planes, labels: np.ndarray | None) -> Iterator[tuple[int, str]]:
    """(row, what is wrong with it), the first of each kind."""
    kept, half = planes.kept(), 0.5 / NAT + 1e-6
    checks: list[tuple[np.ndarray, str]] = []
    first = how.scalar(planes, "first") if how.stores("first") else np.zeros(len(planes), np.float32)
    if how.counts:
        drawn = planes.values_nK.sum(axis=1, dtype=np.int64)
        checks.append((drawn != drawn[:1], "another number of draws than the first row's"))
        checks.append((((planes.values_nK == 0) & kept).any(axis=1), "an id that was never drawn"))
    else:
        below = how.below(planes).astype(np.float64)
        mass = np.where(kept, np.exp(first[:, None] - below), 0).sum(axis=1)
        slack = np.exp(how.quantum / 2 + half)
        if how.stores(1):
            mass += np.exp(first + how.scalar(planes, 1).astype(np.float64))
            checks.append(((planes.count_n > 0) & (mass < 1 / slack - 1e-3), "its probabilities sum to less than 1"))
        checks.append((mass > slack + 1e-3, "its probabilities sum to more than 1"))
    checks.append((first > half, "a log-probability above 0"))
    if how.stores("truth"):
        truth = how.scalar(planes, "truth")
        checks.append(
            (
                (planes.count_n > 0) & (truth > first + 2 * half),
                "the true token is more probable than the most probable id",
            )
        )
        if labels is not None and not how.counts:
            stored = first[:, None] - how.below(planes)
            at = kept & (planes.ids() == labels[:, None]) & (planes.values_nK <= FINE)
            wrong = at & (np.abs(stored - truth[:, None]) > how.quantum / 2 + 2 * half)
            checks.append((wrong.any(axis=1), "the true token's log-probability is not what its entry says"))
    for wrong, message in checks:
        if wrong.any():
            yield int(np.flatnonzero(wrong)[0]), message
