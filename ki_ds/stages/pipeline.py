"""Runs an experiment's stages, each after those whose folders it reads; loops over the list of stages."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ki_ds.errors import StageFailed, UserError
from ki_ds.experiment.graph import in_order
from ki_ds.experiment.schema import Experiment
from ki_ds.launch import distributed, heartbeat
from ki_ds.launch.command import Launch
from ki_ds.launch.launcher import launched
from ki_ds.launch.lock import held
from ki_ds.progress import duration, say
from ki_ds.sealed import MANIFEST, State, aside, check_contents
from ki_ds.stages import STAGES
from ki_ds.stages.stage import Refusals, Stage
from ki_ds.workspace import Workspace


def stages(experiment: Experiment) -> list[Stage]:
    """Everything the experiment needs, each stage after those whose folders it reads, otherwise in the list's order."""
    found: dict[str, Stage] = {stage.folder: stage for kind in STAGES for stage in kind.of(experiment)}
    return [found[folder] for folder in in_order(found, lambda folder: found[folder].inputs(experiment))]


def commands() -> dict[str, str]:
    """The commands that run stages of one kind, and what they say of themselves."""
    return {kind.command: kind.help for kind in STAGES if kind.help}


def default_processes(space: Workspace) -> int:
    """As many ranks as there are GPUs, or fewer where that does not divide every batch; one without a GPU."""
    batches = [model.train.batch_size for model in space.experiment.models.values() if model.train]
    counts = range(torch.cuda.device_count(), 0, -1)
    return next((count for count in counts if all(batch % count == 0 for batch in batches)), 1)


def preflight(space: Workspace, chosen: Iterable[Stage], ranks: int, here: bool = False) -> None:
    """Everything that can be refused before anything runs; `here`: the ranks run on this machine.

    Raises:
        UserError: with every problem found, a line each.
    """
    refusals, chosen = Refusals(), list(chosen)
    refusals.gather(_check_inputs, space, chosen)
    if any(stage.launched for stage in chosen):
        refusals.gather(lambda: space.engine_config)
    for stage in chosen:
        refusals.gather(_check_place, space, stage)
        stage.refuse(space, ranks, here, refusals)
        refusals.gather(stage.check_state, space)
    space.digests.save()
    refusals.check()


def _check_place(space: Workspace, stage: Stage) -> None:
    folder = space.root / stage.folder
    for place in (folder.parent, folder):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place}: is a file, where {stage} is to have its folder. Move it away")


def states(space: Workspace) -> dict[Stage, State]:
    """The state of every stage, in order."""
    return {stage: stage.state(space) for stage in stages(space.experiment)}


def touched(space: Workspace, found_states: Mapping[Stage, State]) -> dict[Stage, str]:
    """What a change of the experiment makes again, in order, each with why: stages whose folder was made from something
    else, and those that stand on them."""
    found: dict[Stage, str] = {}
    again = set[str]()
    for stage, state in found_states.items():
        reads = next((read for read in stage.inputs(space.experiment) if read in again), None)
        if state == "other":
            found[stage] = "made from something else"
        elif state != "sealed" and (aside(space.root / stage.folder) / MANIFEST).exists():
            found[stage] = "begun again, the old one waits"
        elif reads and stage.lasting and state != "absent":
            found[stage] = f"reads {reads}"
        again |= {stage.folder} if stage in found else set()
    return found


def run(space: Workspace, launch: Launch, command: str | None = None, name: str | None = None) -> list[Stage]:
    """Run what is not sealed yet, in order: of all stages, or of those that belong to a command, or bear a name; these.

    Raises:
        UserError: the input is wrong, or an earlier stage is missing.
        StageFailed: a launched stage failed.
        Stopped: a signal asked for it; what was done is saved.
    """
    every = stages(space.experiment)
    of_command = [stage for stage in every if command in (None, stage.command)]
    chosen = [stage for stage in of_command if name in (None, stage.name)]
    if not chosen:
        known = ", ".join(stage.name for stage in of_command)
        raise UserError(f'there is no stage "{name}"; the experiment has {known}')
    preflight(space, chosen, launch.processes, launch.hostfile is None)
    again = touched(space, states(space)) if space.redo else {}  # sealed or not: what they stand on is made again
    waiting: list[Stage] = []  # launched stages in a row share one launch
    for stage in chosen:
        if not stage.launched and waiting:
            _launch(space, launch, waiting)
            waiting = []
        if stage.lasting and stage not in again and stage.state(space) == "sealed":
            say(f"{stage}: done before")
        elif stage.launched:
            waiting.append(stage)
        else:
            work(stage, space)
    if waiting:
        _launch(space, launch, waiting)
    return chosen


