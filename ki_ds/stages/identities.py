"""What every stage's folder is made of: the part of the experiment that shapes it, and the digests of its inputs."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ki_ds.corpus.sources import FileSource, files
from ki_ds.errors import UserError
from ki_ds.experiment.graph import Stage, targets_needed, taught_by
from ki_ds.experiment.schema import Model
from ki_ds.files import digest, file_digest
from ki_ds.sealed import MANIFEST, UNSEALED, Identity, parse_manifest, read_manifest
from ki_ds.targets.manifest import read_facts
from ki_ds.targets.spec import TargetSpec

if TYPE_CHECKING:
    from ki_ds.workspace import Workspace

SAMPLE_BYTES = 1 << 16
# what of "train" does not change the result, only when it is looked at or how it is cut for memory
NOT_SHAPING = {"micro_batch_size", "evaluate_every", "checkpoint_every", "keep_checkpoints"}


def identity(space: Workspace, stage: Stage) -> Identity:
    """What the stage's folder is made of.

    Raises:
        UserError: an input is not sealed yet.
    """
    e = space.experiment
    config: dict[str, Any]
    if stage.kind == "tokenizer":
        train = e.tokenizer.train
        sources = {name: _sources(space, name, stage) for name in train.on} if train else {}
        config = {"objective": e.objective, "tokenizer": e.tokenizer.model_dump(mode="json"), "sources": sources}
        return Identity("tokenizer", config, {})
    if stage.kind == "corpus":
        sources = {stage.name: _sources(space, stage.name, stage)}
        config = {
            "objective": e.objective,
            "sequence_length": e.sequence_length,
            "validation": e.corpora[stage.name].validation,
            "sources": sources,
        }
        return Identity("corpus", config, {"tokenizer": space.tokenizer.digest})
    viewing: dict[str, Any] = {"objective": e.objective, "seed": e.seed, "sequence_length": e.sequence_length}
    if e.objective == "mlm":
        viewing["masking"] = e.masking.model_dump(mode="json")
    if stage.kind == "teach":
        return _targets(space, stage, viewing)
    if stage.kind == "train":
        return _training(space, stage.name, viewing)
    inputs = {f"corpora/{name}": space.tokens(name).digest for name in e.corpora}
    return Identity("evaluate", viewing, {f"models/{stage.name}": space.model_digest(stage.name), **inputs})


def _targets(space: Workspace, stage: Stage, viewing: dict[str, Any]) -> Identity:
    """Of a teach stage; where its folder holds more than is asked (a larger k, more temperatures), as it is."""
    needed = targets_needed(space.experiment, stage.name)
    inputs = {
        f"models/{needed.teacher}": space.model_digest(needed.teacher),
        f"corpora/{needed.corpus}": space.tokens(needed.corpus).digest,
    }
    bound = space.experiment.target_distortion.mean
    wanted = TargetSpec(needed.selection, needed.temperatures, bound, needed.samples)
    config = {**viewing, **wanted.config}
    if (precision := space.experiment.inference.precision) != "fp32":
        config["precision"] = precision
    folder = space.folder(stage)
    for name in (MANIFEST, UNSEALED):
        path = folder / name
        if path.exists() and (name == MANIFEST or any(folder.glob("*.kit"))):
            found = parse_manifest(path.read_bytes(), str(path))["config"]
            if {"selection", "scalars"} <= found.keys() and TargetSpec.from_config(found, 0).serves(
                wanted, needed.tails
            ):
                config |= {key: found[key] for key in ("selection", "scalars")}
            break
    return Identity("teach", config, inputs)


def _sources(space: Workspace, name: str, stage: Stage) -> dict[str, Any]:
    """What a corpus is read from, with the names and sizes of its files; those recorded where they are gone."""
    corpus = space.experiment.corpora[name]
    found: list[Any] = []
    for index, source in enumerate(corpus.sources):
        if isinstance(source, FileSource):
            try:
                place = f"corpora.{name}.sources.{index}"
                listed = files(source, space.bases, place)
                found += [[Path(path).name, size, sample_digest(Path(path))] for path, size in listed]
            except UserError:
                if not (space.folder(stage) / MANIFEST).exists():
                    raise
                found = read_manifest(space.folder(stage))["config"]["sources"][name]["files"]
                break
    settings = corpus.model_dump(mode="json", exclude={"validation"})
    return {**settings, "files": found}


def _training(space: Workspace, name: str, viewing: dict[str, Any]) -> Identity:
    model = space.experiment.models[name]
    assert model.train is not None
    config = {
        **viewing,
        "model_seed": space.experiment.model_seed(name),
        "model": shaping(model),
        "precision": space.engine_config.precision_record,
    }
    inputs = {f"corpora/{corpus}": space.tokens(corpus).digest for corpus in model.train.on}
    if model.start_from:
        inputs[f"models/{model.start_from}"] = space.model_digest(model.start_from)
    if model.pretrained:
        inputs["pretrained"] = pretrained_digest(space.model_or_name(model.pretrained))
    for corpus, taught in taught_by(space.experiment, model).items():
        if taught is None:
            assert model.inherit is not None
            stored = space.stored(model.inherit.teachers[corpus], corpus)
            inputs[f"stored/{corpus}"] = str(read_facts(stored)[1]["fingerprint"])
            continue
        stage = Stage("teach", taught)
        # not opened: a shard that is missing is found, and computed, when the stage itself runs
        inputs[stage.folder] = str(read_manifest(space.folder(stage))["fingerprint"])
    return Identity("train", config, inputs)


def shaping(model: Model) -> dict[str, Any]:
    """What of a model's description shapes the result."""
    unsaid = {"optimizer"} if model.train and model.train.optimizer == "adamw" else set()  # folders from before it
    return model.model_dump(mode="json", exclude={"train": NOT_SHAPING | unsaid, "seed": True})


@cache
def pretrained_digest(source: str) -> str:
    """Of a model folder: its weights and configuration; of a name on the hub: the name."""
    folder = Path(source)
    if not folder.is_dir():
        return digest({"hub": source})
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return digest({file.name: file_digest(file) for file in files if file.exists()})


def sample_digest(path: Path) -> str:
    """Of a local file's first and last 64 KiB, which most changes touch; empty for other file systems."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        first = file.read(SAMPLE_BYTES)
        file.seek(max(path.stat().st_size - SAMPLE_BYTES, 0))
        return hashlib.sha256(first + file.read(SAMPLE_BYTES)).hexdigest()[:16]
