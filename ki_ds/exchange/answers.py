"""Answers of a teacher elsewhere: read, checked against the inputs that it was to be shown, and packed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ki_ds.errors import UserError
from ki_ds.exchange.parquet import ParquetReader
from ki_ds.exchange.teacher_inputs import TeacherInputs
from ki_ds.experiment.schema import MOST_IDS
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets.codec import Codec
from ki_ds.targets.scalars import Scalar
from ki_ds.targets.shard import FrameBlock, pack_block

MASS_SLACK = 1e-3


class Answers:
    """A Parquet file of rows, as `ki_ds.exchange.export` writes them; `truth` may be left out."""

    NEEDED = ("sample", "index", "token", "ids", "logprobs")

    def __init__(self, path: Path, samples: int, sequence_length: int):
        """Open it, and look through it once.

        Args:
            samples: all that there can be.

        Raises:
            UserError: it is not Parquet, is damaged, lacks a column, or claims more than there can be.
        """
        import pyarrow as pa

        self.path, self.sequence_length = path, sequence_length
        self.file = ParquetReader(path)
        names = set(self.file.schema.names)
        missing = [name for name in self.NEEDED if name not in names]
        if "sample" in missing and "position" in names:
            raise UserError(f"{path}: has a column position, which is now called sample: rename it")
        if missing:
            listed = ", ".join(sorted(names))
            draws = ". Draws (counts) cannot be imported" if "counts" in names else ""
            raise UserError(f"{path}: has the columns {listed}; missing: {', '.join(missing)}{draws}. "
                            "`ki-ds targets ask` writes the teacher inputs to answer")  # fmt: skip
        whole, fraction = pa.types.is_integer, pa.types.is_floating
        for name, kind in {
            "sample": whole, "index": whole, "token": whole, "truth": fraction, "ids": whole, "logprobs": fraction
        }.items():  # fmt: skip
            if name not in names:
                continue
            found = self.file.schema.field(name).type
            many = isinstance(found, pa.ListType | pa.LargeListType)
            if many != (name in ("ids", "logprobs")) or not kind(found.value_type if many else found):
                wanted = ("lists of " if name in ("ids", "logprobs") else "") + ("ints" if kind is whole else "floats")
                raise UserError(f"{path}: column {name}: expected {wanted}, found {found}")
        self.truth = "truth" in names
        self.columns = [*self.NEEDED, *(["truth"] if self.truth else [])]
        if self.file.rows > (most := samples * sequence_length):
            raise UserError(
                f"{path}: claims {self.file.rows} rows; {samples} samples of {sequence_length} tokens can have {most}"
            )
        self.checksums = self.file.check(self.columns)  # whether damage to its pages is seen
        self.longest, self.beside = self._extent()

    def _extent(self) -> tuple[int, bool]:
        """(k, the most ids of a row; whether rows have the true token beside these).

        vLLM's `prompt_logprobs` are k ids a row, and the prompt's own token as well where it is not among them: rows of
        k and of k + 1 ids, the true token in each, and the least probable in all that are longer.
        """
        lengths, beside, least = set[int](), True, dict[int, bool]()
        for table in self.file.batches(["token", "ids", "logprobs"]):
            rows = self._columns(table, ("token",))
            length = rows["ids lengths"]
            lengths |= set(np.unique(length).tolist())
            beside = beside and bool((length > 0).all()) and len(lengths) <= 2
            if not beside or not len(length):
                continue
            own = np.repeat(rows["token"], length) == rows["ids"]
            starts = np.cumsum(length) - length
            beside = bool((np.add.reduceat(own.astype(np.int64), starts) == 1).all())
            lowest = np.minimum.reduceat(rows["logprobs"], starts)
            for one in lengths if beside else ():
                here = length == one
                least[one] = least.get(one, True) and bool((rows["logprobs"][own] <= lowest)[here].all())
        longest = max(lengths, default=0)
        beside = beside and longest > 1 and lengths <= {longest, longest - 1} and least.get(longest, False)
        return longest - beside, beside

    def samples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(sample, its columns) one after the other, in the file's order.

        Raises:
            UserError: the file is damaged, or a sample has more rows than its sequence has tokens.
        """
        import pyarrow as pa

        rest: Any = None
        for batch in self.file.batches(self.columns):
            table = pa.concat_tables([rest, batch]).combine_chunks() if rest is not None else batch
            sample = self._numbers(table, "sample")
            cuts = [0, *(np.flatnonzero(np.diff(sample)) + 1).tolist()]
            for begin, end in pairwise(cuts):
                yield int(sample[begin]), self._shown(table.slice(begin, end - begin))
            rest = table.slice(cuts[-1])
            if len(rest) > self.sequence_length:
                raise UserError(f"{self.path}: sample {sample[-1]} has more rows than its sequence has tokens, "
                                f"{self.sequence_length}")  # fmt: skip
        if rest is not None and len(rest):
            yield int(self._numbers(rest, "sample")[0]), self._shown(rest)

    def _numbers(self, table: Any, name: str) -> np.ndarray:
        column = table.column(name)
        if column.null_count:
            raise UserError(f"{self.path}: column {name} has empty values")
        return np.asarray(column.to_numpy())

    def _columns(self, table: Any, names: tuple[str, ...]) -> dict[str, Any]:
        """Some columns, and ids and logprobs one row after the other beside their `ids lengths`."""
        found: dict[str, Any] = {name: self._numbers(table, name) for name in names}
        for name in ("ids", "logprobs"):
            column = table.column(name).combine_chunks()
            if column.null_count or column.flatten().null_count:
                raise UserError(f"{self.path}: column {name} has empty values")
            found[name] = np.asarray(column.flatten().to_numpy())
            found[f"{name} lengths"] = np.asarray(column.value_lengths().to_numpy()).astype(np.int64)
        if not np.array_equal(found["ids lengths"], found["logprobs lengths"]):
            raise UserError(f"{self.path}: ids and logprobs differ in length")
        if (most := int(found["ids lengths"].max(initial=0))) > MOST_IDS + 1:
            raise UserError(f"{self.path}: rows of up to {most} ids; expected 1 to {MOST_IDS}")
        return found

    def _shown(self, table: Any) -> dict[str, Any]:
        """The columns of a sample, without the true token beside the k most probable ids."""
        found = self._columns(table, ("index", "token", *(["truth"] if self.truth else [])))
        if self.beside:
            length = found["ids lengths"]
            own = np.repeat(found["token"], length) == found["ids"]
            kept = ~(own & np.repeat(length > self.longest, length))
            found |= {"ids": found["ids"][kept], "logprobs": found["logprobs"][kept]}
            found["ids lengths"] = np.minimum(length, self.longest)
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
    kept = np.arange(how.k) < rows["ids lengths"][:, None]
    ids, logp = np.zeros(kept.shape, np.int64), np.full(kept.shape, -np.inf, np.float32)
    ids[kept], logp[kept] = rows["ids"], rows["logprobs"]
    ids, logp, kept = ids[order], logp[order], kept[order]
    if (kept & ((ids < 0) | (ids >= how.vocabulary))).any():
        wrong = ids[kept & ((ids < 0) | (ids >= how.vocabulary))][0]
        raise UserError(f"{place}: an id of {wrong}; the vocabulary has {how.vocabulary}")
    ordered = np.sort(np.where(kept, ids, -1 - np.arange(how.k)), axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise UserError(f"{place}: an id stands twice in a row")
    with np.errstate(over="ignore"):
        mass = np.exp(logp.astype(np.float64)).sum(axis=1)
    if not (mass <= 1 + MASS_SLACK).all():  # so that none is NaN or above 0
        wrong = mass[~(mass <= 1 + MASS_SLACK)][0]
        raise UserError(f"{place}: the probabilities of a row sum to {wrong:.4g}; natural log-probabilities are wanted")
    first = logp.max(axis=1, initial=-np.inf).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = np.log(np.maximum(1 - mass, 0)) - first
    scalars: dict[Scalar, np.ndarray] = {"first": first, 1.0: np.where(np.isfinite(first), tail, -np.inf)}
    if how.stores("truth"):
        scalars["truth"] = rows["truth"][order].astype(np.float64)
        if not (scalars["truth"] <= np.where(np.isfinite(first), first, 0) + MASS_SLACK).all():
            raise UserError(
                f"{place}: truth is above the log-probability of the most probable id in logprobs, or not a number"
            )
    try:
        planes, distortion_n = pack_arrays(how, ids, logp, scalars)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    return pack_block(how, planes, ends, digests, distortion_n)
