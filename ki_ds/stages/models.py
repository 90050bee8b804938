"""The models of an experiment as Hugging Face has them: before they exist, new, and finished."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.errors import UserError
from ki_ds.experiment.graph import TrainedModel
from ki_ds.experiment.schema import Experiment
from ki_ds.files import digest, file_digest
from ki_ds.models import architectures, hugging_face
from ki_ds.sealed import open_sealed
from ki_ds.workspace import Workspace


def folder(name: str) -> str:
    """The folder under the work directory of a model that is trained here."""
    return f"models/{name}"


def folders(experiment: Experiment, *names: str) -> list[str]:
    """Those of the named models that are trained here."""
    return [folder(name) for name in names if experiment.models[name].train]


def source(space: Workspace, name: str) -> str:
    """The Hugging Face folder (or hub name) of a finished model."""
    model = space.experiment.models[name]
    if model.train is None:
        return space.folder_or_name(str(model.pretrained))
    return str(space.root / folder(name) / "model")


def origin(experiment: Experiment, name: str) -> str:
    """The model that another one starts from, at the beginning of the chain; often itself."""
    while (further := experiment.models[name].start_from) is not None:
        name = further
    return name


def trusted(experiment: Experiment, name: str) -> bool:
    """Whether code that came with a pretrained model may run for this one, which is it or descends from it."""
    return experiment.models[origin(experiment, name)].trust_remote_code


def content(space: Workspace, name: str) -> str:
    """What later stages know a finished model by: the digest of its weights; of one that is to be trained longer first,
    which no folder was made of, words.

    Raises:
        UserError: it is not finished.
    """
    if (train := space.experiment.models[name].train) is not None:
        found = open_sealed(space.root / folder(name))
        done = found.facts.get("steps", train.steps)
        return found.digest if done == train.steps else f"{name} of {train.steps} steps, trained to {done}"
    return pretrained_digest(source(space, name), space.experiment.models[name].trust_remote_code)


@cache
def pretrained_digest(source: str, trusted: bool = False) -> str:
    """Of a model folder: its weights and configuration, and the code with it where that runs; of a name on the hub: the
    name."""
    folder, said = Path(source), {"trust_remote_code": "true"} if trusted else {}
    if not folder.is_dir():
        return digest({"hub": source, **said})
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json", *(folder.glob("*.py") if trusted else ())])
    return digest({file.name: file_digest(file) for file in files if file.exists()} | said)


def configuration(space: Workspace, name: str, tokenizer: TextTokenizer) -> Any:
    """The Hugging Face configuration of a model, before it exists.

    Raises:
        UserError: there is no such architecture or model, or it does not fit the experiment.
    """
    e, model = space.experiment, space.experiment.models[name]
    if model.architecture is not None:
        place = f"models.{name}.architecture"
        return architectures.configuration(model.architecture, e.objective, tokenizer, e.sequence_length, place)
    if model.start_from is not None:
        return configuration(space, model.start_from, tokenizer)
    return hugging_face.pretrained_configuration(
        space.folder_or_name(str(model.pretrained)), f"models.{name}.pretrained", model.trust_remote_code
    )


def new_student(space: Workspace, trained: TrainedModel) -> Any:
    """The Hugging Face model that training begins with."""
    model, objective, dropout = trained.model, space.experiment.objective, trained.train.dropout
    if model.architecture is not None:
        config = configuration(space, trained.name, space.tokenizer)
        architectures.set_dropout(config, dropout)
        return hugging_face.new_model(config, objective, trained.seed)
    start = source(space, model.start_from) if model.start_from else space.folder_or_name(str(model.pretrained))
    trust = trusted(space.experiment, trained.name)
    found = hugging_face.load_model(start, objective, trained.place, dropout, trusted=trust)
    check_fit(space, trained.name, found.config, space.tokenizer.size)
    return found


def finished(space: Workspace, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A finished model, to teach or to be evaluated."""
    found = hugging_face.load_model(
        source(space, name), space.experiment.objective, f"models.{name}", dtype=dtype,
        trusted=trusted(space.experiment, name),
    )  # fmt: skip
    check_fit(space, name, found.config, space.tokenizer.size)
    return found


def check_fit(space: Workspace, name: str, config: Any, vocabulary: int) -> None:
    """Check that a model fits the tokenizer's vocabulary and the experiment's sequence length.

    Raises:
        UserError: its head has another number of rows, or it has too few positions.
    """
    e, place = space.experiment, f"models.{name}"
    if config.vocab_size < vocabulary:
        raise UserError(f"{place}: its vocabulary has {config.vocab_size} ids, the tokenizer {vocabulary}")
    if config.vocab_size > vocabulary and not e.models[name].padded_vocabulary:
        raise UserError(
            f"{place}: its vocabulary has {config.vocab_size} ids, the tokenizer {vocabulary}. If the rest is padding "
            'that no text ever uses, say so with "padded_vocabulary": true; else take its own tokenizer'
        )
    usable = architectures.positions(config)
    if usable is not None and usable < e.sequence_length:
        raise UserError(f"{place}: it knows {usable} positions, sequence_length is {e.sequence_length}")


def checked_configuration(space: Workspace, name: str, tokenizer: TextTokenizer) -> Any:
    """The same, after checking that the pretrained model that it comes from, if any, fits and has this tokenizer.

    Raises:
        UserError: as `configuration`, or it does not.
    """
    found, first = configuration(space, name, tokenizer), origin(space.experiment, name)
    if space.experiment.models[first].pretrained is not None:
        check_pretrained(space, first, found, tokenizer)
    return found


def check_pretrained(space: Workspace, name: str, config: Any, tokenizer: TextTokenizer) -> None:
    """Check that a pretrained model fits the experiment and has its tokenizer.

    Raises:
        UserError: it does not.
    """
    check_fit(space, name, config, tokenizer.size)
    folder = space.folder_or_name(str(space.experiment.models[name].pretrained))
    own = tokenizers.load(folder, space.experiment.objective, f"models.{name}.pretrained")
    if own.digest != tokenizer.digest:
        raise UserError(
            f"models.{name}.pretrained: {folder} has another tokenizer ({own.size} ids) than this experiment "
            f'({tokenizer.size} ids); expected "tokenizer": {{"pretrained": "{folder}"}}, or a model made with this one'
        )
