"""Runs stages: opens what a stage reads, calls it, seals what it made. Under a launcher, every rank runs this."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.sources import Tally, documents
from ki_ds.corpus.tokens import build
from ki_ds.engine import config as engine_config
from ki_ds.engine.engine import Engine
from ki_ds.errors import UserError
from ki_ds.experiment.graph import Stage, stages
from ki_ds.files import digest, file_digest, write_atomically
from ki_ds.launch import distributed, heartbeat
from ki_ds.metrics import finite, read_metrics
from ki_ds.models.language_model import LanguageModel
from ki_ds.planning.costs import training_facts
from ki_ds.progress import Progress, duration, say
from ki_ds.report.page import report
from ki_ds.sealed import MANIFEST, Identity, Manifest, check_identity, prepare, seal, versions
from ki_ds.targets.selection import Selection
from ki_ds.teaching import job as teach
from ki_ds.teaching import teacher as inference
from ki_ds.training.loop import train
from ki_ds.training.records import skipped_facts
from ki_ds.training.run import TrainRun
from ki_ds.training.validation import perplexity, validate
from ki_ds.workspace import Workspace

EVALUATION_MICRO_BATCH = 16  # sequences


def work(stage: Stage, space: Workspace) -> None:
    """Run one stage; a sealed one returns at once.

    Raises:
        UserError: the input or the state of the work directory does not allow it.
    """
    run = {"tokenizer": tokenizer, "corpus": corpus, "teach": teaching, "train": training, "evaluate": evaluation}
    began, shown = time.monotonic(), distributed.rank() == 0
    heartbeat.report(str(stage))
    if shown:
        say(f"{stage} …")
    if stage.kind == "report":
        for one in stages(space.experiment):  # show nothing that was made from something else
            if (space.folder(one) / MANIFEST).exists() and one.kind in ("train", "evaluate"):
                check_identity(space.folder(one), space.identity(one))
        report(space.experiment, space.root)
    else:
        run[stage.kind](stage, space)
    gc.collect()  # an engine is full of cycles; the next stage needs its memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if shown:
        say(f"{stage}: done in {duration(time.monotonic() - began)}")


def tokenizer(stage: Stage, space: Workspace) -> None:
    """Train the tokenizer, or copy the one named; one process."""
    folder, identity = space.folder(stage), space.identity(stage)
    if prepare(folder, identity):
        return
    e = space.experiment
    if e.tokenizer.train:
        tally = Tally()
        with Progress("tokenizer", None, "documents") as progress:

            def texts(names: list[str]) -> Iterator[str]:
                for name in names:
                    given = e.corpora[name]
                    for text in documents(given.sources, space.bases, f"corpora.{name}", given.invalid_utf8, tally):
                        progress.advance()
                        yield text

            trained = tokenizers.train(texts(e.tokenizer.train.on), e.tokenizer.train.vocabulary_size, e.objective)
        if not tally.documents:
            raise UserError(
                f"corpora.{e.tokenizer.train.on[0]}: no text to train a tokenizer on; every source is empty"
            )
        found = tokenizers.describe(trained, e.objective, "tokenizer.train")
    else:
        found = tokenizers.load(space.model_or_name(str(e.tokenizer.pretrained)), e.objective, "tokenizer.pretrained")
    found.hugging_face.save_pretrained(folder)
    seal(folder, identity, {"content": found.digest, "vocabulary": found.size})


def corpus(stage: Stage, space: Workspace) -> None:
    """Tokenise a corpus; one process."""
    folder, identity = space.folder(stage), space.identity(stage)
    if prepare(folder, identity):
        return
    e = space.experiment
    facts = build(
        folder, stage.name, e.corpora[stage.name], space.bases, space.tokenizer, e.objective, e.sequence_length
    )  # fmt: skip
    seal(folder, identity, facts)


def begin(stage: Stage, space: Workspace) -> tuple[Path, Identity, torch.device]:
    """Join the process group and check that all ranks are about to do the same: (folder, identity, device)."""
    device = distributed.init_distributed()
    identity = space.identity(stage)
    shared = {
        "the experiment file": digest(space.experiment.model_dump(mode="json")),
        "the engine JSON": digest(space.engine_config),
        "the tokenizer": space.tokenizer.digest,
        f"what {stage} is made of": identity.fingerprint,
    }
    distributed.agree(shared | {f"the version of {name}": found for name, found in versions().items()})
    return space.folder(stage), identity, device


def prepared(folder: Path, identity: Identity) -> Manifest | None:
    """`prepare` by rank 0, its result on every rank."""
    return distributed.broadcast_object(prepare(folder, identity) if distributed.rank() == 0 else None)


def teaching(stage: Stage, space: Workspace) -> None:
    """Store a teacher's predictions over a corpus."""
    folder, identity, device = begin(stage, space)
    teach.teach(folder, identity, lesson(stage, space, identity), device)


