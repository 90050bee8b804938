"""Stage: text → token sequences, memory-mapped."""

from __future__ import annotations

from ki_ds.corpus.sources import FileSource, files
from ki_ds.corpus.tokens import build
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
        if (space.root / self.folder / MANIFEST).exists():
            return  # its sources may be gone
        for index, source in enumerate(space.experiment.corpora[self.name].sources):
            if isinstance(source, FileSource):
                refusals.gather(files, source, space.bases, f"corpora.{self.name}.sources.{index}")

    def run(self, space: Workspace) -> None:
        folder, identity, e = space.root / self.folder, self.identity(space), space.experiment
        if prepare(folder, identity):
            return
        facts = build(
            folder, self.name, e.corpora[self.name], space.bases, space.tokenizer, e.objective, e.sequence_length
        )  # fmt: skip
        seal(folder, identity, facts)
