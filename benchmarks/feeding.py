# ruff: noqa: E402
"""Whether the host keeps a GPU fed: the loader of training, and the host's side of the teach stage. On a CPU.

    python benchmarks/feeding.py
    python benchmarks/feeding.py --rate 1000000 --output feeding.json

A stand-in takes the GPU's place: it computes nothing, takes no core, and is done when a GPU would be.

    loader   rows a second that one thread reads, checks, decodes and collates; then training at --rate rows a second:
             the milliseconds a step that the stand-in waits for targets beyond the first batch
    teacher  a stand-in teacher, at the sequences a second that an H100 may reach: the share of that rate which the
             whole stage reaches; views, packing, zstd, disk and sealing are real

Targets are made up (benchmarks/gpu_parts/workload.py); medians of several steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import torch
from gpu_parts.record import commit
from gpu_parts.workload import Workload
from tabulate import tabulate

from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.experiment.schema import Distortion
from ki_ds.kernels.select.pack import Predictions
from ki_ds.launch import distributed
from ki_ds.sealed import Identity, versions
from ki_ds.teaching import asking, job
from ki_ds.teaching.batch_size import MicroBatchFinder
from ki_ds.teaching.parallel import Replicated
from ki_ds.teaching.teacher import Teacher

CPU = torch.device("cpu")
STEPS = 12
# name, workload, sequences a step, sequences at once
LOADED = [
    ("gpt-base: causal, V 50,257, S 1,024", Workload("gpt-tiny", "clm", 50_257, 1024, 32 * (STEPS + 3)), 32, 16),
    ("causal, V 151,936, S 1,024", Workload("gpt-tiny", "clm", 151_936, 1024, 32 * (STEPS + 3)), 32, 16),
    ("roberta: masked, V 50,265, S 512", Workload("roberta-tiny", "mlm", 50_265, 512, 256 * (STEPS + 3)), 256, 32),
]
# name, workload, sequences at once, sequences a second of the stand-in
TAUGHT = [
    ("roberta-base: masked, V 50,265, S 512", Workload("roberta-tiny", "mlm", 50_265, 512, 8192), 64, 4000.0),
    ("a Llama of 1 B: causal, V 128,256, S 512", Workload("gpt-tiny", "clm", 128_256, 512, 512), 16, 300.0),
]


def load(name: str, work: Workload, batch: int, micro: int, rate: float, folder: Path) -> dict[str, Any]:
    """Of one workload."""
    targets = work.stored_targets(folder)
    layout = BatchLayout(batch, micro, 0, 1)
    loader = work.loader(layout, lambda step: 0.5, targets)
    rows = sum(len(one.rows_N) for one in loader.load(0, 0.5))
    seconds = []
    for step in range(1, STEPS + 1):
        began = time.perf_counter()
        loader.load(step, 0.5)
        seconds.append(time.perf_counter() - began)
    with closing(loader):
        loader(0)
        loader.waited_s, began = 0.0, time.perf_counter()
        for step in range(1, STEPS + 1):
            time.sleep(rows / rate)
            loader(step)
        took = time.perf_counter() - began
    return {
        "workload": name, "rows a step": rows, "rows a second, one thread": rows / statistics.median(seconds),
        "asked, rows a second": rate, "reached": rows * STEPS / took,
        "waited, ms a step": 1e3 * loader.waited_s / STEPS,
    }  # fmt: skip


class StandIn:
    """A device that does one thing after the other, beside the host, and has said what was made ready."""

    def __init__(self, work: Workload, micro: int, rate: float):
        most, self.rate, self.free, self.scalars = micro * work.length, rate, 0.0, work.header.codec.scalars
        planes = work.planes(most, 0)
        self.ids, self.values = torch.from_numpy(planes.ids_nK.view("int16")), torch.from_numpy(planes.values_nK)
        self.high = None if planes.high_nK is None else torch.from_numpy(planes.high_nK)
        self.counts, self.zeros = torch.full((most,), work.k, dtype=torch.int32), torch.zeros(most)

    def ask(self, teacher: Any, asked: asking.Question, device: torch.device) -> asking.Answer:
        """In `asking.ask`'s place: the work is on its way."""
        n = len(asked.rows)
        found = Predictions(
            self.ids[:n], None if self.high is None else self.high[:n], self.values[:n], self.counts[:n],
            dict.fromkeys(self.scalars, self.zeros[:n]), self.zeros[:n],
        )  # fmt: skip
        begin = max(self.free, time.perf_counter())
        self.free = begin + len(asked.samples) / self.rate
        return asking.Answer(asked, found, 0.0, Event(begin), Event(self.free))


class Event:
    """In the place of one of CUDA's."""

    def __init__(self, at: float):
        self.at = at

    def synchronize(self) -> None:
        """Wait for it, on no core."""
        time.sleep(max(self.at - time.perf_counter(), 0))

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1e3 * (end.at - self.at)


def taught(name: str, work: Workload, micro: int, rate: float, folder: Path) -> dict[str, Any]:
    """Of one teacher."""
    job.ask = StandIn(work, micro, rate).ask  # type: ignore[assignment]
    teacher = Teacher(lambda *_: None, Replicated(), MicroBatchFinder(micro, False, True), lambda: None)  # type: ignore
    bound = Distortion.model_validate({})

    def seconds(samples: int, place: str) -> float:
        told = job.TeachJob(lambda _: teacher, "teacher", work.tokens, work.stream, work.viewer, samples, 2048,
                            work.spec.selection, work.header, bound)  # fmt: skip
        began = time.perf_counter()
        job.teach(folder / place, Identity("targets", {}, {}), told, CPU)
        return time.perf_counter() - began

    seconds(micro, "warm")
    took = statistics.median(seconds(work.samples, f"all {turn}") for turn in range(3))
    return {"workload": name, "sequences a second of the stand-in": rate, "reached": work.samples / took,
            "share": work.samples / took / rate}  # fmt: skip


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=500_000.0, help="rows a second that the stand-in trains on")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    distributed.quiet()
    loaded, teachers = [], []
    for case in LOADED:
        with tempfile.TemporaryDirectory() as folder:
            loaded.append(load(*case, arguments.rate, Path(folder)))
    for one in TAUGHT:
        with tempfile.TemporaryDirectory() as folder:
            teachers.append(taught(*one, Path(folder)))
    for table in (loaded, teachers):
        print(tabulate(table, headers="keys", tablefmt="github", floatfmt=",.3g", intfmt=","), end="\n\n")
    about = {"commit": commit(), "versions": versions(), "cores": os.cpu_count(), "machine": platform.processor()}
    if arguments.output:
        arguments.output.write_text(json.dumps({**about, "loader": loaded, "teacher": teachers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
