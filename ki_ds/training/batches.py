"""A step's batch, as the student's forward pass takes it.

B sequences of a micro-batch, S tokens, N rows, M of them of one corpus, K entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ki_ds.kernels import PackedTargets
from ki_ds.pinned import host_tensor
from ki_ds.targets.codec import Codec, Planes


@dataclass(frozen=True)
class MicroBatch:
    """The arguments of the student's forward pass."""

    input_ids_BS: Tensor  # int64
    rows_N: Tensor  # int64: rows in the flattened [B · S]
    labels_N: Tensor  # int64
    targets: PackedTargets | None
    alpha_N: Tensor | None
    corpus_N: Tensor  # int16: which corpus of the mix a row is of

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, PackedTargets | None, Tensor | None]:
        """The same on a device, as positional arguments; copied beside the computation from pinned memory."""
        ids, rows, labels = (x.to(device, non_blocking=True) for x in (self.input_ids_BS, self.rows_N, self.labels_N))
        targets = None if self.targets is None else self.targets.to(device)
        return ids, rows, labels, targets, None if self.alpha_N is None else self.alpha_N.to(device, non_blocking=True)

    @property
    def taught_N(self) -> Tensor:
        """Which rows inherit."""
        return torch.zeros_like(self.labels_N, dtype=torch.bool) if self.targets is None else self.targets.count_N > 0


@dataclass(frozen=True)
class Batch:
    """What one rank computes at a step."""

    step: int
    alpha: float  # α of the step
    micro_batches: list[MicroBatch]

    @property
    def rows(self) -> int:
        """Rows of this rank."""
        return sum(len(micro.labels_N) for micro in self.micro_batches)

    def counts(self, corpora: int) -> np.ndarray:
        """[2, corpora]: rows of this rank by corpus, and those of them that inherit."""
        found = np.zeros((2, corpora), np.int64)
        for micro in self.micro_batches:
            of_corpus_N, taught_N = micro.corpus_N.numpy(), micro.taught_N.numpy()
            found += [np.bincount(numbers, minlength=corpora) for numbers in (of_corpus_N, of_corpus_N[taught_N])]
        return found


@dataclass(frozen=True)
class TargetCollator:
    """Collates the targets of a micro-batch's rows from the corpora that they come from."""

    k: int  # entries of a row; fewer than are stored means the most probable ones
    tail: float | None  # the temperature of the tail's weight; None: the kept entries are renormalised

    def __call__(self, rows: int, parts: list[tuple[np.ndarray, Codec, Planes]]) -> PackedTargets:
        """Targets as the loss reads them, no wider than the longest row; a row without one has count 0.

        Args:
            rows: N.
            parts: of each corpus with a teacher its rows, int64 [M] in 0 … N - 1, and what is stored of them. All are
                quantised alike.
        """
        parts = [(rows_M, codec, self._shortened(codec, planes)) for rows_M, codec, planes in parts]
        width = max([int(planes.count_n.max(initial=0)) for _, _, planes in parts] + [1])
        columns: dict[str, np.ndarray] = {}
        for rows_M, codec, planes in parts:
            found = self._columns(codec, planes, width)
            if len(rows_M) == rows:  # every row, in order
                columns = found
                break
            for name, values in found.items():
                if name not in columns:
                    columns[name] = np.zeros((rows, width)[: values.ndim], values.dtype)
                into = columns[name] if values.ndim == 1 else columns[name][:, : values.shape[1]]
                into[rows_M] = values
        given: dict[str, Any] = {name: host_tensor(values) for name, values in columns.items()}
        quantum = parts[0][1].quantum
        return PackedTargets(
            given["ids"], given.get("high"), given["values"], given["count"], quantum, given.get("tail")
        )

    def _shortened(self, codec: Codec, planes: Planes) -> Planes:
        """The k most probable entries; draws are never left out."""
        longer = not codec.counts and planes.ids_nK.shape[1] > self.k
        return codec.prefix(planes, self.k) if longer else planes

    def _columns(self, codec: Codec, planes: Planes, width: int) -> dict[str, np.ndarray]:
        """One corpus's part of the planes of `PackedTargets`: [M, at most width] or [M]."""
        found = {
            "ids": planes.ids_nK[:, :width].view(np.int16), "values": planes.values_nK[:, :width],
            "count": planes.count_n.astype(np.int32),
        }  # fmt: skip
        if planes.high_nK is not None:
            found["high"] = planes.high_nK[:, :width]
        if self.tail is not None:
            found["tail"] = codec.scalar(planes, self.tail)
        return found
