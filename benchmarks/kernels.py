"""Measures the loss and the teacher's side: time and memory, as ratios to peers and floors in the same run.

    python benchmarks/kernels.py                     # the GPU where there is one, else the CPU
    python benchmarks/kernels.py --device cpu --repeats 9 --output cpu.json

Contenders take turns, and a figure is the median of its turns, so that a machine whose speed varies does so for all.
Forward and backward pass, gradients to hidden states and head. Memory is the peak above what the inputs hold: on a GPU
the allocator's, on a CPU the resident set's in a process of its own.

    products     the three bare matrix products: logits, dHidden, dWeight, by the same chunks or all at once
    ce           cross-entropy by the same function, α = 0
    ki           α = 0.5, K entries a row
    ki, again    as ki, but the forward pass keeps nothing and the backward pass computes all again
    dense ki     eager PyTorch: all logits, and the teacher's probabilities as a dense tensor
    dense ce     torch.nn.functional.cross_entropy on all logits
    liger ce     Liger's fused linear cross-entropy, where liger_kernel is installed (GPU)
    select       the teacher's side, top K with tails at τ = 1 and 2; beside it the bare head product
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch.nn.functional import cross_entropy, kl_div, linear
from torch.utils.checkpoint import checkpoint

from ki_ds.kernels import PackedTargets, ki_loss, select_targets
from ki_ds.kernels.logit_transform import logits_buffer
from ki_ds.kernels.loss import chunked
from ki_ds.sealed import versions
from ki_ds.targets.selection import Selection

ALPHA = 0.5


class Case(NamedTuple):
    """Sizes of one comparison."""

    rows: int
    hidden: int
    vocabulary: int
    k: int = 100
    dtype: str = "float32"
    temperature: float = 2.0
    tail: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        more = f", τ {self.temperature:g}" + (", tail" if self.tail else "")
        return f"N {self.rows:,}, D {self.hidden:,}, V {self.vocabulary:,}, K {self.k}, {self.dtype}{more}"


CPU = [
    Case(1024, 512, 50_265),
    Case(1024, 512, 50_265, temperature=1.0),
    Case(1024, 512, 50_265, temperature=3.0),
    Case(1024, 512, 50_265, tail=True),
    Case(1024, 512, 4_096),
]
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    CPU.append(Case(1024, 512, 50_265, dtype="bfloat16"))
GPU = [Case(8192, d, v, dtype="bfloat16") for d in (768, 1024, 4096) for v in (50_265, 128_256)]


class Inputs(NamedTuple):
    """What every contender reads."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    labels_N: torch.Tensor
    targets: PackedTargets
    alpha_N: torch.Tensor


def inputs(case: Case, device: str) -> Inputs:
    """Random hidden states and head; targets of rising distinct ids; logits of about a language model's spread."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.rows, case.hidden, generator=generator) * (2.0 / case.hidden**0.5)
    weight = torch.randn(case.vocabulary, case.hidden, generator=generator)
    gap = case.vocabulary // case.k
    ids = torch.arange(case.k) * gap + torch.randint(0, gap, (case.rows, case.k), generator=generator)
    targets = PackedTargets(
        (ids & 0xFFFF).to(torch.int32).to(torch.int16),
        (ids >> 16).to(torch.uint8) if case.vocabulary > 1 << 16 else None,
        torch.randint(0, 200, (case.rows, case.k), generator=generator).to(torch.uint8),
        torch.full((case.rows,), case.k, dtype=torch.int32),
        63 / 1024,
        torch.full((case.rows,), -1.0) if case.tail else None,
    )
    labels = torch.randint(0, case.vocabulary, (case.rows,), generator=generator)
    leaves = (hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_())
    return Inputs(*leaves, labels.to(device), targets.to(device), torch.full((case.rows,), ALPHA, device=device))


def dense_ki(x: Inputs, temperature: float) -> torch.Tensor:
    """Eager PyTorch, as the formula is usually written."""
    logits = linear(x.hidden_ND, x.weight_VD).float()
    logp, _ = x.targets.log_probabilities(temperature)
    teacher = torch.zeros_like(logits).scatter_(1, x.targets.ids(), logp.exp())
    ce = cross_entropy(logits, x.labels_N, reduction="sum")
    kl = kl_div((logits / temperature).log_softmax(dim=1), teacher, reduction="sum")
    return (1 - ALPHA) * ce + ALPHA * temperature**2 * kl


def products(x: Inputs, rows: int) -> Callable[[], None]:
    """Three products in the inputs' type into memory that is there already, nothing else."""
    hidden, weight = x.hidden_ND.detach(), x.weight_VD.detach()
    logits, grad_hidden = logits_buffer(rows, len(weight), hidden).zero_(), torch.zeros_like(hidden)
    grad_weight = torch.zeros_like(weight)

    def call() -> None:
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            some = logits[: len(part)]
            torch.mm(part, weight.T, out=some)
            torch.mm(some, weight, out=grad_hidden[start : start + rows])
            torch.addmm(grad_weight, some.T, part, out=grad_weight)

    return call


