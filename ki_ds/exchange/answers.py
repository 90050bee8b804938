"""Answers of a teacher elsewhere: read, checked against the inputs that it was to be shown, and packed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ki_ds.errors import UserError
from ki_ds.exchange.teacher_inputs import TeacherInputs
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets.codec import Codec
from ki_ds.targets.scalars import Scalar
from ki_ds.targets.shard import FrameBlock, pack_block

MASS_SLACK = 1e-3


class Answers:
    """A Parquet file of rows, as `ki_ds.exchange.export` writes them; `truth` may be left out."""

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
        if "sample" in missing and "position" in names:
            raise UserError(f"{path}: has a column position, which is now called sample: rename it")
        if missing:
            listed = ", ".join(sorted(names))
            raise UserError(f"{path}: has the columns {listed}; missing: {', '.join(missing)}. `ki-ds targets ask` "
                            "writes the teacher inputs to answer")  # fmt: skip
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


def blocks(answers: Answers, inputs: TeacherInputs, how: Codec, limit: int) -> Iterator[FrameBlock]:
    """The answers packed, a block a sample, from sample 0 on; `limit` samples are all there can be.

    Raises:
        UserError: a sample is missing, a row is not one of the teacher inputs, or its numbers are no log-probabilities.
    """
    expected = 0

    def nothing() -> FrameBlock | None:
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
) -> FrameBlock:
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
    scalars: dict[Scalar, np.ndarray] = {"first": first, 1.0: np.where(np.isfinite(first), tail, -np.inf)}
    if how.stores("truth"):
        scalars["truth"] = rows["truth"][order].astype(np.float64)
        if (scalars["truth"] > np.where(np.isfinite(first), first, 0) + MASS_SLACK).any():
            raise UserError(f"{place}: truth is above the log-probability of the most probable id in logprobs")
    try:
        planes, distortion_n = pack_arrays(how, ids, logp, scalars)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    return pack_block(how, planes, ends, digests, distortion_n)
