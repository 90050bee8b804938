"""Targets as tables for other trainers: Parquet, or arrays in safetensors files.

A row of a table is one row of the targets:

    sample int64 | index int32 in its sequence | token int32, the true one | truth float32, its log-probability
    ids list<int32> | logprobs list<float32>, natural, at temperature 1, by falling probability (counts, where drawn)
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ki_ds.errors import UserError
from ki_ds.exchange.parquet import lists, parquet_writer
from ki_ds.exchange.teacher_inputs import TeacherInputs
from ki_ds.files import writing
from ki_ds.targets.codec import Codec, Planes
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
        entries = shards.entries(samples)
        index = token = None
        if inputs is not None:
            view = inputs.view(samples)
            index, token, ends = inputs.rows(view)
            shown = [inputs.viewer.digests(view).tolist(), np.diff(ends, prepend=0).tolist()]
            if shown != [entries["digest"].tolist(), entries["rows"].tolist()]:
                raise UserError(
                    f"{shards.folder}: sample {samples[0]} or soon after: the teacher saw another input than the "
                    f"corpus in {inputs.tokens.manifest.path} gives"
                )
        done = 0
        for planes in shards.parts(samples):
            here = slice(done, done + len(planes))
            done = here.stop
            ids_E, values_E, truth_n = _falling(how, planes)
            yield Table(
                np.repeat(samples, entries["rows"])[here], None if index is None else index[here],
                None if token is None else token[here], truth_n, planes.count_n, ids_E, values_E,
            )  # fmt: skip


def _falling(how: Codec, planes: Planes) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """ids [E] and log-probabilities or counts [E] of the rows, falling in each; and the truth [n], if it is stored.

    Rounding makes some rows' probabilities sum to a little more than 1: these are scaled."""
    truth_n = how.scalar(planes, "truth") if how.stores("truth") else None
    kept = planes.kept()
    if how.counts:
        given: np.ndarray = planes.values_nK.astype(np.int32)
    else:
        given = how.log_probabilities(planes)
        excess_n1 = np.log(np.maximum(np.exp(given.astype(np.float64)).sum(axis=1, keepdims=True), 1))
        given = (given - excess_n1).astype(np.float32)
        if truth_n is not None:
            largest_n = given.max(axis=1, initial=-np.inf)
            truth_n = np.where(planes.count_n > 0, np.minimum(truth_n, largest_n), truth_n)
    order = np.argsort(np.where(kept, -given.astype(np.float32), np.inf), axis=1, kind="stable")
    ids, given = (np.take_along_axis(x, order, axis=1)[kept] for x in (planes.ids(), given))  # kept come first
    return ids.astype(np.int32), given, truth_n


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
    """Write tables as safetensors, `rows-<number of the first row>.safetensors`, ids and log-probabilities flat beside
    the rows' `ends`; the number of rows. The folder, new or empty, is whole or absent.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(folder):
            temporary.mkdir()
            total = _save(parts, temporary)
            temporary.replace(folder)
        return total
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(parts: Iterator[Table], folder: Path) -> int:
    from safetensors.numpy import save_file

    total = 0
    for part in parts:
        arrays = {name: np.ascontiguousarray(values) for name, values in part.scalars().items() if values is not None}
        arrays |= {"ends": np.cumsum(part.count_n, dtype=np.int64), "ids": part.ids_E, part.values: part.values_E}
        if len(part.sample_n):
            save_file(arrays, folder / f"rows-{total:012d}.safetensors")
        total += len(part.sample_n)
    return total
