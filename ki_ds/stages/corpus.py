"""Stage: text → token sequences, memory-mapped."""

from __future__ import annotations

from ki_ds.corpus.sources import Tally, documents
from ki_ds.corpus.tokens import build
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Experiment
from ki_ds.sealed import MANIFEST, Identity, prepare, seal
from ki_ds.stages.sources import described, or_recorded
from ki_ds.stages.stage import Refusals, Stage
from ki_ds.workspace import Workspace


class Corpus(Stage):
    """Tokenise a corpus; one process."""

    kind, parent, command = "corpus", "corpora", "corpus"
    help = "Train the tokenizer and tokenise the corpora."

    @classmethod
    def of(cls, experiment: Experiment) -> list[Corpus]:
        return [cls(name) for name in experiment.corpora]

    def inputs(self, experiment: Experiment) -> list[str]:
        return ["tokenizer"]

    def identity(self, space: Workspace) -> Identity:
        e = space.experiment
        config = {
            "objective": e.objective,
            "sequence_length": e.sequence_length,
            "validation": e.corpora[self.name].validation,
            "text": or_recorded(space, self.folder, "text", lambda: described(space, self.name)),
        }
        return Identity(self.kind, config, {"tokenizer": space.tokenizer.digest})

    def refuse(self, space: Workspace, ranks: int, here: bool, refusals: Refusals) -> None:
        if (space.root / self.folder / MANIFEST).exists() and not (space.redo and self.state(space) == "other"):
            return  # its sources may be gone
        for index in range(len(space.experiment.corpora[self.name].sources)):
            refusals.gather(self.check_source, space, index)

    def check_source(self, space: Workspace, index: int) -> None:
        """Read the first document of a source.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        corpus, place = space.experiment.corpora[self.name], f"corpora.{self.name}"
        source, own = corpus.sources[index : index + 1], f"{place}.sources.{index}"
        try:
            found = next(documents(source, space.bases, place, corpus.invalid_utf8, Tally(), index), None)
        except UserError as error:
            raise error if str(error).startswith(own) else UserError(f"{own}: {error}") from None
        if found is None:
            raise UserError(f"{own}: there is no text in it; expected at least one document")

    def run(self, space: Workspace) -> None:
        folder, identity, e = space.root / self.folder, self.identity(space), space.experiment
        if prepare(folder, identity):
            return
        facts = build(
            folder, self.name, e.corpora[self.name], space.bases, space.tokenizer, e.objective, e.sequence_length
        )  # fmt: skip
        seal(folder, identity, facts)
