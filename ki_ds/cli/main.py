"""The ki-ds command; the only reader of argv.

Exit codes: 0 done; 2 the input is wrong; 75 stopped by a signal, to be started again; 1 anything else.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from ki_ds import __version__
from ki_ds.cli.targets import app as targets_app
from ki_ds.errors import StageFailed, UserError
from ki_ds.experiment.graph import load_experiment, stages
from ki_ds.experiment.schema import Experiment
from ki_ds.files import remedy, write_atomically
from ki_ds.launch import distributed, heartbeat
from ki_ds.progress import duration, say

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Knowledge inheritance: pre-train a larger language model with the help of a smaller one.",
)  # fmt: skip

app.add_typer(targets_app, name="targets")

File = Annotated[Path, typer.Argument(metavar="EXPERIMENT.json", help="the experiment file")]
Scale = Annotated[str | None, typer.Option(help="apply one of the file's scales (a JSON merge patch)")]
Workdir = Annotated[Path | None, typer.Option(help="where results go; default: work/<the experiment's name>")]
Processes = Annotated[int | None, typer.Option(min=1, help="ranks on this machine; default: one a GPU, or 1")]
Hostfile = Annotated[Path | None, typer.Option(help="DeepSpeed host file, for several machines")]
Launcher = Annotated[str, typer.Option(help="with a host file: pdsh, openmpi, mpich or slurm")]
LauncherArgs = Annotated[str, typer.Option(help="passed on to that launcher's program")]
Restarts = Annotated[int, typer.Option(min=0, help="how often to go on from the last checkpoint after a failure")]
Timeout = Annotated[float, typer.Option(min=0.05, help="minutes without progress after which a rank counts as lost")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a value of the file")]
Name = Annotated[str | None, typer.Option("--name", help="only this corpus, teacher@corpus or model")]
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words
ONLY = {
    "corpus": ("tokenizer", "corpus"), "teach": ("teach",), "train": ("train",), "evaluate": ("evaluate",),
    "report": ("report",),
}  # fmt: skip


def _open(file: Path, scale: str | None, workdir: Path | None, settings: list[str] | None) -> Any:
    from ki_ds.workspace import Workspace

    experiment = load_experiment(file, scale, tuple(settings or ()))
    return Workspace(experiment, file, (workdir or Path("work") / experiment.name).absolute())


def _run(
    file: Path, scale: str | None, workdir: Path | None, processes: int | None, hostfile: Path | None,
    settings: list[str] | None, only: str | None = None, name: str | None = None, launcher: str = "pdsh",
    launcher_args: str = "", restarts: int = 0, timeout: float = 10.0,
) -> None:  # fmt: skip
    from ki_ds.launch.launcher import Launch, check, hosts
    from ki_ds.stages.pipeline import default_processes, run

    distributed.quiet()
    if only is not None and only not in ONLY:
        raise UserError(f'--only: found "{only}"; allowed: {", ".join(ONLY)}')
    if hostfile and not hostfile.exists():
        raise UserError(f"--hostfile {hostfile}: no such file")
    began = time.monotonic()
    space = _open(file, scale, workdir, settings)
    arguments = [str(file.absolute()), "--workdir", str(space.root)]
    arguments += ["--scale", scale] if scale else []
    arguments += [part for setting in settings or () for part in ("--set", setting)]
    ranks = sum(hosts(hostfile).values()) if hostfile else processes or default_processes(space)
    control = space.root / ".control" / f"{socket.gethostname()}-{os.getpid()}"
    launch = Launch(arguments, ranks, control, hostfile, launcher, launcher_args, restarts, 60 * timeout)
    check(launch)
    for number in heartbeat.SIGNALS:
        signal.signal(number, _on_signal)
    run(space, launch, ONLY[only] if only else None, name)
    if only in (None, "report"):
        from ki_ds.report.page import words

        summary = json.loads((space.root / "report" / "summary.json").read_text())
        say(f"\n{space.experiment.name}: all done in {duration(time.monotonic() - began)}\n")
        for line in words(summary):
            say(line)
        say(f"\nreport: {space.root / 'report' / 'report.html'}")


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    raise heartbeat.Stopped


@app.command("run")
def run_command(
    file: File, scale: Scale = None, workdir: Workdir = None, processes: Processes = None, hostfile: Hostfile = None,
    only: Annotated[str | None, typer.Option(help="corpus, teach, train, evaluate or report")] = None,
    settings: Set = None, launcher: Launcher = "pdsh", launcher_args: LauncherArgs = "", restarts: Restarts = 0,
    timeout: Timeout = 10.0,
) -> None:  # fmt: skip
    """Run the whole experiment; what is sealed already is not done again, what was interrupted goes on."""
    _run(file, scale, workdir, processes, hostfile, settings, only, None, launcher, launcher_args, restarts, timeout)


def _stage_command(kind: str, text: str) -> None:
    def command(
        file: File, scale: Scale = None, workdir: Workdir = None, processes: Processes = None,
        hostfile: Hostfile = None, name: Name = None, settings: Set = None, launcher: Launcher = "pdsh",
        launcher_args: LauncherArgs = "", restarts: Restarts = 0, timeout: Timeout = 10.0,
    ) -> None:  # fmt: skip
        _run(
            file, scale, workdir, processes, hostfile, settings, kind, name, launcher, launcher_args, restarts, timeout
        )

    command.__doc__ = text
    app.command(kind)(command)


_stage_command("corpus", "Train the tokenizer and tokenise the corpora.")
_stage_command("teach", "Store the teachers' predictions.")
_stage_command("train", "Train the models whose inputs are there.")
_stage_command("evaluate", "Measure perplexities.")
_stage_command("report", "Write the report.")


@app.command()
def demo(
    masked: Annotated[bool, typer.Option("--masked", help="masked models; takes much longer")] = False,
    scale: Scale = None, workdir: Workdir = None, processes: Processes = None, settings: Set = None,
) -> None:  # fmt: skip
    """Run the demo: a student that inherits against the same student alone, on real text."""
    from ki_ds.corpus.documentation import write_documentation

    given = shipped(f"experiments/{'demo_mlm' if masked else 'demo'}.json")
    folder = workdir or Path("work") / load_experiment(given, scale, tuple(settings or ())).name
    folder.mkdir(parents=True, exist_ok=True)
    file, text = folder / given.name, folder / "documentation.jsonl"
    write_atomically(file, given.read_bytes())
    if not text.exists():  # packages may have changed since, and with them the text
        write_documentation(text)
    _run(file, scale, folder, processes, None, settings)


def shipped(name: str) -> Path:
    """A file of ds_configs, in a checkout or in an installed package.

    Raises:
        UserError: it is in neither.
    """
    from ki_ds.workspace import SHIPPED

    for place in SHIPPED:
        if (place / "ds_configs" / name).exists():
            return place / "ds_configs" / name
    raise UserError(f"ds_configs/{name} is not installed (looked in {' and '.join(map(str, SHIPPED))})")


@app.command()
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

    from ki_ds.launch.launcher import hosts
    from ki_ds.planning import plan as plans
    from ki_ds.stages import pipeline

    distributed.quiet()
    space = _open(file, scale, workdir, settings)
    ranks = sum(hosts(hostfile).values()) if hostfile else processes or pipeline.default_processes(space)
    pipeline.preflight(space, ranks)
    rows, lines = plans.plan(space, ranks, plans.room(ranks, memory, hostfile is not None))
    table = Table("stage", "state", *(column for column in COLUMNS), title=f"{space.experiment.name} in {space.root}")
    for row in rows:
        table.add_row(row["stage"], row["state"], *(_amount(row.get(c)) for c in COLUMNS))
    todo = [row for row in rows if row["state"] != "sealed"]
    sums = [sum(row.get(column, 0) for row in todo) if column in SUMMED else None for column in COLUMNS]
    table.add_section()
    table.add_row("still to do", "", *(_amount(total) for total in sums))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    say("bytes: targets before compression, which saves about a third; FLOPs: matrix products, training 3 × forward")
    say(f"memory: bytes of a rank, {ranks} ranks; estimated, see docs/engine.md")
    for line in lines:
        say(line)


SUMMED = ("steps", "tokens", "flops", "bytes")
COLUMNS = (*SUMMED, "parameters", "memory")


def _amount(value: float | None) -> str:
    if not value:
        return ""
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.0f}"


@app.command()
def status(file: File, scale: Scale = None, workdir: Workdir = None, settings: Set = None) -> None:
    """The state of every stage."""
    from ki_ds.metrics import read_metrics
    from ki_ds.stages.pipeline import stage_state

    distributed.quiet()
    space = _open(file, scale, workdir, settings)
    meaning = {"sealed": "sealed", "unsealed": "begun", "absent": "to do", "other": "made from another experiment"}
    for stage in stages(space.experiment):
        found = meaning[stage_state(space, stage)]
        steps = len(read_metrics(space.folder(stage) / "metrics.jsonl")) if stage.kind == "train" else 0
        trained = space.experiment.models[stage.name].train if stage.kind == "train" else None
        say(f"{found:30} {stage}" + (f" ({steps} of {trained.steps} steps)" if trained and steps else ""))


@app.command()
def schema() -> None:
    """JSON Schema of the experiment file, for editors."""
    say(
        json.dumps(
            {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()}, indent=1
        )
    )


@app.command()
def doctor(workdir: Workdir = None) -> None:
    """Versions, accelerators, DeepSpeed ops, launcher, disk; what is missing and how to install it."""
    from ki_ds.doctor import examine

    distributed.quiet()
    if not examine(workdir or Path("work")):
        raise typer.Exit(1)


@app.command(hidden=True)
def worker(
    kinds: str, file: File, scale: Scale = None, workdir: Workdir = None, settings: Set = None,
    names: Annotated[list[str] | None, typer.Option("--name")] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
    control: Annotated[Path | None, typer.Option(hidden=True)] = None, timeout: Timeout = 10.0,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:  # fmt: skip
    """One rank of engine stages; started by a launcher."""
    if parent is not None:
        distributed.end_with(parent)
    distributed.quiet()
    space = _open(file, scale, workdir, settings)
    signs = control or space.root / ".control" / distributed.rendezvous()
    heartbeat.start(signs, distributed.rank(), distributed.world_size(), 60 * timeout, watched=control is not None)
    try:
        _work(space, kinds, names)
    finally:
        if control is None and distributed.rank() == 0:
            shutil.rmtree(signs, ignore_errors=True)
    heartbeat.end("done")


def _work(space: Any, kinds: str, names: list[str] | None) -> None:
    from ki_ds.stages.worker import work

    known = [stage for stage in stages(space.experiment) if stage.kind in kinds.split(",")]
    labels = {label for stage in known for label in (stage.name, f"{stage.kind}:{stage.name}")}
    for name in names or ():
        if name not in labels:
            listed = ", ".join(stage.name for stage in known)
            raise UserError(f"--name {name}: there is no such stage of kind {kinds}; the experiment has {listed}")
    chosen = [stage for stage in known if not names or {stage.name, f"{stage.kind}:{stage.name}"} & set(names)]
    for stage in chosen:
        work(stage, space)


def version(shown: bool) -> None:
    if shown:
        say(f"ki-ds {__version__}")
        raise typer.Exit


@app.callback()
def top(_version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True)] = False) -> None:
    """Knowledge inheritance: pre-train a larger language model with the help of a smaller one."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and end the process with its exit code."""
    try:
        app(args=arguments, standalone_mode=True)
    except UserError as error:
        heartbeat.end("failed")
        if distributed.rank():
            time.sleep(3)  # rank 0 most often says the same, and its end stops this process
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except StageFailed as failed:
        raise SystemExit(failed.code) from None
    except heartbeat.Stopped:
        heartbeat.end("stopped")
        if distributed.rank() == 0 and not heartbeat.HERE.watched:
            print("stopped, as asked; the same command goes on from here", file=sys.stderr, flush=True)
        raise SystemExit(heartbeat.REQUEUE) from None
    except RuntimeError as error:
        if distributed.world_size() == 1 or not any(sign in str(error) for sign in PEER_GONE):
            raise
        print(f"rank {distributed.rank()}: stops, because another rank has ended", file=sys.stderr, flush=True)
        time.sleep(10)  # the launcher is to see that one's exit code, not this one's
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}. {remedy(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
