"""What a rank is given at a step: a pure function of (experiment, step, rank, world size), loaded one step ahead.

B sequences of a micro-batch, S tokens, N rows.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ki_ds.corpus.masking import View, Viewer
from ki_ds.corpus.stream import CorpusStream, Mix
from ki_ds.errors import UserError
from ki_ds.kernels import PackedTargets
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.source import Place


@dataclass(frozen=True)
class MicroBatch:
    """The arguments of the student's forward pass."""

    input_ids_BS: Tensor  # int64
    rows_N: Tensor  # int64: rows in the flattened [B · S]
    labels_N: Tensor  # int64
    targets: PackedTargets | None
    alpha_N: Tensor | None

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, PackedTargets | None, Tensor | None]:
        """The same on a device, as positional arguments."""
        ids, rows, labels = (x.to(device, non_blocking=True) for x in (self.input_ids_BS, self.rows_N, self.labels_N))
        targets = None if self.targets is None else self.targets.to(device)
        return ids, rows, labels, targets, None if self.alpha_N is None else self.alpha_N.to(device)

    @property
    def taught(self) -> int:
        """Rows that inherit."""
        return 0 if self.targets is None else int((self.targets.count_N > 0).sum())


@dataclass(frozen=True)
class Lane:
    """One corpus of the mix, with the targets of its teacher where it has one."""

    name: str
    tokens: np.ndarray  # [sequences, S]
    stream: CorpusStream
    viewer: Viewer
    targets: ShardFolder | None


@dataclass(frozen=True)
class BatchLayout:
    """How the stream is cut: sequences a step, over all ranks, and at once on one rank."""

    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    @property
    def per_rank(self) -> int:
        return self.batch_size // self.world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches a step and rank."""
        return self.per_rank // self.micro_batch_size

    def samples(self, step: int) -> np.ndarray:
        """Stream samples of this rank at a step."""
        start = step * self.batch_size + self.rank * self.per_rank
        return np.arange(start, start + self.per_rank)


@dataclass(frozen=True)
class Reading:
    """What a student reads of its teachers' targets."""

    k: int  # entries of a row; fewer than are stored means the most probable ones
    tail: float | None  # the temperature of the tail's weight; None: the kept entries are renormalised


class TargetCollator:
    """Targets of a micro-batch's rows, gathered from the corpora they come from; a row without one has count 0."""

    def __init__(self, rows: int, how: Codec, reading: Reading):
        self.rows, self.reading, self.quantum = rows, reading, how.quantum
        self.parts: list[tuple[np.ndarray, Codec, Planes]] = []

    def add(self, rows_M: np.ndarray, how: Codec, planes: Planes) -> None:
        """Targets of some of the rows."""
        if not how.counts and planes.ids_nK.shape[1] > self.reading.k:
            planes = how.prefix(planes, self.reading.k)
        self.parts.append((rows_M, how, planes))

    def packed(self) -> PackedTargets:
        """As the loss reads them, no wider than the longest row."""
        width = max([int(planes.count_n.max(initial=0)) for _, _, planes in self.parts] + [1])
        columns: dict[str, np.ndarray] = {}
        for rows, how, planes in self.parts:
            found = {"ids": planes.ids_nK[:, :width], "values": planes.values_nK[:, :width]}
            found["count"] = planes.count_n.astype(np.int32)
            if planes.high_nK is not None:
                found["high"] = planes.high_nK[:, :width]
            if self.reading.tail is not None:
                found["tail"] = how.scalar(planes, self.reading.tail)
            if len(rows) == self.rows:  # every row, in order
                columns = found
                break
            for name, values in found.items():
                if name not in columns:
                    columns[name] = np.zeros((self.rows, width)[: values.ndim], values.dtype)
                into = columns[name] if values.ndim == 1 else columns[name][:, : values.shape[1]]
                into[rows] = values
        given = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in columns.items() if name != "ids"}
        ids = torch.from_numpy(np.ascontiguousarray(columns["ids"]).view(np.int16))
        return PackedTargets(ids, given.get("high"), given["values"], given["count"], self.quantum, given.get("tail"))


