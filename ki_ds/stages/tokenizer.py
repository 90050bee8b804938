"""Stage: text → the experiment's one tokenizer, trained on its corpora or given."""

from __future__ import annotations

from collections.abc import Iterator

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.sources import Tally, documents
from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Experiment, TrainTokenizer
from ki_ds.progress import Progress
from ki_ds.sealed import MANIFEST, Identity, prepare, seal
from ki_ds.stages.sources import described
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
        e = space.experiment
        train = e.tokenizer.train
        sources = {name: described(space, name, self.folder) for name in train.on} if train else {}
        config = {"objective": e.objective, "tokenizer": e.tokenizer.model_dump(mode="json"), "sources": sources}
        return Identity(self.kind, config, {})

    def refuse(self, space: Workspace, ranks: int, here: bool, refusals: Refusals) -> None:
        refusals.gather(expected, space)

    def run(self, space: Workspace) -> None:
        folder, identity = space.root / self.folder, self.identity(space)
        if prepare(folder, identity):
            return
        given, objective = space.experiment.tokenizer, space.experiment.objective
        if given.train:
            found = trained(space, given.train)
        else:
            found = tokenizers.load(space.folder_or_name(str(given.pretrained)), objective, "tokenizer.pretrained")
        found.hugging_face.save_pretrained(folder)
        seal(folder, identity, {"content": found.digest, "vocabulary": found.size})


def trained(space: Workspace, given: TrainTokenizer) -> TextTokenizer:
    """A tokenizer trained on the text of corpora.

    Raises:
        UserError: a source cannot be read, or all of them are empty.
    """
    objective, tally = space.experiment.objective, Tally()
    with Progress("tokenizer", None, "documents") as progress:

        def texts() -> Iterator[str]:
            for name in given.on:
                corpus = space.experiment.corpora[name]
                for text in documents(corpus.sources, space.bases, f"corpora.{name}", corpus.invalid_utf8, tally):
                    progress.advance()
                    yield text

        found = tokenizers.train(texts(), given.vocabulary_size, objective)
    if not tally.documents:
        raise UserError(f"corpora.{given.on[0]}: no text to train a tokenizer on; every source is empty")
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
    given, objective = space.experiment.tokenizer, space.experiment.objective
    if Tokenizer("tokenizer").state(space) == "sealed":
        return space.tokenizer
    if given.train:
        return tokenizers.expected(given.train.vocabulary_size, objective)
    return tokenizers.load(space.folder_or_name(str(given.pretrained)), objective, "tokenizer.pretrained")
