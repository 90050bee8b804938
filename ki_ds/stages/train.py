"""Stage: tokens + targets → model."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ki_ds.engine import checkpoints, features
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.engine.config import check_device, check_ranks, micro_batch_size
from ki_ds.engine.engine import Engine
from ki_ds.errors import UserError
from ki_ds.experiment.graph import TrainedModel, beyond_vocabulary, needs, taught_by, trained_model, trained_models
from ki_ds.experiment.schedules import shared_steps
from ki_ds.experiment.schema import MUON, Experiment, Model
from ki_ds.files import digest, file_digest
from ki_ds.kernels.dispatch import chosen
from ki_ds.launch import distributed, heartbeat
from ki_ds.metrics import last_step, read_metrics
from ki_ds.models import architectures
from ki_ds.models.language_model import LanguageModel
from ki_ds.planning.costs import Cost, model_cost
from ki_ds.planning.plan import Need, verdict
from ki_ds.planning.room import Room
from ki_ds.progress import say
from ki_ds.sealed import MANIFEST, Identity, State, made_of, read_manifest, reopen, seal
from ki_ds.stages import models, student_data
from ki_ds.stages.ranks import join, prepared
from ki_ds.stages.stage import Refusals, Stage, viewing
from ki_ds.stages.tokenizer import expected
from ki_ds.targets.manifest import read_facts
from ki_ds.training.divergence import run_facts, warning
from ki_ds.training.loop import train
from ki_ds.training.records import making_again
from ki_ds.training.run import TrainRun
from ki_ds.workspace import Workspace

# what of "train" does not change the result, only when it is looked at or how it is cut for memory
NOT_SHAPING = {"micro_batch_size", "evaluate_every", "checkpoint_every", "keep_checkpoints"}
# names of what stands among the inputs by its content
INPUTS: dict[str, Any] = {"start_from": True, "pretrained": True, "inherit": {"teachers"}}


class Train(Stage):
    """Train a model, alone or with a teacher."""

    kind, parent, command, launched = "train", "models", "train", True
    help = "Train the models whose inputs are there."

    @classmethod
    def of(cls, experiment: Experiment) -> list[Train]:
        return [cls(name) for name in trained_models(experiment)]

    def inputs(self, experiment: Experiment) -> list[str]:
        student = trained_model(experiment, self.name)
        taught = [f"targets/{name}" for name in taught_by(experiment, student.model).values() if name]
        before = models.folders(experiment, *needs(experiment, self.name))
        return ["tokenizer", *(f"corpora/{corpus}" for corpus in student.train.on), *taught, *before]

    def identity(self, space: Workspace) -> Identity:
        student = trained_model(space.experiment, self.name)
        model = student.model
        config = {
            **viewing(space.experiment),
            "model_seed": student.seed,
            "model": shaping(model),
            "precision": space.engine_config.precision_record,
        }
        inputs = {f"corpora/{corpus}": space.tokens(corpus).digest for corpus in student.train.on}
        if model.start_from:
            inputs["start_from"] = models.content(space, model.start_from)
        if model.pretrained:
            start = space.folder_or_name(model.pretrained)
            inputs["pretrained"] = models.pretrained_digest(start, model.trust_remote_code)
        for corpus, name in taught_by(space.experiment, model).items():
            if name is None:
                stored = space.stored(student.teachers[corpus], corpus)
                inputs[f"targets/{corpus}"] = str(read_facts(stored)[1]["fingerprint"])
            else:  # not opened: a shard that is missing is found, and computed, when the stage itself runs
                inputs[f"targets/{corpus}"] = str(read_manifest(space.root / "targets" / name)["fingerprint"])
        return Identity(self.kind, config, inputs, {"config.model.train.steps": why_not_longer(student)})

    def state(self, space: Workspace) -> State:
        found = super().state(space)
        return "unsealed" if found == "other" and self.begins(space, self.identity(space)) else found

    def begins(self, space: Workspace, identity: Identity) -> int:
        """Up to which step its folder is the beginning of this run, which is longer and otherwise the same; 0: it is
        not, or has no checkpoint up to there."""
        folder, student = space.root / self.folder, trained_model(space.experiment, self.name)
        found = made_of(folder)
        with suppress(KeyError, TypeError):  # not of a train stage
            steps = found["config"]["model"]["train"]["steps"]
            if steps < student.train.steps and course(found, student) == course(identity.record, student):
                shared = shared_steps(student.train.model_copy(update={"steps": steps}), student.model.inherit)
                return shared if checkpoints.reaches(folder / "checkpoints", shared) else 0
        return 0

    def extend(self, space: Workspace, identity: Identity) -> None:
        """Where its folder is the beginning of this run, go on in it: back to where the two part, and unsealed."""
        folder = space.root / self.folder
        if shared := self.begins(space, identity):
            say(f"  {self}: is trained longer, from a checkpoint of at most {shared} steps")
            checkpoints.go_back(folder / "checkpoints", shared)  # first: those behind it are of the shorter run alone
            reopen(folder, identity)

    def check_identity(self, space: Workspace) -> None:
        folder = space.root / self.folder
        if (folder / MANIFEST).exists() and self.begins(space, self.identity(space)):
            raise UserError(f"{folder}: is to be trained longer. Run `ki-ds train`: it goes on in it.")
        super().check_identity(space)

    def progress(self, space: Workspace) -> str:
        done = last_step(space.root / self.folder / "metrics.jsonl")
        return f"{done} of {trained_model(space.experiment, self.name).train.steps} steps" if done else ""

    def refuse(self, space: Workspace, ranks: int, here: bool, refusals: Refusals) -> None:
        student = trained_model(space.experiment, self.name)
        engine = refusals.gather(lambda: space.engine_config)
        if refusals.gather(self.state, space) != "sealed":
            if here and engine is not None:
                refusals.gather(check_device, engine)
                for check in features.requirements(engine):
                    refusals.gather(check)
            refusals.gather(micro_batch_size, student.train, ranks, student.place)
            if engine is not None:
                refusals.gather(check_ranks, engine, ranks)
        tokenizer = refusals.gather(expected, space)
        for corpus, name in taught_by(space.experiment, student.model).items():
            if name is None:
                refusals.gather(student_data.check_stored, space, student, corpus, tokenizer)
        if tokenizer is None:
            return
        refusals.gather(models.checked_configuration, space, self.name, tokenizer)
        refusals.lines += beyond_vocabulary(space.experiment, tokenizer.size)

    def cost(self, space: Workspace, ranks: int, room: Room) -> Cost:
        e, student, tokenizer = space.experiment, trained_model(space.experiment, self.name), expected(space)
        config, train = models.configuration(space, self.name, tokenizer), student.train
        spent, sequences = model_cost(e, config), train.steps * train.batch_size
        found = Cost(
            steps=train.steps,
            tokens=sequences * e.sequence_length,
            flops=sequences * spent.training_flops_per_sequence,
            parameters=spent.parameters,
        )
        if self.state(space) == "sealed":
            return found  # its memory was there; and it may not fit so many ranks
        need, at_once = Need(e, student, config, ranks, room.gpu), micro_batch_size(train, ranks, student.place)
        memory = need.at(space.engine_config, at_once)
        return replace(
            found,
            memory=memory.device + (0 if room.gpu else memory.host),
            note=f"{self.name}: {verdict(need, at_once, space.engine_config, room)}",
        )

    def run(self, space: Workspace) -> None:
        identity, device = join(self, space)
        if distributed.rank() == 0:
            self.extend(space, identity)
        if prepared(self, space, identity):
            return
        if distributed.rank() == 0:
            checkpoints.withdraw(space.root / self.folder / "model")  # of a shorter run, or of one that was not sealed
        check_device(space.engine_config)
        check_ranks(space.engine_config, distributed.world_size())
        e, folder, student = space.experiment, space.root / self.folder, trained_model(space.experiment, self.name)
        micro = micro_batch_size(student.train, distributed.world_size(), student.place)
        layout = BatchLayout(student.train.batch_size, micro, distributed.rank(), distributed.world_size())
        validation = {name: (space.tokens(name).validation, space.viewer(name)) for name in student.train.on}
        if distributed.rank() == 0:
            say(f"  {self}: the loss runs {chosen(device, space.engine_config.compute_dtype)}")
        run = TrainRun(
            self.name, student.train, student.model.inherit, student.seed, e.sequence_length, validation
        )  # fmt: skip
        with heartbeat.lengthy(f"{self}: loading and compiling"):
            loaded = models.new_student(space, student)
            engine = Engine(
                LanguageModel(loaded, space.tokenizer.size, student.place).to(device), student.train, layout,
                space.engine_config,
            )  # fmt: skip
        loader, state = student_data.loader(space, student, layout), {"fingerprint": course(identity.record, student)}
        train(engine, loader, run, folder, state, space.trust_checkpoints)
        with heartbeat.lengthy(f"{self}: writing the model"):
            engine.export(folder / "model")
        if distributed.rank() == 0:
            self.seal(space, identity, student)
        distributed.barrier()

    def seal(self, space: Workspace, identity: Identity, student: TrainedModel) -> None:
        """Seal the folder of a finished model, with the tokenizer beside the weights.

        Raises:
            UserError: its metrics are not whole.
        """
        folder = space.root / self.folder
        known = architectures.positions(models.configuration(space, self.name, space.tokenizer))
        space.tokenizer.save(folder / "model", known or space.experiment.sequence_length)
        weights = {}
        for file in sorted((folder / "model").glob("*.safetensors")):
            heartbeat.report(f"{self}: reading {file.name} once more")
            weights[file.name] = file_digest(file)
        heartbeat.report(f"{self}: reading metrics.jsonl")
        measured = run_facts(read_metrics(folder / "metrics.jsonl", student.train.steps, partial(making_again, folder)))
        facts = {"content": digest(weights), **measured, **training_facts(space, student)}
        if measured["diverged"]:
            say(f"  {warning(str(self), measured['diverged'])}")
        with heartbeat.lengthy(f"{self}: sealing"):
            seal(folder, identity, facts, leave_out=("checkpoints", "tensorboard"))


def course(record: dict[str, Any], student: TrainedModel) -> str:
    """What the checkpoints of a run belong to, by the record of its identity; without the number of steps where longer
    runs begin with the same ones."""
    train = record["config"]["model"]["train"]
    if shared_steps(student.train, student.model.inherit):
        train = {key: value for key, value in train.items() if key != "steps"}
    model = {**record["config"]["model"], "train": train}
    return digest({**record, "config": {**record["config"], "model": model}})


def why_not_longer(student: TrainedModel) -> str:
    """The words on a model that was trained with other `steps` and cannot be trained longer in its folder."""
    train, inherit = student.train, student.model.inherit
    no_beginning = "what was trained is no beginning of a run with others"
    if train.schedule == "linear":
        why = f"The learning rate falls to the last of the steps, so {no_beginning}"
    elif inherit is not None and inherit.alpha_T is not None:
        why = f'With "alpha_T" alpha goes by the number of steps, so {no_beginning}'
    else:
        before = " of before its decay" if train.schedule == "wsd" else ""
        why = f"A model is trained longer where nothing but more steps is asked for and a checkpoint{before} is left"
    return f'{why}; to train it on, leave it and add a model with "start_from": "{student.name}".'


def shaping(model: Model) -> dict[str, Any]:
    """What of a model's description shapes the result."""
    unused = MUON if model.train and model.train.optimizer != "muon" else set()
    return model.model_dump(mode="json", exclude={"train": NOT_SHAPING | unused, "seed": True, **INPUTS})


def training_facts(space: Workspace, student: TrainedModel) -> dict[str, Any]:
    """Sizes and costs, which the report needs to know of a training run."""
    e, train = space.experiment, student.train

    def flops(teacher: str) -> float | None:
        """Of a forward pass over a sequence; None: predictions made elsewhere, of which nobody here knows."""
        if e.models[teacher].targets:
            return None
        return model_cost(e, models.configuration(space, teacher, space.tokenizer)).flops_per_sequence

    own = model_cost(e, models.configuration(space, student.name, space.tokenizer))
    return {
        "parameters": own.parameters,
        "flops_per_step": own.training_flops_per_sequence * train.batch_size,
        "steps": train.steps,
        "batch_size": train.batch_size,
        "sequence_length": e.sequence_length,
        "precision": space.engine_config.precision,
        "ranks": distributed.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "teacher_steps": student.teacher_steps,
        "teachers": {
            corpus: {
                "model": teacher,
                "flops_per_sequence": flops(teacher),
                "share": train.on[corpus] / sum(train.on.values()),
            }
            for corpus, teacher in student.teachers.items()
        },
    }
