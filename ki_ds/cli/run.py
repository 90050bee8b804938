"""The commands that run stages: all of them, those of one kind, the demo's; and a rank of them."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ki_ds.cli.options import (
    File,
    Hostfile,
    Launcher,
    LauncherArgs,
    Name,
    Processes,
    Restarts,
    Scale,
    Set,
    Timeout,
    TrustCheckpoints,
    Workdir,
    Yes,
    agreed,
    open_workspace,
    ranks_of,
)
from ki_ds.corpus.documentation import write_documentation
from ki_ds.errors import UserError
from ki_ds.experiment.graph import load_experiment
from ki_ds.files import remedy, write_atomically
from ki_ds.launch import distributed, heartbeat
from ki_ds.launch.call import read_call
from ki_ds.launch.command import Launch, check
from ki_ds.launch.leftovers import Leftovers
from ki_ds.progress import duration, say
from ki_ds.stages.pipeline import commands, run, stages, states, touched, work
from ki_ds.workspace import SHIPPED, Workspace


def run_stages(
    file: Path, scale: str | None = None, workdir: Path | None = None, processes: int | None = None,
    hostfile: Path | None = None, settings: list[str] | None = None, launcher: str = "pdsh", launcher_args: str = "",
    restarts: int = 0, timeout: float = 10.0, only: str | None = None, name: str | None = None,
    trust_checkpoints: bool = False, redo: bool = False, yes: bool = False,
) -> None:  # fmt: skip
    """Run the stages of an experiment: all, or those of the command `only`, or of these the one with a name. `redo`:
    those whose folders were made from something else are made again, with `yes` without a question.

    Raises:
        UserError: the input is wrong, or the ranks cannot be started.
    """
    began = time.monotonic()
    space = open_workspace(file, scale, workdir, settings)
    ranks = ranks_of(space, processes, hostfile)
    arguments = [str(file.absolute()), "--workdir", str(space.root)]
    arguments += ["--scale", scale] if scale else []
    arguments += [part for setting in settings or () for part in ("--set", setting)]
    arguments += ["--trust-checkpoints"] if trust_checkpoints else []
    arguments += ["--redo"] if redo else []
    control = space.root / ".control" / f"{socket.gethostname()}-{os.getpid()}"
    launch = Launch(arguments, ranks, control, hostfile, launcher, launcher_args, restarts, 60 * timeout)
    check(launch)
    space.redo = redo
    if redo:
        agreed("made again", [f"{stage} ({why})" for stage, why in touched(space, states(space)).items()], yes)
    left = Leftovers(control.parent)
    done = run(space, launch, only, name)
    left.clear()
    say(f"\n{only or space.experiment.name}: all done in {duration(time.monotonic() - began)}")
    for line in (line for stage in done for line in stage.conclusion(space)):
        say(line)


def run_command(
    file: File, scale: Scale = None, workdir: Workdir = None, processes: Processes = None, hostfile: Hostfile = None,
    only: Annotated[str | None, typer.Option(help=", ".join(commands()))] = None,
    settings: Set = None, launcher: Launcher = "pdsh", launcher_args: LauncherArgs = "", restarts: Restarts = 0,
    timeout: Timeout = 10.0, trust_checkpoints: TrustCheckpoints = False,
    redo: Annotated[bool, typer.Option(help="make again what was made from something else; the old waits for the new")]
    = False,
    yes: Yes = False,
) -> None:  # fmt: skip
    """Run the whole experiment; what is sealed already is not done again, what was interrupted goes on."""
    if only is not None and only not in commands():
        raise UserError(f'--only: found "{only}"; allowed: {", ".join(commands())}')
    run_stages(
        file, scale, workdir, processes, hostfile, settings, launcher, launcher_args, restarts, timeout, only,
        trust_checkpoints=trust_checkpoints, redo=redo, yes=yes,
    )  # fmt: skip


def clean(
    file: File, scale: Scale = None, workdir: Workdir = None, settings: Set = None, yes: Yes = False,
) -> None:  # fmt: skip
    """Remove from the work directory what nothing in the experiment names, and what was set aside."""
    from ki_ds.stages.clean import remove, unnamed

    space = open_workspace(file, scale, workdir, settings)
    found = unnamed(space)
    agreed("removed", [f"{one.folder} ({one.size_bytes / 1e6:,.1f} MB)" for one in found], yes)
    for one in found:
        remove(space, one)


def stage_command(only: str) -> Callable[..., None]:
    """The command that runs the stages of one kind."""

    def command(
        file: File, scale: Scale = None, workdir: Workdir = None, processes: Processes = None,
        hostfile: Hostfile = None, name: Name = None, settings: Set = None, launcher: Launcher = "pdsh",
        launcher_args: LauncherArgs = "", restarts: Restarts = 0, timeout: Timeout = 10.0,
        trust_checkpoints: TrustCheckpoints = False,
    ) -> None:  # fmt: skip
        run_stages(
            file, scale, workdir, processes, hostfile, settings, launcher, launcher_args, restarts, timeout, only, name,
            trust_checkpoints,
        )  # fmt: skip

    return command


def demo(
    masked: Annotated[bool, typer.Option("--masked", help="masked models; takes much longer")] = False,
    scale: Scale = None, workdir: Workdir = None, processes: Processes = None, settings: Set = None,
) -> None:  # fmt: skip
    """Run the demo: a student that inherits against the same student alone, on real text."""
    given = shipped(f"experiments/{'demo_mlm' if masked else 'demo'}.json")
    name = load_experiment(given, scale, tuple(settings or ())).name
    folder = workdir or Path("work") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}. {remedy(error)}") from None
    file, text = folder / given.name, folder / "documentation.jsonl"
    write_atomically(file, given.read_bytes())
    if not text.exists():  # packages may have changed since, and with them the text
        write_documentation(text)
    run_stages(file, scale, folder, processes, settings=settings)


def shipped(name: str) -> Path:
    """A file of ds_configs, in a checkout or in an installed package.

    Raises:
        UserError: it is in neither.
    """
    for place in SHIPPED:
        if (place / "ds_configs" / name).exists():
            return place / "ds_configs" / name
    raise UserError(f"ds_configs/{name} is not installed (looked in {' and '.join(map(str, SHIPPED))})")


def worker(
    kinds: str, file: File, scale: Scale = None, workdir: Workdir = None, settings: Set = None,
    names: Annotated[list[str] | None, typer.Option("--name")] = None,
    watch_input: Annotated[bool, typer.Option("--watch-input", hidden=True)] = False,
    control: Annotated[Path | None, typer.Option(hidden=True)] = None, timeout: Timeout = 10.0,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    trust_checkpoints: TrustCheckpoints = False, redo: bool = False,
) -> None:  # fmt: skip
    """One rank of launched stages; started by a launcher."""
    if watch_input:
        distributed.end_with_input()
    space = open_workspace(file, scale, workdir, settings)
    space.trust_checkpoints, space.redo = trust_checkpoints, redo
    signs = control or space.root / ".control" / distributed.rendezvous()
    heartbeat.start(signs, distributed.rank(), distributed.world_size(), 60 * timeout, watched=control is not None)
    try:
        _work(space, kinds, names or [])
    finally:
        if control is None and distributed.rank() == 0:
            shutil.rmtree(signs, ignore_errors=True)
    heartbeat.end("done")


def _work(space: Workspace, kinds: str, names: list[str]) -> None:
    known = [stage for stage in stages(space.experiment) if stage.kind in kinds.split(",")]
    for name in names:
        if not any(name in (stage.name, stage.label) for stage in known):
            listed = ", ".join(stage.name for stage in known)
            raise UserError(f"--name {name}: there is no such stage of kind {kinds}; the experiment has {listed}")
    for stage in known:
        if not names or {stage.name, stage.label} & {*names}:
            work(stage, space)


def add(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("run")(run_command)
    for name, text in commands().items():
        app.command(name, help=text)(stage_command(name))
    app.command()(clean)
    app.command()(demo)
    app.command(hidden=True)(worker)

    @app.command(hidden=True)
    def worker_told(call: str) -> None:
        """A worker whose arguments lie in a file, as `ki-ds run` starts it."""
        app(args=read_call(call), standalone_mode=False)
