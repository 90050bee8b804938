# ruff: noqa: E402
"""Everything that a GPU must show, part by part in order of worth; results are written at once, and a run goes on.

    python benchmarks/gpu.py --minutes 38        # all parts, as far as the minutes go
    python benchmarks/gpu.py                     # again: what is missing; then docs/results/gpu.md is drawn anew
    python benchmarks/gpu.py --only loss-speed   # one part; several: --only A --only B
    python benchmarks/gpu.py --page              # measure nothing, draw the page from the files of results
    python benchmarks/gpu.py --tiny --output DIR # seconds each on a CPU: proves that every part runs; measures nothing

Each part runs in a process of its own, so that a kernel that hangs or breaks the device costs one row. A row that fails
is recorded with its traceback, and the next one runs; what this machine lacks (a GPU, memory, a peer's package, a
program) is recorded by name. The exit code is 1 where a row failed. Results lie in docs/results/gpu/<GPU>-<date>.json;
those of another card, driver, commit or version go to another file. `--again` measures what was measured anew.
Without a checkout, KI_DS_COMMIT says the commit. runners/gpu.sh sets all up beside a torch that is there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from gpu_parts.page import write_page
from gpu_parts.part import END, NotHere, Part, answer, seconds_left
from gpu_parts.parts import PARTS
from gpu_parts.record import FOLDER, NOW, Record, asked

LEAST_SECONDS = 20.0  # what is left of the minutes for a part to begin


def main() -> int:
    """Measure, or draw the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--only", action="append", choices=names, help="a part; may be given several times")
    parser.add_argument("--minutes", type=float, help="of all parts together; default: the sum of their budgets")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU; needs --output")
    parser.add_argument("--again", action="store_true", help="measure what was measured already, too")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--page", action="store_true", help="only draw docs/results/gpu.md anew")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # a part, and the file of results
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # a module, and what it is given
    given = parser.parse_args()
    if given.measure:
        answer(importlib.import_module(f"gpu_parts.{given.measure[0]}").measure, json.loads(given.measure[1]))
        return 0
    if given.part:
        work(next(part for part in PARTS if part.name == given.part[0]), Record.read(Path(given.part[1])))
        return 0
    if given.page:
        print(f"{write_page()} written")
        return 0
    if given.tiny and given.output == FOLDER:
        parser.error("--tiny measures nothing that docs/results/gpu could say; give --output DIR")
    record = Record.open(given.output, given.tiny)
    chosen = [part for part in PARTS if not given.only or part.name in given.only]
    if given.again:
        for part in chosen:
            record.data["parts"].pop(part.name, None)
    record.save()
    print(f"{record.data['about']['gpu'] or 'no CUDA GPU'}; results: {record.path}", flush=True)
    ends = time.time() + (sum(part.seconds for part in chosen) if given.minutes is None else 60 * given.minutes)
    for part in chosen:
        left = ends - time.time()
        if left < LEAST_SECONDS:
            print(f"{part.name}: not begun, the minutes are over")
            continue
        run(part, record, time.time() + min(part.seconds, left))
        record = Record.read(record.path)
    if given.output == FOLDER:
        print(f"{write_page()} written")
    return 1 if told(record, chosen) else 0


def run(part: Part, record: Record, ends: float) -> None:
    """A part in processes of its own, begun again after one that broke, as long as each settles a row."""
    print(f"\n{part.name}: {part.title}", flush=True)
    rows = record.rows(part.name)
    for name in [name for name, row in rows.items() if row["state"] in ("begun", "cut off")]:
        del rows[name]  # of an earlier run: it is tried again
    record.note(part.name, before=asked(NOW))
    while time.time() < ends:
        command = [sys.executable, __file__, "--part", part.name, str(record.path)]
        process = subprocess.Popen(
            command, env={**os.environ, END: str(ends)}, start_new_session=True, cwd=HERE.parent
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(ends - time.time(), 1) + 5)
            why = f"the process ended with {code}"
        except subprocess.TimeoutExpired:
            code, why = -1, "the part's time was over"
        finally:
            kill(process)
        record.data = Record.read(record.path).data
        begun = [name for name, row in record.rows(part.name).items() if row["state"] == "begun"]
        for name in begun:
            record.write(part.name, name, "cut off", why=why)
        if code == 0 or not begun:
            if code not in (0, -1):
                record.write(part.name, "the part itself", "failed", why=why)
            break
    record.note(part.name, after=asked(NOW))


def kill(process: subprocess.Popen[bytes]) -> None:
    """A process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def work(part: Part, record: Record) -> None:
    """The rows of a part that are not settled, in this process."""
    tiny = record.data["about"]["tiny"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        record.write(part.name, "the part itself", "not here", why=no_gpu())
        print(f"  {no_gpu()}")
        return
    for name, measure in part.rows(device, tiny):
        if record.settled(part.name, name) or record.rows(part.name).get(name, {}).get("state") == "cut off":
            continue
        if seconds_left() <= 0:
            print("  the part's time is over; its other rows stay open")
            return
        record.write(part.name, name, "begun")
        began = time.perf_counter()
        try:
            state, found = "measured", {"figures": measure()}
        except NotHere as reason:
            state, found = "not here", {"why": str(reason)}
        except TimeoutError as error:
            state, found = "cut off", {"why": str(error)}
        except ModuleNotFoundError as error:
            ours = (error.name or "").split(".")[0] in ("ki_ds", "gpu_parts", "helpers")
            state = "failed" if ours else "not here"
            found = {"why": f"{error.name} is not installed", "traceback": traceback.format_exc()}
        except torch.OutOfMemoryError as error:
            state, found = "not here", {"why": f"too little memory: {str(error).splitlines()[0]}"}
        except Exception as error:  # whatever it is, the next row runs
            why = [f"{type(error).__name__}", *str(error).strip().splitlines()[-1:]]
            state, found = "failed", {"why": ": ".join(why), "traceback": traceback.format_exc()}
        seconds = round(time.perf_counter() - began, 3)
        record.write(part.name, name, state, seconds=seconds, **found)
        said = str(found["why"]).splitlines()[0] if "why" in found else json.dumps(found["figures"])
        print(f"  {name}: {state}, {seconds:.1f} s: {said[:300]}", flush=True)
        if state == "failed" and "CUDA error" in found["traceback"]:
            sys.exit(3)  # the context is broken; another process measures the rest


def no_gpu() -> str:
    """Why nothing is measured."""
    try:
        torch.cuda.init()
    except Exception as error:  # a driver too old says so here
        return f"no CUDA GPU: {str(error).splitlines()[0]}"
    return "no CUDA GPU"


def told(record: Record, parts: list[Part]) -> bool:
    """Say what there is of each part; whether a row failed."""
    failed = False
    print()
    for part in parts:
        states = [row["state"] for row in record.rows(part.name).values()]
        failed |= "failed" in states
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "nothing"
        print(f"{part.name}: {counts}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
