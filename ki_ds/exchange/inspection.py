"""What a targets folder holds, in figures and in a few rows to look at; and how fast it is read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ki_ds.errors import UserError
from ki_ds.exchange.teacher_inputs import TeacherInputs
from ki_ds.targets import codec
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.shard import INDEX, MOST_SLOTS

SAMPLE = 256  # samples that statistics are taken from
PARTS = (
    "counts and scalars, high bytes", "counts and scalars, low bytes", "ids, lowest bytes", "ids, second bytes",
    "ids, third bytes", "values",
)  # fmt: skip


def probabilities(how: Codec, planes: Planes) -> np.ndarray:
    """float64 [n, K] of the kept ids at temperature 1 (or the draws' own), renormalised; 0 where none holds."""
    weights = planes.values_nK.astype(np.float64) if how.counts else np.exp(-how.below(planes).astype(np.float64))
    weights = np.where(planes.kept(), weights, 0)
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)


def statistics(shards: ShardFolder) -> dict[str, Any]:
    """Means over the rows of evenly spaced samples, and the bytes that each part of a frame takes on disk."""
    if not shards.samples:
        raise UserError(f"{shards.folder}: holds no sample")
    how, zstd = shards.codec, codec.compressor()
    most = max(min(SAMPLE, MOST_SLOTS // (shards.shard(0).header.folder.sequence_length * how.k), shards.samples), 1)
    samples = np.unique(np.linspace(0, shards.samples - 1, most).astype(np.int64))
    planes = next(shards.parts(samples)) if most == 1 else shards.read(samples).planes  # a part of it, if it is huge
    rows = len(planes)
    ends = np.minimum(np.cumsum(shards.entries(samples)["rows"], dtype=np.int64), rows)
    size = dict.fromkeys(PARTS, 0)
    names = [*PARTS[:4], *(PARTS[4:5] if planes.high_nK is not None else ()), PARTS[5]]
    total = 0
    for parts in how.encode(planes, ends):
        pieces = [len(piece) for piece in codec.compress(zstd, parts)]
        for name, piece in zip(names, pieces, strict=False):  # the last is the frame's end
            size[name] += piece
        total += sum(pieces) + INDEX.itemsize
    entries = int(planes.count_n.sum(dtype=np.int64))
    p = probabilities(how, planes)
    some = planes.count_n > 0
    found: dict[str, Any] = {
        "samples": shards.samples, "shards": len(shards), "samples_read": len(samples), "rows": rows,
        "entries_per_row": entries / max(rows, 1), "bytes_per_row": total / max(rows, 1),
        "bytes_per_entry": total / max(entries, 1),
        "bytes_per_entry_of": {name: size[name] / max(entries, 1) for name in names},
        "entropy": _mean(-np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=1)[some]),
    }  # fmt: skip
    for name in how.scalars:
        nats = how.scalar(planes, name).astype(np.float64)
        if name == 1:
            found["mass_kept"] = _mean(1 - np.exp(nats + how.scalar(planes, "first"))[some])
        elif name == "truth":
            found["teacher_loss"] = -_mean(nats)
            found["teacher_perplexity"] = float(np.exp(min(-_mean(nats), 700)))
        elif name == "first":
            found["largest_probability"] = _mean(np.exp(nats))
    return found


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


@dataclass(frozen=True)
class Row:
    """One decoded row."""

    sample: int
    index: int | None  # in its sequence
    token: int | None  # the true one
    truth: float | None  # its log-probability
    ids: list[int]  # in order of falling probability
    p: list[float]  # at temperature 1; of draws, their share


def rows(shards: ShardFolder, sample: int, count: int, inputs: TeacherInputs | None, most: int = 8) -> list[Row]:
    """The first rows of a sample, each with its most probable ids."""
    how, planes = shards.codec, next(shards.parts(np.array([sample]))).rows(slice(0, count))
    p = probabilities(how, planes) if how.counts else np.exp(how.log_probabilities(planes))
    ids = planes.ids()
    index, tokens = (None, None) if inputs is None else inputs.rows(inputs.view(np.array([sample])))[:2]
    truth = how.scalar(planes, "truth") if how.stores("truth") else None
    found = []
    for row in range(len(planes)):
        order = np.argsort(-p[row], kind="stable")[: min(most, int(planes.count_n[row]))]
        found.append(
            Row(
                sample,
                None if index is None else int(index[row]),
                None if tokens is None else int(tokens[row]),
                None if truth is None else float(truth[row]),
                ids[row][order].tolist(),
                p[row][order].tolist(),
            )
        )
    return found


def bench(shards: ShardFolder, seconds: float = 5.0, batch: int = 16) -> dict[str, float]:
    """Reads as a training run does, from the first sample on, on one thread: rows
    a second, decoded to packed planes, and the megabytes of planes that this makes."""
    if not shards.samples:
        raise UserError(f"{shards.folder}: holds no sample")
    shards.shard(0)
    done = rows = size = 0
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        start = done % max(shards.samples - batch + 1, 1)
        for planes in shards.parts(np.arange(start, min(start + batch, shards.samples))):
            rows += len(planes)
            size += planes.ids_nK.nbytes + planes.values_nK.nbytes
            size += 0 if planes.high_nK is None else planes.high_nK.nbytes
        done += batch
    return {"rows": rows, "seconds": spent, "rows_per_second": rows / spent, "megabytes_per_second": size / spent / 1e6}
