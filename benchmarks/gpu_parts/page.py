"""docs/results/gpu.md, drawn from the files of results: what was to be reached, what was found, and what is open."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gpu_parts.part import ROOT
from gpu_parts.record import FOLDER, Record
from ki_ds.files import write_atomically

PAGE = ROOT / "docs" / "results" / "gpu.md"
HEAD = """# What a GPU shows

`python benchmarks/gpu.py` measures, part by part, and draws this page from the files in [gpu/](gpu/); how to run it on
a new machine: [gpu.md](../gpu.md). A row that no file speaks of is open.
"""
NONE = """
**No GPU has been at hand yet: every row is open.** Each part runs on a CPU in the tests, small, by the same code.
"""
Figures = dict[str, Any]
RIGHT = "right-first"


@dataclass(frozen=True)
class Goal:
    """Something to be reached: `of(figures)` of the rows whose names fit, the worst of them, at most or at least."""

    said: str
    part: str
    row: str  # a pattern of names
    of: Callable[[Figures], float | None]
    bound: float
    most: bool = True

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound


def figure(name: str) -> Callable[[Figures], float | None]:
    """A figure by its name."""
    return lambda figures: figures.get(name)


def memory(name: str) -> Callable[[Figures], float | None]:
    """Peak MB of a contender."""
    return lambda figures: figures["peak bytes"][name] / 1e6 if name in figures.get("peak bytes", {}) else None


def behind(ours: str, *peers: str) -> Callable[[Figures], float | None]:
    """Our seconds over the fastest peer's."""

    def of(figures: Figures) -> float | None:
        seconds = figures["seconds"]
        found = [s for name, s in seconds.items() if any(fnmatchcase(name, peer) for peer in peers)]
        return seconds[ours] / min(found) if found and ours in seconds else None

    return of


LOSS = "loss, N 8,192, D *, V *, K 100, bfloat16, τ 2"
ONE = "loss, N 8,192, D 1,024, V 50,265, K 100, bfloat16, τ 2"
GOALS = [
    Goal("the head with its loss, in its three bare products", "loss-speed", LOSS, figure("head / products"), 1.15),
    Goal("inheriting, in cross-entropy by the same function", "loss-speed", LOSS, figure("ki / ce"), 1.02),
    Goal("cross-entropy, in the fastest peer's time", "loss-speed", LOSS,
         behind("ce", "dense ce", "deepspeed ce*", "liger ce", "liger ce, in fp32"), 1.0),
    Goal("inheriting, in the fastest peer's time", "loss-speed", LOSS,
         behind("ki", "dense ki", "compiled dense ki", "liger ce and kl"), 1.0),
    Goal("memory of the loss at D 1,024, V 50,265, MB", "loss-speed", ONE, memory("ki"), 600),
    Goal("the pass over the logits, of a device copy's rate", "loss-speed", LOSS,
         figure("the pass over the logits, of a device copy's rate"), 0.8, most=False),
    Goal("selection, in the bare head product", "loss-speed", "selection, *V 50,265*",
         figure("select / head product"), 1.35),
    Goal("numbers in the code, in the fastest of the sweep", "sweep", "*", figure("in the code / best"), 1.02),
    Goal("the teach stage, of the bare forward pass", "teacher-speed", "* at once",
         figure("of the bare forward pass"), 0.9, most=False),
    Goal("self-learning, roberta-large: share of the nominal rate", "training-speed", "roberta-large, zero1_bf16",
         figure("share of the nominal rate, alone"), 0.45, most=False),
    Goal("inheriting, roberta-large, in self-learning", "training-speed", "roberta-large, zero?_[bf]*16",
         figure("inheriting / alone"), 1.02),
    Goal("inheriting, gpt-base, in self-learning", "training-speed", "gpt-base, zero?_[bf]*16",
         figure("inheriting / alone"), 1.02),
    Goal("waiting for targets, seconds a step", "training-speed", "*, zero?_[bf]*16",
         figure("waited for targets, seconds a step, median"), 0.001),
]  # fmt: skip


