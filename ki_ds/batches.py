"""What a rank is given at a step: a pure function of (experiment, step, rank, world size), loaded one step ahead.

B sequences of a micro-batch, S tokens, N target positions.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ki_ds.corpus.masking import View, Viewer
from ki_ds.corpus.stream import CorpusStream, Mix
from ki_ds.errors import UserError
from ki_ds.kernels import PackedTargets
from ki_ds.targets import codec
from ki_ds.targets.codec import Planes
from ki_ds.targets.shard import ShardFolder


@dataclass(frozen=True)
class MicroBatch:
    """The arguments of the student's forward pass."""

    input_ids_BS: Tensor  # int64
    rows_N: Tensor  # int64: target positions in the flattened [B · S]
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
class Plan:
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

    def positions(self, step: int) -> np.ndarray:
        """Stream positions of this rank at a step."""
        start = step * self.batch_size + self.rank * self.per_rank
        return np.arange(start, start + self.per_rank)


def to_packed(planes: Planes) -> PackedTargets:
    """Planes as the loss reads them."""
    high = None if planes.high_nK is None else torch.from_numpy(np.ascontiguousarray(planes.high_nK))
    return PackedTargets(
        torch.from_numpy(np.ascontiguousarray(planes.ids_nK).view(np.int16)),
        high,
        torch.from_numpy(np.ascontiguousarray(planes.steps_nK)),
        torch.from_numpy(planes.count_n.astype(np.int32)),
        codec.QUANTUM,
    )


class Loader:
    """Loads the micro-batches of a step, and meanwhile those of the next."""

    def __init__(self, lanes: list[Lane], mix: Mix, plan: Plan, k: int, vocabulary: int):
        self.lanes, self.mix, self.plan = lanes, mix, plan
        self.k, self.vocabulary = k, vocabulary
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.ahead: dict[tuple[int, float], Future[list[MicroBatch]]] = {}

    def __call__(self, step: int, alpha: float, next_alpha: float) -> list[MicroBatch]:
        """The micro-batches of a step.

        Raises:
            UserError: a target is damaged, or the teacher saw another input than the student would.
        """
        ready = self.ahead.pop((step, alpha), None) or self.worker.submit(self.load, step, alpha)
        batches = ready.result()
        self.ahead = {(step + 1, next_alpha): self.worker.submit(self.load, step + 1, next_alpha)}
        return batches

    def close(self) -> None:
        """Stop loading ahead."""
        self.worker.shutdown(wait=True, cancel_futures=True)

    def load(self, step: int, alpha: float) -> list[MicroBatch]:
        """The micro-batches of a step, at once."""
        size = self.plan.micro_batch_size
        positions = self.plan.positions(step)
        return [self._micro(positions[i : i + size], alpha) for i in range(0, len(positions), size)]

    def _micro(self, positions: np.ndarray, alpha: float) -> MicroBatch:
        choice, places = self.mix(positions)
        length = self.lanes[0].tokens.shape[1]
        inputs = np.empty((len(positions), length), np.int32)
        asked = np.empty((len(positions), length), bool)
        labels = np.empty((len(positions), length), np.int32)
        planes: list[Planes | None] = [None] * len(positions)
        for number, lane in enumerate(self.lanes):
            here = np.flatnonzero(choice == number)
            if not len(here):
                continue
            sequences, views = lane.stream.pairs(places[here])
            view = lane.viewer(lane.tokens[sequences], sequences, views)
            inputs[here], asked[here], labels[here] = view.inputs_BS, view.targets_BS, view.labels_BS
            if alpha > 0 and lane.targets is not None:
                for index, found in zip(here, self._frames(lane, places[here], view), strict=True):
                    planes[index] = found
        rows = np.flatnonzero(asked)
        packed = alpha_N = None
        if any(p is not None for p in planes):
            counts = asked.sum(axis=1)
            whole = [
                codec.empty(int(n), self.k, self.vocabulary) if p is None else p
                for p, n in zip(planes, counts, strict=True)
            ]
            packed = to_packed(codec.concatenate(whole))
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

    def _frames(self, lane: Lane, places: np.ndarray, view: View) -> list[Planes]:
        assert lane.targets is not None
        stored = lane.stream.first_positions(places)
        frames = [lane.targets.frame(int(position)) for position in stored]
        for frame, digest, position in zip(frames, lane.viewer.digests(view), stored, strict=True):
            if frame.digest != int(digest):
                raise misaligned(lane.targets.folder, int(position), lane.name)
        return [frame.planes.prefix(self.k) for frame in frames]


def misaligned(folder: Path, position: int, corpus: str) -> UserError:
    """The error of a teacher that saw another input than the student would."""
    return UserError(
        f"{folder}: position {position}: the teacher saw another input than the student is about to see "
        f"(corpus {corpus}, seed, masking or sequence length changed since). Remove the folder and run `ki-ds teach`."
    )
