"""What a part of the GPU run is: rows in order of worth, each a name and what measures it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]  # JSON
Row = tuple[str, Callable[[], Figures]]
ROOT = Path(__file__).resolve().parents[2]
END = "KI_DS_PART_ENDS"  # the time, seconds since 1970, at which the part's budget ends


class NotHere(Exception):
    """A row cannot be measured on this machine; says why. The row is left out by name, the run goes on."""


@dataclass(frozen=True)
class Part:
    """A part. `rows(device, tiny)`: on "cuda", or tiny on a "cpu", where the same code proves that it runs."""

    name: str
    title: str
    seconds: float  # its budget; rows that are not begun by then stay open
    rows: Callable[[str, bool], Iterator[Row]]


def seconds_left() -> float:
    """Until the end of the part's budget."""
    return float(os.environ.get(END, time.time() + 600)) - time.time()


def apart(module: str, given: dict[str, Any]) -> Figures:
    """The figures that `measure(given)` of a module of this package finds in a process of its own, which takes its
    memory with it when it ends; ended where the part's time is over.

    Raises:
        NotHere: it said so.
        RuntimeError: it failed, with the end of what it said.
        TimeoutError: the part's time is over.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--measure", module, json.dumps(given)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=max(seconds_left(), 1))
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        raise TimeoutError(f"the part's time is over; the end of what was said: {said[-2000:]}") from None
    lines = said.splitlines()
    for line in reversed(lines):
        if line.startswith(ANSWER):
            answer: Figures = json.loads(line.removeprefix(ANSWER))
            if "not here" in answer:
                raise NotHere(answer["not here"])
            return answer
    raise RuntimeError(f"exit code {process.returncode}: " + "\n".join(lines[-40:]))


ANSWER = "figures: "


def answer(measure: Callable[[dict[str, Any]], Figures], given: dict[str, Any]) -> None:
    """The other side of `apart`: print the figures."""
    try:
        figures = measure(given)
    except NotHere as reason:
        figures = {"not here": str(reason)}
    print("\n" + ANSWER + json.dumps(figures), flush=True)
