"""A folder of shards, local or behind a URL, read by sample."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ki_ds.errors import UserError
from ki_ds.targets import codec
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.shard import INDEX, Frame, Shard, shard_name
from ki_ds.targets.source import Place, join, names

SHARD_NAME = re.compile(r"targets-(\d{9,15})-(\d{9,15})\.kit")
THREADS = 8  # of reads that wait for a server at the same time
Run = tuple[int, int]  # (first, count) of consecutive samples within a shard
Given = TypeVar("Given")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Targets:
    """What is stored at some samples."""

    planes: Planes
    rows: list[int]  # of each sample
    digests: list[int]  # of the input that the teacher saw


class ShardFolder:
    """Random access to the frames of a folder. Header and index of the last few shards are kept, but no open file."""

    def __init__(
        self,
        folder: Place,
        samples: int,
        samples_per_shard: int,
        header: FolderHeader | None = None,
        keep: int = 128,
        digests: Mapping[str, str] | None = None,
    ):
        """`header`: what every shard must say; None: it is not known, and not checked. `keep`: indices in memory.
        `digests`: of each shard by its name, as the folder was sealed with; None: it was sealed without."""
        self.folder, self.samples, self.per_shard = folder, samples, samples_per_shard
        self._header, self.keep, self.digests = header, keep, digests
        self.shards: OrderedDict[int, Shard] = OrderedDict()
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None

    @property
    def header(self) -> FolderHeader:
        """Of every shard, where the folder was opened by its manifest."""
        assert self._header is not None
        return self._header

    @property
    def codec(self) -> Codec:
        """Of every shard, where the folder was opened by its manifest."""
        return self.header.codec

    def read(self, samples: np.ndarray, check: Callable[[np.ndarray], None] | None = None) -> Targets:
        """The targets of samples, in their order; neighbours are read at once, the rest in threads.

        Args:
            check: hears what `entries` says of the samples before any frame is read.

        Raises:
            UserError: a shard is missing or damaged.
        """
        if check:
            check(self.entries(samples))
        parts = self._each(self._run, self._runs(samples))
        frames = [frame for _, part in parts for frame in part]
        planes = []
        for shard, part in _joined(parts):
            planes.append(shard.planes(part))
        if not planes:
            raise ValueError("no sample was asked for")
        return Targets(codec.concatenate(planes), [f.rows for f in frames], [f.digest for f in frames])

    def entries(self, samples: np.ndarray) -> np.ndarray:
        """What the shards' indices say of samples (`ki_ds.targets.shard.INDEX`), in their order; no frame is read.

        Raises:
            UserError: as `read`.
        """
        runs = self._runs(samples)
        new = list({run[0] // self.per_shard for run in runs} - self.shards.keys())
        opened = dict(zip(new, self._each(self.shard, new), strict=True))
        found = [(opened.get(run[0] // self.per_shard) or self._shard_of(run)).entries(*run) for run in runs]
        return np.frombuffer(b"".join(part.tobytes() for part in found), INDEX)  # numpy is slow with records

    def parts(self, samples: np.ndarray) -> Iterator[Planes]:
        """The rows of samples, as many at once as take a bounded amount of memory, however many a sample has.

        Raises:
            UserError: as `read`.
        """
        for run in self._runs(samples):
            shard = self._shard_of(run)
            for first, count in shard.batches(run[0], run[0] + run[1]):
                yield from shard.parts(shard.read(first, count))

    def batches(self) -> Iterator[np.ndarray]:
        """All samples in order, as many at once as take a bounded amount of memory."""
        for number in range(len(self)):
            start = number * self.per_shard
            for first, count in self.shard(number).batches(start, min(start + self.per_shard, self.samples)):
                yield np.arange(first, first + count)

    def _runs(self, samples: np.ndarray) -> list[Run]:
        runs: list[Run] = []
        for sample in map(int, samples):
            if not 0 <= sample < self.samples:
                raise UserError(
                    f"{self.folder}: holds samples 0 to {self.samples}, asked for {sample}. Run `ki-ds teach`: "
                    "it appends what is missing."
                )
            first, count = runs[-1] if runs else (-1, 0)
            if runs and sample == first + count and sample // self.per_shard == first // self.per_shard:
                runs[-1] = (first, count + 1)
            else:
                runs.append((sample, 1))
        return runs

    def _each(self, call: Callable[[Given], Found], given: list[Given]) -> list[Found]:
        """What a call gives for each, several at once."""
        if len(given) <= 1:
            return [call(one) for one in given]
        self.pool = self.pool or ThreadPoolExecutor(THREADS, thread_name_prefix="targets")
        return list(self.pool.map(call, given))

    def _shard_of(self, run: Run) -> Shard:
        return self.shard(run[0] // self.per_shard)

    def _run(self, run: Run) -> tuple[Shard, list[Frame]]:
        shard = self._shard_of(run)
        return shard, shard.read(*run)

    def shard(self, number: int) -> Shard:
        """An opened shard.

        Raises:
            UserError: it is missing, damaged, or not of this folder.
        """
        with self.lock:
            known = self.shards.get(number)
            if known:
                self.shards.move_to_end(number)
                return known
        shard = self._open(number)
        with self.lock:
            self.shards[number] = shard
            while len(self.shards) > self.keep:
                self.shards.popitem(last=False)
        return shard

    def _open(self, number: int) -> Shard:
        name = self.name(number)
        shard = Shard(join(self.folder, name))
        start = number * self.per_shard
        expected = {} if self._header is None else self._header.record
        expected |= {"start": start, "end": min(start + self.per_shard, self.samples)}
        found = shard.header.record
        for key, value in expected.items():
            if found.get(key) != value:
                raise shard.bad(f"its header gives {key} = {found.get(key)}, expected {value}")
        if self.digests is not None and shard.digest != self.digests.get(name):
            raise shard.bad(f"is another shard than the manifest vouches for (digest {shard.digest}, expected "
                            f"{self.digests.get(name, 'none')})")  # fmt: skip
        return shard

    def name(self, number: int) -> str:
        """File name of the shard with this number."""
        start = number * self.per_shard
        return shard_name(start, min(start + self.per_shard, self.samples))

    def fits(self, name: str) -> bool:
        """Whether a file is one of this folder's shards, or would be if the folder were longer."""
        found = SHARD_NAME.fullmatch(name)
        start, end = (int(part) for part in found.groups()) if found else (0, 0)
        number, rest = divmod(start, self.per_shard)
        return bool(found) and not rest and (end - start == self.per_shard or self.name(number) == name)

    def __len__(self) -> int:
        return -(-self.samples // self.per_shard)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        there = names(self.folder)
        return [number for number in range(len(self)) if self.name(number) not in there]


def _joined(parts: list[tuple[Shard, list[Frame]]]) -> list[tuple[Shard, list[Frame]]]:
    """Runs of neighbouring parts with the same codec, so that few, long decodings are left."""
    joined: list[tuple[Shard, list[Frame]]] = []
    for shard, frames in parts:
        if joined and joined[-1][0] is shard:
            joined[-1] = (shard, joined[-1][1] + frames)
        else:
            joined.append((shard, frames))
    return joined
