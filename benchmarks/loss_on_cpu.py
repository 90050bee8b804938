"""Measures the loss and the teacher's side on a CPU: time and memory, as ratios to peers and floors in the same run.

    python benchmarks/loss_on_cpu.py
    python benchmarks/loss_on_cpu.py --repeats 9 --output cpu.json
    python benchmarks/gpu.py --only loss-speed       # the same on a GPU, and more peers

Contenders take turns, and a figure is the median of its turns, so that a machine whose speed varies does so for all.
Forward and backward pass, gradients to hidden states and head. Memory is the peak above what the inputs hold: the
resident set's in a process of its own. What the names mean stands in loss_contenders.py; beside them

    select       the teacher's side, top K with tails at τ = 1 and 2; beside it the bare head product
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from loss_contenders import Case, backward, inputs, losses, products, select_contenders
from tabulate import tabulate
from timing import timed

from ki_ds.kernels.loss import chunked
from ki_ds.sealed import versions

CPU = [
    Case(1024, 512, 50_265),
    Case(1024, 512, 50_265, temperature=1.0),
    Case(1024, 512, 50_265, temperature=3.0),
    Case(1024, 512, 50_265, tail=True),
    Case(1024, 512, 4_096),
]
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    CPU.append(Case(1024, 512, 50_265, dtype="bfloat16"))


def peak_bytes(case: Case, name: str) -> int:
    """Above what the inputs hold, in this process."""
    x = inputs(case, "cpu")
    call = backward(x, losses(case, x, compiled=False)[name])
    small = Case(32, 8, 64, 4, case.dtype)  # what libraries allocate at their first call does not count
    other = inputs(small, "cpu")
    backward(other, losses(small, other, compiled=False)[name])()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Bytes of this process, as Linux counts them."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what + ":"))
    return int(line.split()[1]) * 1024


def peak_elsewhere(case: Case, name: str) -> int:
    """`peak_bytes` in a process of its own."""
    command = [sys.executable, __file__, "--peak", json.dumps([name, list(case)])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, sizes = json.loads(arguments.peak)
        print(peak_bytes(Case(*sizes), name))
        return
    record = {}
    for case in CPU:
        x = inputs(case, "cpu")
        chosen = losses(case, x, compiled=False)
        size = chunked.chunk_rows(case.rows, case.vocabulary, x.hidden_ND)
        calls = {"products": products(x, case.rows), "products by chunks": products(x, size)}
        calls |= {name: backward(x, loss) for name, loss in chosen.items()}
        seconds = timed(calls, arguments.repeats, "cpu")
        memory = {name: peak_elsewhere(case, name) for name in chosen}
        floor = seconds["products"]
        table = [
            [name, f"{1e3 * s:.1f}", f"{s / floor:.2f}", f"{memory[name] / 2**20:.0f}" if name in memory else ""]
            for name, s in seconds.items()
        ]
        teacher = timed(select_contenders(case, x), arguments.repeats, "cpu")
        table += [[name, f"{1e3 * s:.1f}", f"{s / teacher['head product']:.2f}", ""] for name, s in teacher.items()]
        print(f"\n{case.name}")
        print(tabulate(table, ["", "ms", "to products (teacher: to the head's)", "peak MiB"], tablefmt="github"))
        print(f"ki / ce {seconds['ki'] / seconds['ce']:.3f}")
        record[case.name] = {"seconds": seconds | teacher, "peak_bytes": memory}
        del x, calls, chosen
    about = {"machine": f"{platform.processor()}, {os.cpu_count()} cores", "threads": torch.get_num_threads()}
    if arguments.output:
        arguments.output.write_text(json.dumps(about | {"versions": versions(), "cases": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
