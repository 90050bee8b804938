"""Runs the graph, stage by stage; stages that use the engine run under the deepspeed launcher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.sources import FileSource, files
from ki_ds.engine import config as engine_config
from ki_ds.errors import StageFailed, UserError
from ki_ds.experiment.graph import Kind, Stage, stages, targets_needed
from ki_ds.launch.command import Launch
from ki_ds.launch.heartbeat import Stopped
from ki_ds.launch.launcher import launched
from ki_ds.progress import say
from ki_ds.sealed import MANIFEST, check_identity, state
from ki_ds.stages.worker import work
from ki_ds.targets.folder import read_facts
from ki_ds.teaching import teacher as inference
from ki_ds.teaching.job import complete
from ki_ds.workspace import Workspace

LAUNCHED = ("teach", "train", "evaluate")  # stages that run under the launcher

# --------------------------------------------------------------------------------------------------- before


def default_processes(space: Workspace) -> int:
    """As many ranks as there are GPUs, or fewer where that does not divide every batch; one without a GPU."""
    import torch

    batches = [model.train.batch_size for model in space.experiment.models.values() if model.train]
    counts = range(torch.cuda.device_count(), 0, -1)
    return next((count for count in counts if all(batch % count == 0 for batch in batches)), 1)


def preflight(space: Workspace, processes: int, kinds: Iterable[str] | None = None, here: bool = False) -> None:
    """Everything that can be refused before anything of these kinds (all by default) runs; `here`: on this machine.

    Raises:
        UserError: with every problem found in the experiment, the engine JSON, the sources and the given models.
    """
    e = space.experiment
    lines: list[str] = []

    def gather(check: Any, *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except UserError as error:
            lines.append(str(error))
            return None

    def unfinished(kind: Kind, name: str) -> bool:
        return not (space.folder(Stage(kind, name)) / MANIFEST).exists()

    config = gather(lambda: space.engine_config)
    untrained = any(model.train and unfinished("train", name) for name, model in e.models.items())
    if here and untrained and config is not None:
        gather(engine_config.check_device, config, space.engine_source)
    for name, corpus in e.corpora.items():
        if unfinished("corpus", name):
            for index, source in enumerate(corpus.sources):
                if isinstance(source, FileSource):
                    gather(files, source, space.bases, f"corpora.{name}.sources.{index}")
    tokenizer = gather(expected_tokenizer, space)
    for name, model in e.models.items():
        place = f"models.{name}"
        if model.train and unfinished("train", name):
            gather(engine_config.micro_batch_size, model.train, processes, place)
        for one in (model.targets if kinds is None or "train" in kinds else None) or ():
            gather(read_facts, space.stored(name, one))
        if tokenizer is None or model.targets:
            continue
        config = gather(space.model_config, name, tokenizer)
        if model.pretrained and config is not None:
            gather(space.check_fit, name, config, tokenizer.size)
            gather(_same_tokenizer, space, name, tokenizer)
        wanted = model.inherit.targets if model.inherit else None
        if wanted and wanted.select != "sampled" and wanted.k > tokenizer.size:
            lines.append(
                f"{place}.inherit.targets.k: found {wanted.k}; expected at most the vocabulary size, {tokenizer.size}"
            )
    asked = [one.name for one in stages(e) if one.kind == "teach" and unfinished("teach", one.name)]
    if tokenizer is not None and asked and (kinds is None or "teach" in kinds):
        teachers = [*dict.fromkeys(targets_needed(e, name).teacher for name in asked)]
        gather(inference.check, space, teachers, tokenizer, processes)
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))


def expected_tokenizer(space: Workspace) -> tokenizers.TextTokenizer:
    """The experiment's tokenizer: as sealed, as given, or with the numbers that one yet to be trained will have."""
    given, objective = space.experiment.tokenizer, space.experiment.objective
    if stage_state(space, Stage("tokenizer", "tokenizer")) == "sealed":
        return space.tokenizer
    if given.train:
        return tokenizers.expected(given.train.vocabulary_size, objective)
    return tokenizers.load(space.model_or_name(str(given.pretrained)), objective, "tokenizer.pretrained")


