"""What a student reads: its corpora, and the targets of its teachers, checked against what it asks for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.corpus.tokens import Tokens
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.errors import UserError
from ki_ds.experiment.graph import TrainedModel, taught_by
from ki_ds.experiment.schedules import alpha
from ki_ds.sealed import open_sealed
from ki_ds.stages.corpus import Corpus
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.manifest import open_folder
from ki_ds.training.batches import TargetCollator
from ki_ds.training.loader import CorpusReader, Loader
from ki_ds.workspace import Workspace


def loader(space: Workspace, student: TrainedModel, layout: BatchLayout) -> Loader:
    """The batches of a model's training.

    Raises:
        UserError: targets are not finished, or not what the student asks for.
    """
    inherit = student.model.inherit
    collate = None
    if inherit:
        k = inherit.targets.selection(inherit.temperature).k
        collate = TargetCollator(k, inherit.temperature if inherit.targets.tail else None)
    schedule = partial(alpha, inherit, steps=student.train.steps)
    return Loader(readers(space, student), student.mix, layout, schedule, collate)


def readers(space: Workspace, student: TrainedModel) -> list[CorpusReader]:
    """The corpora that a model is trained on, with its teachers' targets.

    Raises:
        UserError: as `loader`.
    """
    found = []
    for corpus in student.train.on:
        stored = targets(space, student, corpus)
        found.append(
            CorpusReader(corpus, space.tokens(corpus).train, space.stream(corpus), space.viewer(corpus), stored)
        )
    quanta = {str(one.targets.folder): one.targets.codec.quantum for one in found if one.targets}
    if len(set(quanta.values())) > 1:
        listed = ", ".join(f"{folder}: {value:g}" for folder, value in quanta.items())
        raise UserError(f"{student.place}: its targets were quantised differently ({listed}); make them alike")
    return found


def targets(space: Workspace, student: TrainedModel, corpus: str) -> ShardFolder | None:
    """The targets that a student reads on a corpus.

    Raises:
        UserError: they are not finished, or not what the student asks for.
    """
    inherit = student.model.inherit
    if inherit is None or corpus not in inherit.teachers:
        return None
    name = taught_by(space.experiment, student.model)[corpus]
    if name is None:
        found = open_folder(space.stored(inherit.teachers[corpus], corpus))
    else:
        folder: Path = space.root / "targets" / name
        open_sealed(folder)
        found = open_folder(folder)
    check(space, student, corpus, found, space.tokenizer, space.tokens(corpus))
    return found


def check_stored(space: Workspace, student: TrainedModel, corpus: str, tokenizer: TextTokenizer | None) -> None:
    """Check predictions made elsewhere before anything runs, as far as their manifest and what is known yet tell.

    Raises:
        UserError: they are not there, or as `check`.
    """
    found = open_folder(space.stored(student.teachers[corpus], corpus))
    if tokenizer is None:
        return
    sealed = Corpus(corpus).state(space) == "sealed"
    check(space, student, corpus, found, tokenizer, space.tokens(corpus) if sealed else None)


def check(
    space: Workspace, student: TrainedModel, corpus: str, found: ShardFolder, tokenizer: TextTokenizer,
    tokens: Tokens | None,
) -> None:  # fmt: skip
    """Check that targets hold what a student asks for. `tokenizer`: where it is yet to be trained, it has at most so
    many ids as it says; `tokens`: None while the corpus is yet to be made.

    Raises:
        UserError: naming the difference.
    """
    inherit = student.model.inherit
    assert inherit is not None  # else it reads no targets
    wanted, folder, codec, size = inherit.targets, found.folder, found.codec, tokenizer.size
    selection = wanted.selection(inherit.temperature)
    said, counts = found.header.selection, codec.counts
    if said is None:
        raise UserError(f"{folder}: the header of its shards does not say what was selected")
    alike = replace(said, k=0) == replace(selection, k=0) and counts == selection.counts
    if not alike or codec.k < min(selection.k, codec.vocabulary) or (counts and said.k != selection.k):
        raise UserError(f"{folder}: holds {said.record}; expected {student.place}.inherit.targets {selection.record}")
    if wanted.tail and not codec.stores(inherit.temperature):
        there = ", ".join(f"{temperature:g}" for temperature in codec.temperatures)
        raise UserError(
            f"{folder}: the tail's weight is stored at the temperatures {there}; expected "
            f"{inherit.temperature:g} ({student.place}.inherit.temperature)"
        )
    if found.header.sequence_length != space.experiment.sequence_length:
        raise UserError(
            f"{folder}: of sequences of {found.header.sequence_length} tokens; expected sequence_length "
            f"{space.experiment.sequence_length}"
        )
    if codec.vocabulary > size or (codec.vocabulary < size and tokenizer.digest):
        raise UserError(f"{folder}: of a vocabulary of {codec.vocabulary} ids; the tokenizer has {size}")
    _check_order(space, corpus, found, tokens)
    stream = found.header.stream
    sequences = len(tokens.train) if tokens else stream.sequences if stream else None
    if sequences is None:
        return
    read = min(student.samples_taught(corpus), space.experiment.views * sequences)
    elsewhere = taught_by(space.experiment, student.model)[corpus] is None
    if found.samples < read:
        raise UserError(
            f"{folder}: holds {found.samples} samples; expected the {read} that {student.place} reads of "
            f"corpora.{corpus} while it is taught"
            + ("" if elsewhere else ". Run `ki-ds teach`: it appends what is missing")
        )


def _check_order(space: Workspace, corpus: str, found: ShardFolder, tokens: Tokens | None) -> None:
    """Check that the teacher saw a corpus in the order and with the masks in which a student does, where the header
    tells; views need not be as many, since the first ones are the same ones. What it does not tell, or tells wrongly,
    is found by the digest of each input.

    Raises:
        UserError: naming what differs.
    """
    e, header = space.experiment, found.header
    stream, masking, origin = header.stream, header.masking, header.corpus
    pairs = {
        "objective": (header.objective, e.objective),
        "stream.seed": (stream and stream.seed, e.seed),
        "stream.sequences": (stream and stream.sequences, len(tokens.train) if tokens else None),
        "masking.probability": (masking and masking.probability, e.masking.probability),
        "corpus.digest": (origin and origin.digest, tokens.digest if tokens else None),
    }
    for key, (said, wanted) in pairs.items():
        if said is not None and wanted is not None and said != wanted:
            raise UserError(
                f"{found.folder}: its teacher saw another order or view of corpora.{corpus}: {key}: found {said}, "
                f"expected {wanted}. Take predictions made for this experiment's inputs, or remove the folder and run "
                "`ki-ds teach`"
            )
