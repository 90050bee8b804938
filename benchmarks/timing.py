"""Seconds of calls, on a GPU by its own clock; contenders take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Container
from typing import Any

import torch


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


def left_out(calls: dict[str, Callable[[], Any]], needed: Container[str] = ()) -> dict[str, str]:
    """Take out the calls that this machine cannot do, for want of memory or whatever they raise: why, by name. What one
    that is `needed` raises comes through."""
    found = {}
    for name in list(calls):
        try:
            calls[name]()
        except Exception as error:  # a peer may fail in any way
            if name in needed:
                raise
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del calls[name]
    return found