def lesson(stage: Stage, space: Workspace, identity: Identity) -> teach.TeachJob:
    """What a teach stage asks of which teacher.

    Raises:
        UserError: more is asked than there is, or the teacher cannot be run as the experiment says.
    """
    needed, size = space.needed(stage), space.tokenizer.size
    selection, name = Selection(**identity.config["selection"]), needed.corpus
    if selection.kind != "sampled" and selection.k > size:
        raise UserError(f"inherit.targets.k: found {selection.k}; expected at most the tokenizer's vocabulary, {size}")
    settings, codec = space.experiment.inference, space.codec(identity)
    config = inference.check(space, [needed.teacher], space.tokenizer, distributed.world_size())

    def teacher(device: torch.device) -> inference.Teacher:
        def load(dtype: torch.dtype) -> Any:
            return space.finished_model(needed.teacher, dtype)

        return inference.teacher(load, needed.teacher, selection, codec, settings, config, device)

    return teach.TeachJob(
        teacher, needed.teacher, space.tokens(name), space.stream(name), space.viewer(name), needed.samples,
        space.experiment.samples_per_shard, selection, codec, space.targets_header(stage, identity),
        space.experiment.target_distortion,
    )  # fmt: skip


def training(stage: Stage, space: Workspace) -> None:
    """Train a model."""
    folder, identity, device = begin(stage, space)
    if prepared(folder, identity):
        return
    engine_config.check_device(space.engine_config, space.engine_source)
    name, e = stage.name, space.experiment
    model = e.models[name]
    assert model.train is not None
    layout = space.layout(model.train, name, distributed.rank(), distributed.world_size())
    validation = {corpus: (space.tokens(corpus).validation, space.viewer(corpus)) for corpus in model.train.on}
    run = TrainRun(name, model.train, model.inherit, e.model_seed(name), e.sequence_length, validation)
    with heartbeat.lengthy(f"{stage}: loading and compiling"):
        student = LanguageModel(space.new_student(name), space.tokenizer.size, f"models.{name}").to(device)
        engine = Engine(student, model.train, layout, space.engine_config)
    train(engine, space.loader(name, layout), run, folder, {"fingerprint": identity.fingerprint})
    with heartbeat.lengthy(f"{stage}: writing the model"):
        engine.export(folder / "model")
    if distributed.rank() == 0:
        space.tokenizer.hugging_face.save_pretrained(folder / "model")
        weights = {}
        for file in sorted((folder / "model").glob("*.safetensors")):
            heartbeat.report(f"{stage}: reading {file.name} once more")
            weights[file.name] = file_digest(file)
        lines = read_metrics(folder / "metrics.jsonl")
        facts = {"content": digest(weights), **skipped_facts(lines), **training_facts(space, name)}
        with heartbeat.lengthy(f"{stage}: sealing"):
            seal(folder, identity, facts, leave_out=("checkpoints", "tensorboard"))
    distributed.barrier()


def evaluation(stage: Stage, space: Workspace) -> None:
    """Perplexity of a finished model on the validation part of every corpus, under fixed masks."""
    folder, identity, device = begin(stage, space)
    if prepared(folder, identity):
        return
    e = space.experiment
    with heartbeat.lengthy(f"{stage}: loading"):
        loaded = space.finished_model(stage.name).eval()
        model = LanguageModel(loaded, space.tokenizer.size, f"models.{stage.name}").to(device)
    found = {}
    total = sum(len(space.tokens(name).validation) for name in e.corpora)
    with Progress(f"evaluate {stage.name}", total, "sequences", 0, distributed.rank() == 0) as progress:
        for name in e.corpora:
            heartbeat.stop_if_asked()
            part, viewer = space.tokens(name).validation, space.viewer(name)
            nats, rows = validate(model, part, viewer, EVALUATION_MICRO_BATCH, device, progress)
            mean = nats / max(rows, 1)
            found[name] = {"perplexity": finite(perplexity(nats, rows)), "nats": finite(mean), "rows": rows}
    if distributed.rank() == 0:
        text = json.dumps({"model": stage.name, "corpora": found}, indent=1, allow_nan=False)
        write_atomically(folder / "perplexity.json", text.encode())
        seal(folder, identity, {})
    distributed.barrier()
