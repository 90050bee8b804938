"""Measures the stored form of teacher predictions: bytes, distortion, and speed of packing and reading.

    python benchmarks/targets.py                                            # workload (a), synthetic
    python benchmarks/targets.py --experiment E.json --workdir W --teacher T --corpus C    # (b), a trained teacher

(a) are rows over 50,265 ids with logits -0.9 ln(rank + 10) + 2.2 N(0, 1), of which 8 random ids are raised by
5 |N(0, 1)|. Speeds are rows a second of one thread's CPU time, medians of several passes; beside them
stands a plain format (int32 ids and fp16 log-probabilities, zstd level 3) measured in the same run. Bytes count
everything in the files. Draws at τ = 0.535 on (a) give the 12 distinct ids a row that the method's authors
report for a large model; at τ = 1 its rows are flatter than a language model's. Writes a JSON file with --output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from tabulate import tabulate

from ki_ds.kernels.select.eager import select
from ki_ds.kernels.select.pack import Selected, pack, planes_of
from ki_ds.sealed import versions
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.selection import Selection
from ki_ds.targets.shard import pack_block, shard_name, write_shard
from ki_ds.targets.spec import TargetSpec

K, DRAWS, TEMPERATURE, MEAN_NATS = 128, 50, 2.0, 2e-4
ROWS = 77  # a sample: 15 % of 510 tokens
BATCH = 16  # samples packed and read at once
PASSES = 5
SELECTIONS = {
    "top_k 128": Selection("top_k", K),
    "top_p 0.9, k 128": Selection("top_p", K, p=0.9),
    "sampled 50, tau 1": Selection("sampled", DRAWS, temperature=1.0),
    "sampled 50, tau 0.535": Selection("sampled", DRAWS, temperature=0.535),
}

Workload = list[dict[str, Selected]]  # micro-batches of BATCH · ROWS rows, by selection


def select_all(logits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> dict[str, Selected]:
    """Every selection of the same rows."""
    uniforms = torch.rand(len(labels), DRAWS, generator=generator, dtype=torch.float64)
    return {
        name: select(logits, labels, chosen, (1.0, TEMPERATURE), uniforms) for name, chosen in SELECTIONS.items()
    }  # fmt: skip


def joined(parts: list[dict[str, Selected]]) -> dict[str, Selected]:
    """Rows one after the other."""
    found = {}
    for name in SELECTIONS:
        some = [part[name] for part in parts]
        scalars = {key: torch.cat([one.scalars[key] for one in some]) for key in some[0].scalars}
        found[name] = Selected(torch.cat([s.ids_NK for s in some]), torch.cat([s.given_NK for s in some]), scalars)
    return found


def synthetic(batches: int) -> tuple[int, Workload]:
    """Workload (a); the true token is drawn from the row's own distribution."""
    vocabulary, made = 50_265, []
    generator = torch.Generator().manual_seed(0)
    base = -0.9 * torch.log(torch.arange(vocabulary) + 10.0)
    for _ in range(batches):
        parts = []
        for _ in range(BATCH):
            logits = base + 2.2 * torch.randn(ROWS, vocabulary, generator=generator)
            raised = torch.rand(ROWS, vocabulary, generator=generator).topk(8, dim=1).indices
            logits.scatter_add_(1, raised, 5 * torch.randn(ROWS, 8, generator=generator).abs())
            labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
            parts.append(select_all(logits, labels, generator))
        made.append(joined(parts))
    return vocabulary, made


@torch.inference_mode()
def trained(arguments: argparse.Namespace, batches: int) -> tuple[int, Workload]:
    """Workload (b): a teacher of an experiment over its corpus, as the teach stage sees it."""
    from ki_ds.experiment.graph import load_experiment
    from ki_ds.models.language_model import LanguageModel
    from ki_ds.stages import models
    from ki_ds.workspace import Workspace

    space = Workspace(load_experiment(arguments.experiment), arguments.experiment, arguments.workdir.absolute())
    model = LanguageModel(models.finished(space, arguments.teacher).eval(), space.tokenizer.size, arguments.teacher)
    tokens, stream, viewer = (
        space.tokens(arguments.corpus),
        space.stream(arguments.corpus),
        space.viewer(arguments.corpus),
    )
    weight, bias = model.head.parameters_VD()
    generator, sample, made = torch.Generator().manual_seed(0), 0, []
    for _ in range(batches):
        parts, rows = [], 0
        while rows < BATCH * ROWS:
            sequences, views = stream.pairs(np.arange(sample, sample + 4))
            view = viewer(tokens.train[sequences], sequences, views)
            index = np.flatnonzero(view.loss_mask_BS)[: BATCH * ROWS - rows]
            labels = torch.from_numpy(view.labels_BS.reshape(-1)[index].astype(np.int64))
            hidden = model.hidden(torch.from_numpy(view.inputs_BS.astype(np.int64)), torch.from_numpy(index))
            parts.append(select_all(torch.nn.functional.linear(hidden, weight, bias), labels, generator))
            rows, sample = rows + len(index), sample + 4
        made.append(joined(parts))
    return space.tokenizer.size, made