def write_page() -> Path:
    """Draw the page from the files that are there."""
    records = [one for one in Record.all(FOLDER) if one.data["about"]["gpu"] and not one.data["about"]["tiny"]]
    write_atomically(PAGE, page(records).encode())
    return PAGE


def page(records: list[Record]) -> str:
    """The page's text."""
    from gpu_parts.parts import PARTS

    lines = [HEAD if records else HEAD + NONE, *goals(records)]
    for part in PARTS:
        lines += ["", f"## {part.name}: {part.title}", ""]
        said = [line for record in records for line in of_part(record, part.name)]
        lines += said or ["Open."]
    return "\n".join(lines).rstrip() + "\n"


def goals(records: list[Record]) -> Iterator[str]:
    """What was to be reached, a column a file of results."""
    names = [f"[{one.data['about']['gpu']}, {one.data['about']['commit']}](gpu/{one.path.name})" for one in records]
    yield "## To be reached"
    yield ""
    yield "| the worst of its rows | to reach | " + " | ".join(names or ["found"]) + " |"
    yield "|---|---|" + "---|" * max(len(names), 1)
    for goal in GOALS:
        cells = [judged(goal, record) for record in records] or ["open"]
        yield f"| {goal.said} | {'≤' if goal.most else '≥'} {goal.bound:g} | " + " | ".join(cells) + " |"
    yield from correctness(records)


def judged(goal: Goal, record: Record) -> str:
    """A cell: the worst value, and whether it is enough."""
    rows = record.rows(goal.part)
    values = [
        (value, name)
        for name, row in rows.items()
        if row["state"] == "measured" and fnmatchcase(name, goal.row)
        and (value := goal.of(row["figures"])) is not None
    ]  # fmt: skip
    if not values:
        return "open"
    worst, name = (max if goal.most else min)(values)
    several = f", {len(values)} rows, worst: {name}" if len(values) > 1 else ""
    return f"{number(worst)} {'reached' if goal.reached(worst) else '**not reached**'}{several}"


def correctness(records: list[Record]) -> Iterator[str]:
    """Whether every case of every kernel was right."""
    cells = []
    for record in records:
        states = [row["state"] for row in record.rows(RIGHT).values()]
        bad = len(states) - states.count("measured") - states.count("not here")
        cells.append(f"{states.count('measured')} right, {bad} not" if states else "open")
    yield "| kernels against float64, cases | all right | " + " | ".join(cells or ["open"]) + " |"


def of_part(record: Record, part: str) -> Iterator[str]:
    """The rows of a part in one file."""
    rows, about = record.rows(part), record.data["about"]
    if not rows:
        return
    yield f"{about['gpu']}, driver {about['driver']}, torch {about['versions']['torch']}, commit {about['commit']}:"
    yield ""
    yield "| row | figures |"
    yield "|---|---|"
    right = {name: row for name, row in rows.items() if row["state"] == "measured"} if part == RIGHT else {}
    if right:  # hundreds: the file has them
        shares = [share for row in right.values() for share in row["figures"].get("shares", {}).values()]
        yield f"| {len(right)} cases, all right | largest share of the error that is allowed {number(max(shares))} |"
    for name, row in rows.items():
        if name in right:
            continue
        if row["state"] != "measured":
            yield f"| {name} | {row['state']}: {plain(row.get('why', ''))} |"
        else:
            yield f"| {name} | {'; '.join(flat(row['figures']))} |"
    yield ""


def flat(figures: Figures, before: str = "") -> Iterator[str]:
    """Figures as words; long lists stay in the file."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}: ")
        elif isinstance(value, str | bool | int | float):
            yield f"{before}{name} {number(value) if isinstance(value, float) else plain(str(value))}"


def plain(text: str) -> str:
    """Text for a cell: a line of it."""
    return " ".join(text.split())[:160].replace("|", "\\|")


def number(value: float) -> str:
    """Three digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