class Loader:
    """Loads the micro-batches of a step, and meanwhile those of the next."""

    def __init__(self, lanes: list[Lane], mix: Mix, layout: BatchLayout, reading: Reading | None = None):
        """`reading`: where any lane has targets."""
        self.lanes, self.mix, self.layout, self.reading = lanes, mix, layout, reading
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.ahead: dict[tuple[int, float], Future[list[MicroBatch]]] = {}
        self.reading_s = self.waited_s = 0.0  # so far: reading and decoding targets; the training loop waiting for it

    def __call__(self, step: int, alpha: float, next_alpha: float) -> list[MicroBatch]:
        """The micro-batches of a step.

        Raises:
            UserError: a target is damaged, or the teacher saw another input than the student would.
        """
        ready = self.ahead.pop((step, alpha), None) or self.worker.submit(self.load, step, alpha)
        began = time.perf_counter()
        batches = ready.result()
        self.waited_s += time.perf_counter() - began
        self.ahead = {(step + 1, next_alpha): self.worker.submit(self.load, step + 1, next_alpha)}
        return batches

    def close(self) -> None:
        """Stop loading ahead."""
        self.worker.shutdown(wait=True, cancel_futures=True)

    def load(self, step: int, alpha: float) -> list[MicroBatch]:
        """The micro-batches of a step, at once."""
        size = self.layout.micro_batch_size
        samples = self.layout.samples(step)
        return [self._micro(samples[i : i + size], alpha) for i in range(0, len(samples), size)]

    def _micro(self, samples: np.ndarray, alpha: float) -> MicroBatch:
        choice, places = self.mix(samples)
        length = self.lanes[0].tokens.shape[1]
        inputs = np.empty((len(samples), length), np.int32)
        loss_mask = np.empty((len(samples), length), bool)
        labels = np.empty((len(samples), length), np.int32)
        read: list[tuple[np.ndarray, Codec, Planes]] = []
        for number, lane in enumerate(self.lanes):
            here = np.flatnonzero(choice == number)
            if not len(here):
                continue
            sequences, views = lane.stream.pairs(places[here])
            view = lane.viewer(lane.tokens[sequences], sequences, views)
            inputs[here], loss_mask[here], labels[here] = view.inputs_BS, view.loss_mask_BS, view.labels_BS
            if alpha > 0 and lane.targets is not None:
                read.append((here, lane.targets.codec, self._read(lane, places[here], view)))
        rows = np.flatnonzero(loss_mask)
        packed = alpha_N = None
        if read:
            assert self.reading is not None
            gathered = TargetCollator(len(rows), read[0][1], self.reading)
            for here, how, planes in read:
                gathered.add(np.flatnonzero(np.isin(rows // length, here)), how, planes)
            packed = gathered.packed()
            alpha_N = torch.from_numpy(np.full(len(rows), alpha, np.float32))
        return MicroBatch(
            torch.from_numpy(
                inputs.astype(np.int64)
            ),  # numpy, not torch: this thread must not start a second thread pool
            torch.from_numpy(rows),
            torch.from_numpy(labels.reshape(-1)[rows].astype(np.int64)),
            packed,
            alpha_N,
        )

    def _read(self, lane: Lane, places: np.ndarray, view: View) -> Planes:
        assert lane.targets is not None
        began = time.perf_counter()
        stored = lane.stream.first_samples(places)
        found = lane.targets.read(stored)
        self.reading_s += time.perf_counter() - began
        expected = view.loss_mask_BS.sum(axis=1).tolist()
        seen = lane.viewer.digests(view).tolist()
        for sample, digest, rows, *now in zip(stored.tolist(), found.digests, found.rows, seen, expected, strict=True):
            if [digest, rows] != now:
                raise misaligned(lane.targets.folder, sample, lane.name)
        return found.planes


def misaligned(folder: Place, sample: int, corpus: str) -> UserError:
    """The error of a teacher that saw another input than the student would."""
    return UserError(
        f"{folder}: sample {sample}: the teacher saw another input than the student is about to see "
        f"(corpus {corpus}, seed, masking or sequence length changed since). Remove the folder and run `ki-ds teach`, "
        "or import the predictions again."
    )
