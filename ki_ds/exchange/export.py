"""Targets as tables for other trainers: Parquet, or arrays in safetensors files.

A row of a table is one row of the targets:

    sample int64 | index int32 in its sequence | token int32, the true one | truth float32, its log-probability
    ids list<int32> | logprobs list<float32>, natural, at temperature 1, by falling probability (counts, where drawn)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ki_ds.errors import UserError
from ki_ds.exchange.parquet import lists, parquet_writer
from ki_ds.exchange.teacher_inputs import TeacherInputs
from ki_ds.targets.folder import ShardFolder


@dataclass(frozen=True)
class Table:
    """Rows of consecutive samples."""

    sample_n: np.ndarray
    index_n: np.ndarray | None
    token_n: np.ndarray | None
    truth_n: np.ndarray | None
    count_n: np.ndarray
    ids_E: np.ndarray  # int32, row after row
    values_E: np.ndarray  # float32 log-probabilities, or int32 counts

    @property
    def values(self) -> str:
        """What the values are, as their column is called."""
        return "counts" if self.values_E.dtype == np.int32 else "logprobs"

    def scalars(self) -> dict[str, np.ndarray | None]:
        """The columns with one number a row; None where it is not known."""
        return {"sample": self.sample_n, "index": self.index_n, "token": self.token_n, "truth": self.truth_n}


def tables(shards: ShardFolder, inputs: TeacherInputs | None) -> Iterator[Table]:
    """The folder's rows, some samples at a time; index and token where the corpus is at hand."""
    how = shards.codec
    for samples in shards.batches():
        start, read = int(samples[0]), shards.read(samples)
        planes = read.planes
        given = planes.values_nK.astype(np.float32) if how.counts else how.log_probabilities(planes)
        kept = planes.kept()
        order = np.argsort(np.where(kept, -given, np.inf), axis=1, kind="stable")
        ids, given = (np.take_along_axis(x, order, axis=1)[kept] for x in (planes.ids(), given))  # kept come first
        index = token = None
        if inputs is not None:
            view = inputs.view(samples)
            if inputs.viewer.digests(view).tolist() != read.digests:
                raise UserError(
                    f"{shards.folder}: sample {start} or soon after: the teacher saw another input than the "
                    f"corpus in {inputs.tokens.manifest.path} gives"
                )
            index, token, _ = inputs.rows(view)
        yield Table(
            np.repeat(samples, read.rows), index, token,
            how.scalar(planes, "truth") if how.stores("truth") else None, planes.count_n,
            ids.astype(np.int32), given.astype(np.int32 if how.counts else np.float32),
        )  # fmt: skip


def export_parquet(parts: Iterator[Table], path: Path) -> int:
    """Write tables to one Parquet file; the number of rows."""
    total = 0
    with parquet_writer(path) as write:
        for part in parts:
            ends = np.cumsum(part.count_n, dtype=np.int64)
            columns = {name: values for name, values in part.scalars().items() if values is not None}
            write({**columns, "ids": lists(ends, part.ids_E), part.values: lists(ends, part.values_E)})
            total += len(part.sample_n)
    return total


def export_arrays(parts: Iterator[Table], folder: Path) -> int:
    """Write tables as safetensors, `rows-<first sample>.safetensors`, ids and log-probabilities flat beside the
    rows' `ends`; the number of rows."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for part in parts:
        arrays = {name: np.ascontiguousarray(values) for name, values in part.scalars().items() if values is not None}
        arrays |= {"ends": np.cumsum(part.count_n, dtype=np.int64), "ids": part.ids_E, part.values: part.values_E}
        if len(part.sample_n):
            save_file(arrays, folder / f"rows-{int(part.sample_n[0]):09d}.safetensors")
        total += len(part.sample_n)
    return total
