"""Options that several commands have, and the workspace that they name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ki_ds.workspace import Workspace


def nameable(path: Path | None) -> Path | None:
    """A path, checked: the operating system could open it.

    Raises:
        UserError: it is too long, or holds NUL.
    """
    from ki_ds.errors import UserError
    from ki_ds.experiment.strict import as_path, cut

    try:
        as_path(str(path or "."))
    except ValueError as error:
        raise UserError(f"{cut(str(path))}: {error}") from None
    return path


File = Annotated[Path, typer.Argument(metavar="EXPERIMENT.json", help="the experiment file", callback=nameable)]
Scale = Annotated[str | None, typer.Option(help="apply one of the file's scales (a JSON merge patch)")]
Workdir = Annotated[
    Path | None,
    typer.Option(
        help="where results go; default: work/<name> here, or the one beside the file where only that exists",
        callback=nameable,
    ),
]
Processes = Annotated[int | None, typer.Option(min=1, help="ranks on this machine; default: one a GPU, or 1")]
Hostfile = Annotated[Path | None, typer.Option(help="DeepSpeed host file, for several machines", callback=nameable)]
Launcher = Annotated[str, typer.Option(help="with a host file: pdsh, openmpi, mpich or slurm")]
LauncherArgs = Annotated[str, typer.Option(help="passed on to that launcher's program")]
Restarts = Annotated[int, typer.Option(min=0, help="how often to go on from the last checkpoint after a failure")]
Timeout = Annotated[float, typer.Option(min=0.05, max=1e5, help="minutes without progress until a rank counts as lost")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a value of the file")]
Name = Annotated[str | None, typer.Option("--name", help="only this corpus, teacher@corpus or model")]

TrustCheckpoints = Annotated[
    bool, typer.Option("--trust-checkpoints", help="go on from checkpoints that another user wrote; they can run code")
]


Yes = Annotated[bool, typer.Option("--yes", help="without a question")]


def agreed(what: str, items: list[str], yes: bool) -> None:
    """Say what is about to be done to what, and ask.

    Raises:
        UserError: nobody is there to be asked.
    """
    from ki_ds.errors import UserError
    from ki_ds.progress import say

    say(f"{len(items) or 'nothing'} to be {what}" + (":" if items else ""))
    for item in items:
        say(f"  {item}")
    if yes or not items:
        return
    if not sys.stdin.isatty():
        raise UserError("nothing was done: say --yes where nobody can be asked")
    if not typer.confirm("Go on?"):
        raise typer.Exit(1)


def open_workspace(file: Path, scale: str | None, workdir: Path | None, settings: list[str] | None) -> Workspace:
    """An experiment file's experiment in its work directory.

    Raises:
        UserError: with every problem of the file.
    """
    from ki_ds.errors import UserError
    from ki_ds.experiment.graph import load_experiment
    from ki_ds.launch import distributed
    from ki_ds.workspace import Workspace

    distributed.quiet()
    experiment = load_experiment(file, scale, tuple(settings or ()))
    root = (workdir or default_workdir(file, experiment.name)).absolute()
    nameable(root)
    if blocking := next((place for place in (root, *root.parents) if place.exists() and not place.is_dir()), None):
        raise UserError(f"--workdir {root}: {blocking} is a file; expected a folder, or a place for one")
    return Workspace(experiment, file, root)


def default_workdir(file: Path, name: str) -> Path:
    """work/<name> in the current folder; or the one beside the experiment file, where only that one exists."""
    from ki_ds.launch import distributed

    here = Path("work") / name
    beside = file.resolve().parent / here
    if here.exists() or not beside.exists():
        return here
    if distributed.rank() == 0:
        print(f"work directory: {beside}, beside the file; there is none in {Path.cwd()}", file=sys.stderr, flush=True)
    return beside


def ranks_of(space: Workspace, processes: int | None, hostfile: Path | None) -> int:
    """How many ranks a run has.

    Raises:
        UserError: the host file cannot be read.
    """
    from ki_ds.errors import UserError
    from ki_ds.launch.hosts import hosts
    from ki_ds.stages.pipeline import default_processes

    if hostfile and not hostfile.exists():
        raise UserError(f"--hostfile {hostfile}: no such file")
    return sum(hosts(hostfile).values()) if hostfile else processes or default_processes(space)
