"""What is there, and what this card does at best: later figures are shares of it."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timing import device_seconds, wall_seconds

from gpu_parts.part import Figures, Row

TURNS = 15


def rows(device: str, tiny: bool) -> Iterator[Row]:
    """`ki-ds doctor`; a product in each type; a device copy; a copy from pinned host memory."""
    yield "doctor", doctor
    size = 64 if tiny else 8192
    for dtype in ("bfloat16", "float16", "float32"):
        yield f"product {dtype}", partial(product, device, size, dtype)
    yield "device copy", partial(device_copy, device, 1 << 16 if tiny else 1 << 30)
    yield "copy from pinned memory", partial(host_copy, device, 1 << 16 if tiny else 1 << 28)


def doctor() -> Figures:
    """What `ki-ds doctor` says."""
    done = subprocess.run([sys.executable, "-m", "ki_ds.cli", "doctor"], capture_output=True, text=True, timeout=120)
    return {"exit code": done.returncode, "said": done.stdout.splitlines()[-60:]}


def median(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call, after two that warm up."""
    clock = device_seconds if device == "cuda" else wall_seconds
    times = [clock(call) for _ in range(TURNS + 2)]
    return statistics.median(times[2:])


def product(device: str, size: int, dtype: str) -> Figures:
    """TFLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    seconds = median(lambda: torch.mm(a, b, out=out), device)
    return {"size": size, "seconds": seconds, "TFLOP/s": 2 * size**3 / seconds / 1e12}


def device_copy(device: str, count: int) -> Figures:
    """GB/s, bytes read and bytes written both counted."""
    one, other = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = median(lambda: other.copy_(one), device)
    return {"bytes": count, "seconds": seconds, "GB/s": 2 * count / seconds / 1e9}


def host_copy(device: str, count: int) -> Figures:
    """GB/s to the device."""
    host = torch.zeros(count, dtype=torch.uint8, pin_memory=device == "cuda")
    other = torch.zeros(count, dtype=torch.uint8, device=device)
    seconds = median(lambda: other.copy_(host, non_blocking=True), device)
    return {"bytes": count, "seconds": seconds, "GB/s": count / seconds / 1e9}