def contenders(case: Case, x: Inputs) -> dict[str, Callable[[], Any]]:
    """By name; each computes a loss and leaves gradients, but for the bare products."""

    def backward(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            x.hidden_ND.grad = x.weight_VD.grad = None
            loss().backward()

        return call

    def ki() -> torch.Tensor:
        return ki_loss(x.hidden_ND, x.weight_VD, None, x.labels_N, x.targets, x.alpha_N, case.temperature).loss

    size = chunked.chunk_rows(case.rows, case.vocabulary, x.hidden_ND)
    found = {
        "products": products(x, case.rows),
        "products by chunks": products(x, size),
        "ce": backward(lambda: ki_loss(x.hidden_ND, x.weight_VD, None, x.labels_N).loss),
        "ki": backward(ki),
        "ki, again": backward(lambda: checkpoint(lambda hidden: ki(), x.hidden_ND, use_reentrant=True)),
        "dense ce": backward(lambda: cross_entropy(linear(x.hidden_ND, x.weight_VD), x.labels_N, reduction="sum")),
    }
    if not case.tail:
        found["dense ki"] = backward(lambda: dense_ki(x, case.temperature))
    if x.hidden_ND.is_cuda:
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

            found["liger ce"] = backward(lambda: liger(x.hidden_ND, x.weight_VD, x.labels_N, reduction="sum"))
        except ImportError:
            print("liger_kernel is not installed: its row stays open")
    return found


def teachers(case: Case, x: Inputs) -> dict[str, Callable[[], Any]]:
    """The teacher's side and what it cannot do without."""
    how = Selection("top_k", case.k)
    hidden, weight = x.hidden_ND.detach(), x.weight_VD.detach()
    product = logits_buffer(case.rows, case.vocabulary, hidden).zero_()
    return {
        "head product": lambda: torch.mm(hidden, weight.T, out=product),
        "select": lambda: select_targets(hidden, weight, None, x.labels_N, how, 63 / 1024, (2.0,)),
    }


def wall_seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def device_seconds(call: Callable[[], Any]) -> float:
    """Of one call, between two events on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def timed(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each; they take turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):  # the first warms up
        for name, call in calls.items():
            seconds = device_seconds(call) if device == "cuda" else wall_seconds(call)
            if turn:
                found[name].append(seconds)
    return {name: statistics.median(times) for name, times in found.items()}


def peak_bytes(case: Case, name: str, device: str) -> int:
    """Above what the inputs hold, in this process."""
    x = inputs(case, device)
    call = contenders(case, x)[name]
    if device == "cuda":
        call()
        x.hidden_ND.grad = x.weight_VD.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    small = Case(32, 8, 64, 4, case.dtype)  # what libraries allocate at their first call does not count
    contenders(small, inputs(small, device))[name]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Bytes of this process, as Linux counts them."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what + ":"))
    return int(line.split()[1]) * 1024


def peak_elsewhere(case: Case, name: str, device: str) -> int:
    """`peak_bytes` in a process of its own."""
    command = [sys.executable, __file__, "--device", device, "--peak", json.dumps([name, list(case)])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def bandwidth(case: Case, x: Inputs) -> float:
    """Share of a device copy's bandwidth that the pass over the logits (read once, written once) reaches on a GPU."""
    from ki_ds.kernels import IDENTITY
    from ki_ds.kernels.loss.reference import Rows
    from ki_ds.kernels.loss.triton_loss import chunk_loss

    size = chunked.chunk_rows(case.rows, case.vocabulary, x.hidden_ND)
    product = logits_buffer(size, case.vocabulary, x.hidden_ND).normal_()
    rows = Rows.of(x.labels_N, x.targets, x.alpha_N, torch.float32).part(slice(0, size))
    one, other = (torch.zeros(size * case.vocabulary, dtype=product.dtype, device="cuda") for _ in range(2))
    calls = {
        "copy": lambda: other.copy_(one),
        "pass": lambda: chunk_loss(product, rows, case.temperature, IDENTITY, 1.0, True),
    }
    found = timed(calls, 20, "cuda")
    return found["copy"] / found["pass"]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, sizes = json.loads(arguments.peak)
        print(peak_bytes(Case(*sizes), name, arguments.device))
        return
    device, record = arguments.device, {}
    for case in GPU if device == "cuda" else CPU:
        x = inputs(case, device)
        calls = contenders(case, x)
        seconds = timed(calls, arguments.repeats, device)
        memory = {name: peak_elsewhere(case, name, device) for name in calls if not name.startswith("products")}
        floor = seconds["products"]
        table = [
            [name, f"{1e3 * s:.1f}", f"{s / floor:.2f}", f"{memory[name] / 2**20:.0f}" if name in memory else ""]
            for name, s in seconds.items()
        ]
        teacher = timed(teachers(case, x), arguments.repeats, device)
        table += [[name, f"{1e3 * s:.1f}", f"{s / teacher['head product']:.2f}", ""] for name, s in teacher.items()]
        print(f"\n{case.name}")
        print(tabulate(table, ["", "ms", "to products (teacher: to the head's)", "peak MiB"], tablefmt="github"))
        print(f"ki / ce {seconds['ki'] / seconds['ce']:.3f}")
        record[case.name] = {"seconds": seconds | teacher, "peak_bytes": memory}
        if device == "cuda":
            record[case.name]["bandwidth_share"] = bandwidth(case, x)
            print(f"pass over the logits: {record[case.name]['bandwidth_share']:.2f} of a device copy")
        del x, calls
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor()}, {os.cpu_count()} cores"
    about = {"machine": machine, "threads": torch.get_num_threads(), "versions": versions()}
    if arguments.output:
        arguments.output.write_text(json.dumps(about | {"cases": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
