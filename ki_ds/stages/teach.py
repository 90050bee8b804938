"""Stage: teacher model + tokens → targets."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch

from ki_ds.errors import UserError
from ki_ds.exchange.teacher_inputs import folder_header
from ki_ds.experiment.graph import WantedTargets, beyond_vocabulary, taught_by, trained_models, wanted_targets
from ki_ds.experiment.schema import Experiment
from ki_ds.kernels.dispatch import chosen
from ki_ds.launch import distributed
from ki_ds.planning import memory
from ki_ds.planning.costs import Cost, model_cost, rows_per_sequence
from ki_ds.planning.plan import UNTRACED
from ki_ds.planning.room import Room
from ki_ds.progress import say
from ki_ds.sealed import MANIFEST, UNSEALED, Identity, State, parse_manifest
from ki_ds.stages import models
from ki_ds.stages.corpus import Corpus
from ki_ds.stages.ranks import join
from ki_ds.stages.stage import Refusals, Stage, viewing
from ki_ds.stages.tokenizer import expected
from ki_ds.targets.header import Origin
from ki_ds.targets.spec import TargetSpec
from ki_ds.teaching import checks
from ki_ds.teaching import teacher as teachers
from ki_ds.teaching.batch_size import MICRO_BATCH
from ki_ds.teaching.job import TeachJob, complete, teach
from ki_ds.workspace import Workspace


class Teach(Stage):
    """Store a teacher's predictions over a corpus, for all students that read them."""

    kind, parent, command, launched = "teach", "targets", "teach", True
    help = "Store the teachers' predictions."

    @classmethod
    def of(cls, experiment: Experiment) -> list[Teach]:
        students = trained_models(experiment).values()
        names = (name for student in students for name in taught_by(experiment, student.model).values())
        return [cls(name) for name in dict.fromkeys(names) if name]

    def inputs(self, experiment: Experiment) -> list[str]:
        wanted = wanted_targets(experiment, self.name)
        return ["tokenizer", f"corpora/{wanted.corpus}", *models.folders(experiment, wanted.teacher)]

    def wanted(self, space: Workspace) -> WantedTargets:
        """What its students read; past the last view samples come again, so no more than all views are stored."""
        wanted = wanted_targets(space.experiment, self.name)
        every = space.experiment.views * len(space.tokens(wanted.corpus).train)
        return replace(wanted, spec=replace(wanted.spec, samples=min(wanted.spec.samples, every)))

    def spec(self, space: Workspace) -> TargetSpec:
        """What its folder holds: as wanted; or, where there is one that serves (a larger k, more temperatures), as it
        is."""
        wanted, folder = self.wanted(space), space.root / self.folder
        for name in (MANIFEST, UNSEALED):
            path = folder / name
            if path.exists() and (name == MANIFEST or any(folder.glob("*.kit"))):
                config = parse_manifest(path.read_bytes(), str(path))["config"]
                with contextlib.suppress(KeyError, TypeError, ValueError):  # not of a teach stage: it does not serve
                    found = TargetSpec.from_config(config, wanted.spec.samples)
                    if found.serves(wanted.spec, wanted.tails):
                        return replace(found, mean_distortion=wanted.spec.mean_distortion)
                break
        return wanted.spec

    def identity(self, space: Workspace) -> Identity:
        wanted, e = wanted_targets(space.experiment, self.name), space.experiment
        inputs = {
            "model": models.content(space, wanted.teacher),
            "corpus": space.tokens(wanted.corpus).digest,
        }
        config = {**viewing(e), **self.spec(space).config}
        if e.inference.precision != "fp32":
            config["precision"] = e.inference.precision
        return Identity(self.kind, config, inputs)

    def state(self, space: Workspace) -> State:
        found, folder = super().state(space), space.root / self.folder
        if found == "other" and not (folder / MANIFEST).exists() and not any(folder.glob("*.kit")):
            return "absent"  # begun with other settings, but nothing was stored
        if found == "sealed" and not complete(space.root / self.folder, self.wanted(space).spec.samples):
            return "unsealed"
        return found

    def refuse(self, space: Workspace, ranks: int, here: bool, refusals: Refusals) -> None:
        e, wanted = space.experiment, wanted_targets(space.experiment, self.name)
        teacher = wanted.teacher
        tokenizer = refusals.gather(expected, space)
        config = None if tokenizer is None else refusals.gather(models.checked_configuration, space, teacher, tokenizer)
        if tokenizer is not None:
            refusals.lines += beyond_vocabulary(e, tokenizer.size)
        if refusals.gather(self.state, space) != "sealed":
            known = {} if config is None else {teacher: config}
            refusals.gather(checks.check, e.inference, ranks, known, e.objective)
            refusals.gather(lambda: space.inference_config)

    def cost(self, space: Workspace, ranks: int, room: Room) -> Cost:
        e, tokenizer = space.experiment, expected(space)
        wanted = wanted_targets(e, self.name)
        if Corpus(wanted.corpus).state(space) == "sealed":
            wanted = self.wanted(space)
        config = models.configuration(space, wanted.teacher, tokenizer)
        samples, per_entry = wanted.spec.samples, 4 if tokenizer.size > 1 << 16 else 3  # before zstd
        taken, traced = memory.inference(config, e.objective, MICRO_BATCH, e.sequence_length, room.gpu)
        return Cost(
            tokens=samples * e.sequence_length,
            flops=samples * model_cost(e, config).flops_per_sequence,
            bytes=samples * rows_per_sequence(e) * (10 + wanted.spec.selection.k * per_entry),
            memory=taken,
            note="" if traced else f"{self.name}: memory is without the teacher's activations, {UNTRACED}",
        )

    def run(self, space: Workspace) -> None:
        identity, device = join(self, space)
        if distributed.rank() == 0:
            self.make_way(space)
        distributed.barrier()
        identity = self.identity(space)  # what was set aside shapes the new one no more, though it would have served
        teach(space.root / self.folder, identity, self.job(space, identity), device)

    def job(self, space: Workspace, identity: Identity) -> TeachJob:
        """What a teacher is shown, and what is kept of its predictions.

        Raises:
            UserError: more is wanted than there is, or the teacher cannot be run as the experiment says.
        """
        e, size = space.experiment, space.tokenizer.size
        wanted, spec = self.wanted(space), self.spec(space)
        selection, corpus = spec.selection, wanted.corpus
        if lines := beyond_vocabulary(e, size):
            raise UserError("\n".join(lines))
        codec, engine = spec.codec(size), space.inference_config
        configuration = models.configuration(space, wanted.teacher, space.tokenizer)
        checks.check(e.inference, distributed.world_size(), {wanted.teacher: configuration}, e.objective)

        def teacher(device: torch.device) -> teachers.Teacher:
            if distributed.rank() == 0:
                say(f"  {self}: selection runs {chosen(device, checks.DTYPES[e.inference.precision])}")

            def load(dtype: torch.dtype) -> Any:
                return models.finished(space, wanted.teacher, dtype)

            return teachers.teacher(load, wanted.teacher, selection, codec, e.inference, engine, device)

        origin = Origin(wanted.teacher, identity.inputs["model"])
        shared = folder_header(e, corpus, space.tokens(corpus), space.tokenizer.digest, origin, selection, codec)
        return TeachJob(
            teacher, wanted.teacher, space.tokens(corpus), space.stream(corpus), space.viewer(corpus), spec.samples,
            e.samples_per_shard, selection, shared, e.target_distortion,
        )  # fmt: skip
