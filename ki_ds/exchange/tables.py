"""To and from other trainers: targets as Parquet or safetensors, questions to teachers that run elsewhere, and their
answers.

A row of an exported or imported table is one row:

    sample int64 | index int32 in its sequence | token int32, the true one | truth float32, its log-probability
    ids list<int32> | logprobs list<float32>, natural, at temperature 1, by falling probability (counts, where drawn)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ki_ds.errors import UserError
from ki_ds.exchange.teacher_inputs import TeacherInputs
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.shard import Block, pack_block

FRAMES = 64  # samples at once
MASS_SLACK = 1e-3


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
        given = planes.values_nK.astype(np.float32) if how.values == "count" else how.log_probabilities(planes)
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
            how.scalar(planes, "truth") if "truth" in how.scalars else None, planes.count_n,
            ids.astype(np.int32), given.astype(np.int32 if how.values == "count" else np.float32),
        )  # fmt: skip


@contextmanager
def _parquet(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes columns to a Parquet file, part by part; the file is whole or absent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary, writer = path.with_name(path.name + ".tmp"), None

    def write(columns: dict[str, Any]) -> None:
        nonlocal writer
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
        writer.write_table(table)

    try:
        yield write
        if writer:
            writer.close()
            temporary.rename(path)
    finally:
        if writer and writer.is_open:
            writer.close()
        temporary.unlink(missing_ok=True)


def _lists(ends: np.ndarray, values: np.ndarray) -> Any:
    """An Arrow column of int32 or float32 lists that end at `ends`."""
    import pyarrow as pa

    begins = np.concatenate([[0], ends]).astype(np.int32)
    kind = np.float32 if values.dtype.kind == "f" else np.int32
    return pa.ListArray.from_arrays(pa.array(begins), pa.array(values.astype(kind)))


def export_parquet(parts: Iterator[Table], path: Path) -> int:
    """Write tables to one Parquet file; the number of rows."""
    total = 0
    with _parquet(path) as write:
        for part in parts:
            ends = np.cumsum(part.count_n, dtype=np.int64)
            columns = {name: values for name, values in part.scalars().items() if values is not None}
            write({**columns, "ids": _lists(ends, part.ids_E), part.values: _lists(ends, part.values_E)})
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


def ask(inputs: TeacherInputs, samples: int, path: Path) -> int:
    """Write the questions: `sample`, `input_ids` and the `index` and true `token` of each row as lists; their number
    of rows."""
    total = 0
    with _parquet(path) as write:
        for start in range(0, samples, FRAMES):
            here = np.arange(start, min(start + FRAMES, samples))
            view = inputs.view(here)
            index, token, ends = inputs.rows(view)
            whole = np.arange(1, len(here) + 1) * view.inputs_BS.shape[1]
            ids = _lists(whole, view.inputs_BS.reshape(-1))
            write({"sample": here, "input_ids": ids, "index": _lists(ends, index), "token": _lists(ends, token)})
            total += len(index)
    return total


class Answers:
    """A Parquet file of rows (see above; `truth` may be left out), checked against the teacher inputs."""

    NEEDED = ("sample", "index", "token", "ids", "logprobs")

    def __init__(self, path: Path):
        """Open it.

        Raises:
            UserError: it is not Parquet, or lacks a column.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self.file = pq.ParquetFile(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: is not a Parquet file ({str(error).splitlines()[0]})") from None
        names = set(self.file.schema_arrow.names)
        missing = [name for name in self.NEEDED if name not in names]
        if missing:
            listed = ", ".join(sorted(names))
            raise UserError(f"{path}: has the columns {listed}; missing: {', '.join(missing)}. `ki-ds targets ask` "
                            "writes the questions to answer")  # fmt: skip
        whole, fraction = pa.types.is_integer, pa.types.is_floating
        for name, kind in {
            "sample": whole, "index": whole, "token": whole, "truth": fraction, "ids": whole, "logprobs": fraction
        }.items():  # fmt: skip
            if name not in names:
                continue
            found = self.file.schema_arrow.field(name).type
            many = isinstance(found, pa.ListType | pa.LargeListType)
            if many != (name in ("ids", "logprobs")) or not kind(found.value_type if many else found):
                wanted = ("lists of " if name in ("ids", "logprobs") else "") + ("ints" if kind is whole else "floats")
                raise UserError(f"{path}: column {name}: expected {wanted}, found {found}")
        self.truth = "truth" in names

    def longest(self) -> int:
        """The most ids of any row."""
        import pyarrow.compute as pc

        lengths = [pc.max(pc.list_value_length(b.column(0))).as_py() for b in self.file.iter_batches(columns=["ids"])]
        return max((length for length in lengths if length is not None), default=0)

    def samples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(sample, its columns) one after the other, in the file's order."""
        import pyarrow as pa

        columns = [*self.NEEDED, *(["truth"] if self.truth else [])]
        rest: Any = None
        for batch in self.file.iter_batches(columns=columns, batch_size=1 << 14):
            table = pa.Table.from_batches([batch])
            table = pa.concat_tables([rest, table]).combine_chunks() if rest is not None else table
            sample = self._numbers(table, "sample")
            cuts = [0, *(np.flatnonzero(np.diff(sample)) + 1).tolist()]
            for begin, end in pairwise(cuts):
                yield int(sample[begin]), self._columns(table.slice(begin, end - begin))
            rest = table.slice(cuts[-1])
        if rest is not None and len(rest):
            yield int(self._numbers(rest, "sample")[0]), self._columns(rest)

    def _numbers(self, table: Any, name: str) -> np.ndarray:
        column = table.column(name)
        if column.null_count:
            raise UserError(f"{self.path}: column {name} has empty values")
        return np.asarray(column.to_numpy())

    def _columns(self, table: Any) -> dict[str, Any]:
        found: dict[str, Any] = {name: self._numbers(table, name) for name in ("index", "token")}
        if self.truth:
            found["truth"] = self._numbers(table, "truth")
        for name in ("ids", "logprobs"):
            column = table.column(name).combine_chunks()
            if column.null_count or column.flatten().null_count:
                raise UserError(f"{self.path}: column {name} has empty values")
            found[name] = np.asarray(column.flatten().to_numpy())
            found[f"{name} lengths"] = np.asarray(column.value_lengths().to_numpy())
        return found


def blocks(answers: Answers, inputs: TeacherInputs, how: Codec, limit: int) -> Iterator[Block]:
    """The answers packed, a block a sample, from sample 0 on; `limit` samples are all there can be.

    Raises:
        UserError: a sample is missing, a row is not one of the teacher inputs, or its numbers are no log-probabilities.
    """
    expected = 0

    def nothing() -> Block | None:
        """The next sample, where it has no row: a masked sequence may have none, and nobody answers for it."""
        view = inputs.view(np.array([expected]))
        if expected >= limit or view.loss_mask_BS.any():
            return None
        return _block("", None, np.zeros(0, np.int64), inputs.viewer.digests(view), np.zeros(1, np.int64), how)

    for sample, rows in answers.samples():
        place = f"{answers.path}: sample {sample}"
        while expected < sample and (empty := nothing()):
            yield empty
            expected += 1
        if sample != expected or sample >= limit:
            raise UserError(
                f"{place}: expected sample {expected}, of {limit} in all; rows are wanted from sample 0 on, by "
                "rising sample, without gaps"
            )
        expected += 1
        view = inputs.view(np.array([sample]))
        index, token, ends = inputs.rows(view)
        order = np.argsort(rows["index"], kind="stable")
        if not np.array_equal(rows["index"][order], index):
            found, wanted = (", ".join(map(str, x[:8])) for x in (rows["index"][order], index))
            raise UserError(f"{place}: {len(order)} rows at {found} …; expected {len(index)} at {wanted} …")
        given = rows["token"][order]
        if not np.array_equal(given, token):
            at = int(np.flatnonzero(given != token)[0])
            raise UserError(
                f"{place}, index {index[at]}: the true token is said to be {given[at]}, but the corpus has "
                f"{token[at]}: these predictions were made from another input"
            )
        yield _block(place, rows, order, inputs.viewer.digests(view), ends, how)
    while empty := nothing():
        yield empty
        expected += 1


def _block(
    place: str, rows: dict[str, Any] | None, order: np.ndarray, digests: np.ndarray, ends: np.ndarray, how: Codec
) -> Block:
    if rows is None:
        return pack_block(how, how.empty(0), ends, digests, np.zeros(0, np.float32))
    lengths = rows["ids lengths"]
    if not np.array_equal(lengths, rows["logprobs lengths"]):
        raise UserError(f"{place}: ids and logprobs differ in length")
    kept = np.arange(how.k) < lengths[:, None]
    ids, logp = np.zeros(kept.shape, np.int64), np.full(kept.shape, -np.inf, np.float32)
    ids[kept], logp[kept] = rows["ids"], rows["logprobs"]
    ids, logp = ids[order], logp[order]
    held = logp > -np.inf
    if (held & ((ids < 0) | (ids >= how.vocabulary))).any():
        raise UserError(f"{place}: an id of {ids.max()}; the vocabulary has {how.vocabulary}")
    ordered = np.sort(np.where(held, ids, -1 - np.arange(how.k)), axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise UserError(f"{place}: an id stands twice in a row")
    mass = np.exp(logp.astype(np.float64)).sum(axis=1)
    if np.isnan(mass).any() or (mass > 1 + MASS_SLACK).any():
        raise UserError(
            f"{place}: the probabilities of a row sum to {mass.max():.4g}; natural log-probabilities are wanted"
        )
    first = logp.max(axis=1, initial=-np.inf).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = np.log(np.maximum(1 - mass, 0)) - first
    scalars = {"first": first, "tail@1": np.where(np.isfinite(first), tail, -np.inf)}
    if "truth" in how.scalars:
        scalars["truth"] = rows["truth"][order].astype(np.float64)
        if (scalars["truth"] > np.where(np.isfinite(first), first, 0) + MASS_SLACK).any():
            raise UserError(f"{place}: truth is above the log-probability of the most probable id in logprobs")
    try:
        planes, distortion_n = how.pack(ids, logp, scalars)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    return pack_block(how, planes, ends, digests, distortion_n)
