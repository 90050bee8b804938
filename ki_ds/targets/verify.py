"""Looks for damage: every byte of every shard, and what the decoded numbers must satisfy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ki_ds.errors import UserError
from ki_ds.targets.asked import Asked
from ki_ds.targets.codec import NAT, Codec, Planes
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.shard import Raw, Shard

FRAMES = 64  # read at once
ASIDE = "aside"  # where repair keeps damaged shards


@dataclass(frozen=True)
class Fault:
    """Something wrong in a shard."""

    shard: int  # its number
    message: str


def verify(
    shards: ShardFolder, deep: bool = False, asked: Asked | None = None, advance: Callable[[int], None] | None = None
) -> list[Fault]:
    """Every fault of a folder, in its order; shards are read in parallel.

    Args:
        deep: decode every row and check its probabilities too.
        asked: check that the teacher saw exactly these inputs.
        advance: called with the number of positions that have been looked at.
    """

    def one(number: int) -> list[Fault]:
        found = [Fault(number, message) for message in _shard(shards, number, deep, asked)]
        if advance:
            advance(min(shards.per_shard, shards.positions - number * shards.per_shard))
        return found

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [fault for faults in pool.map(one, range(len(shards))) for fault in faults]


def _shard(shards: ShardFolder, number: int, deep: bool, asked: Asked | None) -> Iterator[str]:
    try:
        shard = shards.shard(number)
    except UserError as error:
        yield str(error)
        return
    start, end = shard.header["start"], shard.header["end"]
    for first in range(start, end, FRAMES):
        frames: list[Raw] = []
        try:
            frames = shard.read(first, min(FRAMES, end - first))
        except UserError:  # one by one, to name each that is damaged
            for position in range(first, min(first + FRAMES, end)):
                try:
                    frames += shard.read(position)
                except UserError as error:
                    yield str(error)
        for message in _frames(shard, frames, deep, asked):
            yield str(shard.bad(message))


def _frames(shard: Shard, frames: list[Raw], deep: bool, asked: Asked | None) -> Iterator[str]:
    if not frames:
        return
    labels: list[np.ndarray | None] = [None] * len(frames)
    if asked is not None:
        view = asked.view(np.array([frame.position for frame in frames]))
        _, tokens, ends = asked.rows(view)
        labels = list(np.split(tokens, ends[:-1]))
        for frame, digest, label in zip(frames, asked.viewer.digests(view).tolist(), labels, strict=True):
            if (frame.digest, frame.rows) != (digest, 0 if label is None else len(label)):
                yield f"position {frame.position}: the teacher saw another input than the corpus gives here"
    if not deep:
        return
    for frame, label in zip(frames, labels, strict=True):
        try:
            planes = shard.codec.decode([frame.data], [frame.rows])
        except ValueError as error:
            yield f"position {frame.position}: {error}"
            continue
        for row, message in _rows(
            shard.codec, planes, label if label is not None and len(label) == len(planes) else None
        ):
            yield f"position {frame.position}, row {row}: {message}"


def _rows(how: Codec, planes: Planes, labels: np.ndarray | None) -> Iterator[tuple[int, str]]:
    """(row, what is wrong with it), the first of each kind."""
    kept, half = planes.kept(), 0.5 / NAT + 1e-6
    checks: list[tuple[np.ndarray, str]] = []
    first = how.scalar(planes, "first") if "first" in how.scalars else np.zeros(len(planes), np.float32)
    if how.values == "count":
        drawn = planes.values_nK.sum(axis=1, dtype=np.int64)
        checks.append((drawn != drawn[:1], "another number of draws than the first row's"))
        checks.append((((planes.values_nK == 0) & kept).any(axis=1), "an id that was never drawn"))
    else:
        mass = np.where(kept, np.exp(first[:, None] - how.quantum * planes.values_nK.astype(np.float64)), 0).sum(axis=1)
        slack = np.exp(how.quantum / 2 + half)
        if "tail@1" in how.scalars:
            mass += np.exp(first + how.scalar(planes, "tail@1").astype(np.float64))
            checks.append(((planes.count_n > 0) & (mass < 1 / slack - 1e-3), "its probabilities sum to less than 1"))
        checks.append((mass > slack + 1e-3, "its probabilities sum to more than 1"))
    checks.append((first > half, "a log-probability above 0"))
    if "truth" in how.scalars:
        truth = how.scalar(planes, "truth")
        checks.append((truth > first + 2 * half, "the true token is more probable than the most probable id"))
        if labels is not None and how.values != "count":
            stored = first[:, None] - how.quantum * planes.values_nK
            at = kept & (planes.ids() == labels[:, None]) & (planes.values_nK < 255)
            wrong = at & (np.abs(stored - truth[:, None]) > how.quantum / 2 + 2 * half)
            checks.append((wrong.any(axis=1), "the true token's log-probability is not what its entry says"))
    for wrong, message in checks:
        if wrong.any():
            yield int(np.flatnonzero(wrong)[0]), message


def repair(folder: Path, shards: ShardFolder, faults: list[Fault]) -> list[Path]:
    """Set the shards with faults aside, so that `teach` computes them again; where they are now."""
    moved = []
    for number in dict.fromkeys(fault.shard for fault in faults):
        path = folder / shards.name(number)
        if path.exists():
            (folder / ASIDE).mkdir(exist_ok=True)
            moved.append(path.rename(folder / ASIDE / path.name))
    return moved
