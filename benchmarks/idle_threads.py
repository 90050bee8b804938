"""How fast a model trains on a CPU when OpenMP's idle threads spin or sleep, on this machine as it is and with busy
neighbours.

    python benchmarks/idle_threads.py
    python benchmarks/idle_threads.py --rounds 5 --seconds 20 --neighbours 4

Between two parallel loops a thread of OpenMP waits. By default it spins for milliseconds; where another process wants
the core, that time is taken from those who work. OMP_WAIT_POLICY=PASSIVE lets it sleep at once. The OpenMP runtime
reads its environment when it is loaded, so every measurement is a process of its own; the settings take turns in every
round, so that whatever else runs on the machine meets all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
}
READ_BY_OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
MODEL = {"model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4}
VOCABULARY, LENGTH, SEQUENCES, WARMUP_STEPS, LEAST_STEPS = 2048, 64, 16, 2, 2


def main() -> None:
    """A table: median steps per second of each setting, and relative to the default."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    given.add_argument("--rounds", type=int, default=3)
    given.add_argument("--seconds", type=float, default=8.0, help="of training, a measurement")
    given.add_argument("--neighbours", type=int, default=cores, help="busy processes; default: one a core")
    given.add_argument("--measure", action="store_true", help="one measurement, in this process")
    a = given.parse_args()
    if a.measure:
        print("measured", measure(a.seconds))
        return
    cases = [(neighbours, name) for neighbours in (0, a.neighbours) for name in SETTINGS]
    rates: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    loads = []
    for number in range(a.rounds):
        for neighbours, name in cases if number % 2 == 0 else cases[::-1]:  # no setting is always the first
            loads.append(os.getloadavg()[0])
            with busy(neighbours):
                rates[neighbours, name].append(measured_apart(SETTINGS[name], a.seconds))
            print(f"round {number}, {neighbours} neighbours, {name}: {rates[neighbours, name][-1]:.2f}", flush=True)
    report(rates, cores, loads)


def report(rates: dict[tuple[int, str], list[float]], cores: int, loads: list[float]) -> None:
    """Print versions, the machine, and the table."""
    import torch
    from tabulate import tabulate

    print(f"\ntorch {torch.__version__}, Python {platform.python_version()}, {cores} cores, {platform.platform()}")
    print(f"load average while measuring: {min(loads):.1f} to {max(loads):.1f}, with what the benchmark started itself")
    rows = []
    for (neighbours, name), found in rates.items():
        default = rates[neighbours, "default"]
        ratios = [one / other for one, other in zip(found, default, strict=True)]
        middle = [statistics.median(found), min(found), max(found), statistics.median(ratios)]
        rows.append([neighbours, name, *middle])
    head = ["neighbours", "setting", "steps/s, median", "least", "most", "times the default, median of rounds"]
    print(tabulate(rows, head, tablefmt="pipe", floatfmt=".2f"))


@contextlib.contextmanager
def busy(neighbours: int) -> Iterator[None]:
    """So many processes that use a core each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measured_apart(setting: dict[str, str], seconds: float) -> float:
    """Steps per second of a process of its own, with nothing but this setting for OpenMP."""
    environment = {key: value for key, value in os.environ.items() if key not in READ_BY_OPENMP} | setting
    command = [sys.executable, __file__, "--measure", "--seconds", str(seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("measured")).split()[1])


def measure(seconds: float) -> float:
    """Steps per second of training a small causal model in fp32, with as many threads as there are cores."""
    import torch

    from ki_ds.corpus import tokenizer as tokenizers
    from ki_ds.models import architectures, hugging_face
    from ki_ds.models.language_model import LanguageModel

    described: Any = tokenizers.expected(VOCABULARY, "clm")
    config = architectures.configuration(MODEL, "clm", described, LENGTH, "benchmark")
    model = LanguageModel(hugging_face.new_model(config, "clm", seed=1), VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(5, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(ids.numel())
    steps, began = -WARMUP_STEPS, 0.0
    while steps < LEAST_STEPS or time.perf_counter() - began < seconds:
        if steps == 0:
            began = time.perf_counter()
        loss = model(ids, rows, torch.roll(ids.flatten(), -1), None, None, 1.0).loss / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
