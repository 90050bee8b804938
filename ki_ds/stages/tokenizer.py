"""Stage: text → the experiment's one tokenizer, trained on its corpora or given."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.sources import Tally, documents
from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Experiment, TrainTokenizer
from ki_ds.progress import Progress
from ki_ds.sealed import MANIFEST, Identity, prepare, seal
from ki_ds.stages.sources import described, or_recorded
from ki_ds.stages.stage import Refusals, Stage
from ki_ds.workspace import Workspace


class Tokenizer(Stage):
    """Train the tokenizer, or copy the one that is named; one process."""

    kind, parent, command = "tokenizer", "", "corpus"

    @classmethod
    def of(cls, experiment: Experiment) -> list[Tokenizer]:
        return [cls("tokenizer")]

    def inputs(self, experiment: Experiment) -> list[str]:
        return []

    def identity(self, space: Workspace) -> Identity:
        e, train = space.experiment, space.experiment.tokenizer.train
        config: dict[str, Any] = {"objective": e.objective}
        if train:
            config["train"] = train.model_dump(mode="json", exclude={"on"})
            config["text"] = or_recorded(space, self.folder, "text", lambda: [described(space, n) for n in train.on])
        else:
            config["given"] = or_recorded(space, self.folder, "given", lambda: given(space).digest)
        return Identity(self.kind, config, {})

    def refuse(self, space: Workspace, ranks: int, here: bool, refusals: Refusals) -> None:
        refusals.gather(expected, space)

    def run(self, space: Workspace) -> None:
        folder, identity = space.root / self.folder, self.identity(space)
        if prepare(folder, identity):
            return
        train = space.experiment.tokenizer.train
        found = trained(space, train) if train else given(space)
        found.save(folder)
        seal(folder, identity, {"content": found.digest, "vocabulary": found.size})


@cache
def given(space: Workspace) -> TextTokenizer:
    """The tokenizer that the experiment names.

    Raises:
        UserError: it cannot be loaded.
    """
    name = space.folder_or_name(str(space.experiment.tokenizer.pretrained))
    return tokenizers.load(name, space.experiment.objective, "tokenizer.pretrained")


def trained(space: Workspace, train: TrainTokenizer) -> TextTokenizer:
    """A tokenizer trained on the text of corpora.

    Raises:
        UserError: a source cannot be read, or all of them are empty.
    """
    objective, tally = space.experiment.objective, Tally()
    with Progress("tokenizer", None, "documents") as progress:

        def texts() -> Iterator[str]:
            for name in train.on:
                corpus = space.experiment.corpora[name]
                for text in documents(corpus.sources, space.bases, f"corpora.{name}", corpus.invalid_utf8, tally):
                    progress.advance()
                    yield text

        found = tokenizers.train(texts(), train.vocabulary_size, objective)
    if not tally.documents:
        raise UserError(f"corpora.{train.on[0]}: no text to train a tokenizer on; every source is empty")
    return tokenizers.describe(found, objective, "tokenizer.train")


def expected(space: Workspace) -> TextTokenizer:
    """The experiment's tokenizer: as sealed, as given, or with the numbers that one yet to be trained will have.

    Raises:
        UserError: the one that is given cannot be loaded.
    """
    known, sealed = space.expected_tokenizers, (space.root / "tokenizer" / MANIFEST).exists()
    if sealed not in known:  # every stage asks, and listing the sources may take long
        known[sealed] = _expected(space)
    return known[sealed]


def _expected(space: Workspace) -> TextTokenizer:
    train = space.experiment.tokenizer.train
    if Tokenizer("tokenizer").state(space) == "sealed":
        return space.tokenizer
    return tokenizers.expected(train.vocabulary_size, space.experiment.objective) if train else given(space)
