"""Options that several commands have, and the workspace that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ki_ds.workspace import Workspace

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


def open_workspace(file: Path, scale: str | None, workdir: Path | None, settings: list[str] | None) -> Workspace:
    """An experiment file's experiment in its work directory.

    Raises:
        UserError: with every problem of the file.
    """
    from ki_ds.experiment.graph import load_experiment
    from ki_ds.launch import distributed
    from ki_ds.workspace import Workspace

    distributed.quiet()
    experiment = load_experiment(file, scale, tuple(settings or ()))
    return Workspace(experiment, file, (workdir or Path("work") / experiment.name).absolute())


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