def speed(work: Callable[[], Any], rows: int) -> float:
    """Rows a second of this thread's CPU time, median."""
    work()
    seconds = []
    for _ in range(PASSES):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return rows / statistics.median(seconds)


def measure(name: str, vocabulary: int, workload: Workload, folder: Path) -> dict[str, Any]:
    """One selection of one workload."""
    selection = SELECTIONS[name]
    how = TargetSpec(selection, (1.0, TEMPERATURE), MEAN_NATS, len(workload) * BATCH).codec(vocabulary)
    ends, digests = np.arange(ROWS, BATCH * ROWS + 1, ROWS), np.arange(BATCH, dtype=np.uint64)
    chosen = [one[name] for one in workload]

    def encode() -> list[Any]:
        blocks = []
        for one in chosen:
            found = pack(one, how.k, how.quantum, how.temperatures, vocabulary > 1 << 16)
            blocks.append(pack_block(how, planes_of(found, how), ends, digests, found.distortion_N.numpy()))
        return blocks

    samples = len(workload) * BATCH
    header = FolderHeader(512, how, selection=selection)
    path = folder / shard_name(0, samples)
    said = write_shard(path, header, 0, encode())
    shards = ShardFolder(folder, samples, samples)

    def decode() -> None:
        for start in range(0, samples, BATCH):
            shards.read(np.arange(start, start + BATCH))

    rows, size = said.rows, path.stat().st_size
    return {
        "selection": name, "entries a row": said.entries / rows, "bytes an entry": size / said.entries,
        "bytes a row": size / rows, "mean KL": said.distortion.mean, "max KL": said.distortion.max,
        "encode/s": speed(encode, rows), "decode/s": speed(decode, rows),
    }  # fmt: skip


def plain(workload: Workload) -> dict[str, Any]:
    """The floor: int32 ids and fp16 log-probabilities of the top k, a zstd frame (level 3) a sample."""
    zstd, unzstd = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    given = [(one["top_k 128"].ids_NK.numpy(), one["top_k 128"].given_NK.numpy()) for one in workload]

    def encode() -> list[tuple[bytes, bytes]]:
        return [
            (zstd.compress(i.astype("<i4").tobytes()), zstd.compress(v.astype("<f2").tobytes()))
            for ids, values in given
            for i, v in zip(np.split(ids, BATCH), np.split(values, BATCH), strict=True)
        ]

    stored = encode()

    def decode() -> None:
        for ids, values in stored:
            np.frombuffer(unzstd.decompress(ids), "<i4"), np.frombuffer(unzstd.decompress(values), "<f2")

    rows = sum(len(ids) for ids, _ in given)
    size = sum(len(ids) + len(values) for ids, values in stored)
    return {
        "selection": "int32 + fp16, zstd", "entries a row": float(K), "bytes an entry": size / rows / K,
        "bytes a row": size / rows, "mean KL": None, "max KL": None,
        "encode/s": speed(encode, rows), "decode/s": speed(decode, rows),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--teacher")
    parser.add_argument("--corpus")
    parser.add_argument("--batches", type=int, default=4, help=f"of {BATCH} sequences with {ROWS} rows each")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.experiment:
        if not (arguments.workdir and arguments.teacher and arguments.corpus):
            parser.error("--experiment needs --workdir, --teacher and --corpus")
        label = f"{arguments.experiment.stem}: {arguments.teacher} on {arguments.corpus}"
        vocabulary, workload = trained(arguments, arguments.batches)
    else:
        label = "(a) synthetic"
        vocabulary, workload = synthetic(arguments.batches)
    rows = [plain(workload)]
    for name in SELECTIONS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, vocabulary, workload, Path(folder)))
    print(f"{label}; V = {vocabulary:,}, {arguments.batches * BATCH * ROWS:,} rows, one thread")
    shown = [{k: f"{v:,.0f}" if k.endswith("/s") else v for k, v in row.items()} for row in rows]
    print(tabulate(shown, headers="keys", tablefmt="github", floatfmt=".3g"))
    if arguments.output:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        record = {
            "workload": label, "vocabulary": vocabulary, "rows": rows, "commit": commit, "versions": versions(),
            "python": platform.python_version(), "processor": processor(), "cores": os.cpu_count(),
        }  # fmt: skip
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
