"""The commands that look and run nothing: plan, status, verify, schema, doctor."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ki_ds.cli.options import File, Hostfile, Processes, Scale, Set, Workdir, open_workspace, ranks_of
from ki_ds.experiment.schema import Experiment
from ki_ds.launch import distributed
from ki_ds.progress import say

SUMMED = ("steps", "tokens", "flops", "bytes")
COLUMNS = (*SUMMED, "parameters", "memory")
MEANING = {"sealed": "sealed", "unsealed": "begun", "absent": "to do", "other": "made from another experiment"}


def plan(
    file: File, scale: Scale = None, workdir: Workdir = None, processes: Processes = None, hostfile: Hostfile = None,
    memory: Annotated[float | None, typer.Option(
        min=0.1, metavar="GIB", help="ask about GPUs with so much memory each, instead of this machine"
    )] = None,
    settings: Set = None,
) -> None:  # fmt: skip
    """What will run, what is sealed already, what it costs, and whether its memory is there."""
    from rich.console import Console
    from rich.table import Table

    from ki_ds.planning.room import room_for
    from ki_ds.stages.pipeline import preflight, stages

    space = open_workspace(file, scale, workdir, settings)
    ranks, every = ranks_of(space, processes, hostfile), stages(space.experiment)
    preflight(space, every, ranks, here=hostfile is None and memory is None)
    room = room_for(ranks, memory, elsewhere=hostfile is not None)
    table = Table("stage", "state", *COLUMNS, title=f"{space.experiment.name} in {space.root}")
    sums, notes = dict.fromkeys(SUMMED, 0.0), []
    for stage in every:
        state, cost = stage.state(space), stage.cost(space, ranks, room)
        amounts: dict[str, Any] = asdict(cost)
        if state == "sealed":
            amounts["memory"] = 0
        else:
            sums = {column: total + amounts[column] for column, total in sums.items()}
            notes += [cost.note] if cost.note else []
        table.add_row(str(stage), state, *(_amount(amounts[column]) for column in COLUMNS))
    table.add_section()
    table.add_row("still to do", "", *(_amount(sums.get(column)) for column in COLUMNS))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    say("bytes: targets before compression, which saves about a third; FLOPs: matrix products, training 3 × forward")
    say(f"memory: bytes of a rank, {ranks} ranks; estimated, see docs/engine.md")
    for note in notes:
        say(note)


def _amount(value: float | None) -> str:
    if not value:
        return ""
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.0f}"


def status(file: File, scale: Scale = None, workdir: Workdir = None, settings: Set = None) -> None:
    """The state of every stage."""
    from ki_ds.launch.lock import holder
    from ki_ds.stages.pipeline import states, touched

    space = open_workspace(file, scale, workdir, settings)
    found = states(space)
    again = touched(space, found)
    for stage, state in found.items():
        progress, who = stage.progress(space), holder(space.root, stage.folder)
        notes = [progress] if progress else []
        notes += [f"being made by {who}"] if who else []
        notes += [f"to be made again: {again[stage]}"] if stage in again else []
        say(f"{MEANING[state]:30} {stage}" + (f" ({'; '.join(notes)})" if notes else ""))


def verify(
    workdir: Annotated[Path, typer.Argument(metavar="WORKDIR", help="a work directory")],
    deep: Annotated[bool, typer.Option(help="read every byte anew, decode every row of targets")] = False,
) -> None:
    """Check every sealed folder of a work directory; exit code 1 where one is not what it was when it was sealed."""
    from ki_ds.stages.verify import verify

    bad = total = 0
    for verdict in verify(workdir.absolute(), deep):
        total, bad = total + 1, bad + bool(verdict.faults)
        note = f" ({verdict.note})" if verdict.note else ""
        say(f"{verdict.folder}: {len(verdict.faults) or 'no'} fault{'s' * (len(verdict.faults) > 1)}{note}")
        for fault in verdict.faults:
            say(f"  {fault}")
    say(f"{workdir}: {total} sealed folders, {bad} of them with faults")
    if bad:
        raise typer.Exit(1)


def schema() -> None:
    """JSON Schema of the experiment file, for editors."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    say(json.dumps({**dialect, **Experiment.model_json_schema()}, indent=1))


def doctor(workdir: Workdir = None) -> None:
    """Versions, accelerators, DeepSpeed ops, launcher, disk; what is missing and how to install it."""
    from ki_ds.doctor import examine

    distributed.quiet()
    if not examine(workdir or Path("work")):
        raise typer.Exit(1)


def add(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for command in (plan, status, verify, schema, doctor):
        app.command()(command)