def _same_tokenizer(space: Workspace, name: str, tokenizer: tokenizers.TextTokenizer) -> None:
    folder = space.model_or_name(str(space.experiment.models[name].pretrained))
    own = tokenizers.load(folder, space.experiment.objective, f"models.{name}.pretrained")
    if own.digest != tokenizer.digest:
        raise UserError(
            f"models.{name}.pretrained: {folder} has another tokenizer ({own.size} ids) than this experiment "
            f'({tokenizer.size} ids); expected "tokenizer": {{"pretrained": "{folder}"}}, or a model made with this one'
        )


# ---------------------------------------------------------------------------------------------------- state


def stage_state(space: Workspace, stage: Stage) -> str:
    """'sealed', 'unsealed' (begun, or to be extended), 'absent', or 'other' where it belongs to something else."""
    folder = space.folder(stage)
    if stage.kind == "report":
        return "sealed" if (folder / "report.html").exists() else "absent"
    if any(not (space.folder(one) / MANIFEST).exists() for one in space.inputs_of(stage)):
        return "absent" if state(folder) == "absent" else "unsealed"
    found = state(folder, space.identity(stage))
    if found == "sealed" and stage.kind == "teach":
        return "sealed" if complete(folder, space.needed(stage).samples) else "unsealed"
    return found


# ------------------------------------------------------------------------------------------------------ run


def run(space: Workspace, launch: Launch, kinds: Iterable[str] | None = None, name: str | None = None) -> None:
    """Run what is not sealed yet of the named kinds (all by default), in order.

    Raises:
        UserError: the input is wrong, or an earlier stage is missing.
        StageFailed: a launched stage failed.
    """
    preflight(space, launch.processes, kinds, here=launch.hostfile is None)
    chosen = [s for s in stages(space.experiment) if (kinds is None or s.kind in kinds) and name in (None, s.name)]
    if not chosen:
        known = [s.name for s in stages(space.experiment) if kinds is None or s.kind in kinds]
        raise UserError(f'there is no stage "{name}"; the experiment has {", ".join(known)}')
    for stage in chosen:
        for one in space.inputs_of(stage):
            if one in chosen:
                continue
            found = stage_state(space, one)
            if found == "other":
                check_identity(space.folder(one), space.identity(one))
            if found != "sealed":
                raise UserError(
                    f"{stage} reads {space.folder(one)}, which is not finished. Run `ki-ds run` to make it."
                )
    waiting: list[Stage] = []  # engine stages in a row share one launch
    for stage in chosen:
        if stage.kind not in LAUNCHED and waiting:
            started(space, launch, waiting)
            waiting = []
        if stage.kind != "report" and stage_state(space, stage) == "sealed":
            say(f"{stage}: done before")
        elif stage.kind in LAUNCHED:
            waiting.append(stage)
        else:
            work(stage, space)
    if waiting:
        started(space, launch, waiting)


def started(space: Workspace, launch: Launch, group: list[Stage]) -> None:
    """Run engine stages under the deepspeed launcher, in a process group of their own.

    Raises:
        StageFailed: they ended without sealing their folders, whatever the launcher's exit code says.
        Stopped: a signal asked for it; what was done is saved.
    """
    for again in range(launch.restarts, -1, -1):
        outcome = launched(launch, [f"{stage.kind}:{stage.name}" for stage in group])
        group = [stage for stage in group if stage_state(space, stage) != "sealed"]
        if not group:
            return
        if outcome.how == "stopped":
            raise Stopped
        if outcome.code == 2:
            raise StageFailed(str(group[0]), 2)
        if outcome.stop_requested:
            raise StageFailed(str(group[0]), 1)
        failed = f"{group[0]}: failed (exit code {outcome.code}); the reason stands above."
        say(f"{failed} Starting again; {again - 1} restarts are left." if again else f"{failed} Run again to continue.")
    raise StageFailed(str(group[0]), 1)