def _check_inputs(space: Workspace, chosen: Sequence[Stage]) -> None:
    """Check that what the chosen stages read is there, or is made by one of them.

    Raises:
        UserError: it is not finished, or was made for another experiment.
    """
    makers = {stage.folder: stage for stage in stages(space.experiment)}
    for stage in chosen:
        for maker in (makers[read] for read in stage.inputs(space.experiment)):
            if maker in chosen:
                continue
            found = maker.state(space)
            if found == "other":
                maker.check_identity(space)
            if found != "sealed":
                folder = space.root / maker.folder
                raise UserError(f"{stage} reads {folder}, which is not finished. Run `ki-ds run` to make it.")


def work(stage: Stage, space: Workspace) -> None:
    """Run one stage in this process; under a launcher every rank does.

    Raises:
        UserError: the input or the state of the work directory does not allow it.
        Stopped: it was asked for.
    """
    began, shown = time.monotonic(), distributed.rank() == 0
    heartbeat.stop_if_asked()
    heartbeat.report(str(stage))
    if shown:
        say(f"{stage} …")
    if shown and not heartbeat.THIS_RANK.watched:
        signs = heartbeat.THIS_RANK.file
        with _making(space, [stage], signs and signs.parent):
            if not stage.launched:
                stage.make_way(space)
            stage.run(space)
    else:  # rank 0, or the process that started the ranks, holds it
        stage.run(space)
    gc.collect()  # an engine is full of cycles; the next stage needs its memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if shown:
        say(f"{stage}: done in {duration(time.monotonic() - began)}")


def _launch(space: Workspace, launch: Launch, group: list[Stage]) -> None:
    """Run stages under the launcher, in a process group of their own.

    Raises:
        UserError: another run is making one of their folders.
        StageFailed: they ended without sealing their folders, whatever the launcher's exit code says.
        Stopped: a signal asked for it; what was done is saved.
    """
    heartbeat.stop_if_asked()
    with _making(space, group, launch.control):
        _launch_held(space, launch, group)


@contextmanager
def _making(space: Workspace, group: Sequence[Stage], control: Path | None) -> Iterator[None]:
    """Around stages that make their folders: nobody else makes them, and what they read is as it was sealed. `control`:
    where their ranks give signs of life.

    Raises:
        UserError: another run is making one of them, or an input was changed.
    """
    with held(space.root, [stage.folder for stage in group], control):
        reads = dict.fromkeys(read for stage in group for read in stage.inputs(space.experiment))
        for read in reads:
            if (space.root / read / MANIFEST).exists():  # else one of the group makes it
                check_contents(space.root / read, space.digests.of, leave_out="*.kit")  # shards: when they are opened
        space.digests.save()
        yield


def _launch_held(space: Workspace, launch: Launch, group: list[Stage]) -> None:
    for again in range(launch.restarts, -1, -1):
        outcome = launched(launch, [stage.label for stage in group])
        group = [stage for stage in group if stage.state(space) != "sealed"]
        if not group:
            return
        if outcome.how == "stopped":
            raise heartbeat.Stopped
        if outcome.code == 2:
            raise StageFailed(str(group[0]), 2)
        if outcome.stop_requested:
            raise StageFailed(str(group[0]), 1)
        failed = f"{group[0]}: failed (exit code {outcome.code}); the reason stands above."
        say(f"{failed} Starting again; {again - 1} restarts are left." if again else f"{failed} Run again to continue.")
    raise StageFailed(str(group[0]), 1)
