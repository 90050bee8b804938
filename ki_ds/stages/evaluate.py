"""Stage: finished model + tokens → perplexity on the validation part of every corpus, under fixed masks."""

from __future__ import annotations

import json

from ki_ds.experiment.graph import order
from ki_ds.experiment.schema import Experiment
from ki_ds.files import write_atomically
from ki_ds.launch import distributed, heartbeat
from ki_ds.metrics import finite
from ki_ds.models.language_model import LanguageModel
from ki_ds.progress import Progress
from ki_ds.sealed import Identity, seal
from ki_ds.stages import models
from ki_ds.stages.ranks import join, prepared
from ki_ds.stages.stage import Refusals, Stage, viewing
from ki_ds.stages.tokenizer import expected
from ki_ds.training.validation import validate
from ki_ds.workspace import Workspace

MICRO_BATCH = 16  # sequences


class Evaluate(Stage):
    """Perplexity of a finished model."""

    kind, parent, command, launched, remade = "evaluate", "results", "evaluate", True, True
    help = "Measure perplexities."

    @classmethod
    def of(cls, experiment: Experiment) -> list[Evaluate]:
        return [cls(name) for name in order(experiment) if experiment.models[name].targets is None]

    def inputs(self, experiment: Experiment) -> list[str]:
        return [
            "tokenizer",
            *(f"corpora/{name}" for name in experiment.corpora),
            *models.folders(experiment, self.name),
        ]

    def identity(self, space: Workspace) -> Identity:
        e = space.experiment
        inputs = {f"corpora/{name}": space.tokens(name).digest for name in e.corpora}
        return Identity(self.kind, viewing(e), {"model": models.content(space, self.name), **inputs})

    def refuse(self, space: Workspace, ranks: int, here: bool, refusals: Refusals) -> None:
        tokenizer = refusals.gather(expected, space)
        if tokenizer is not None:
            refusals.gather(models.checked_configuration, space, self.name, tokenizer)

    def run(self, space: Workspace) -> None:
        identity, device = join(self, space)
        if prepared(self, space, identity):
            return
        e = space.experiment
        with heartbeat.lengthy(f"{self}: loading"):
            loaded = models.finished(space, self.name).eval()
            model = LanguageModel(loaded, space.tokenizer.size, f"models.{self.name}").to(device)
        found, validated = {}, {}
        total, first = sum(len(space.tokens(name).validation) for name in e.corpora), distributed.rank() == 0
        with Progress(f"evaluate {self.name}", total, "sequences", 0, first) as progress:
            for name in e.corpora:
                heartbeat.stop_if_asked()
                part, viewer = space.tokens(name).validation, space.viewer(name)
                one = validated[name] = validate(model, part, viewer, MICRO_BATCH, device, progress)
                found[name] = {
                    "perplexity": finite(one.perplexity), "nats": finite(one.nats), "rows": one.rows,
                    "sequences": len(part),
                }  # fmt: skip
        if first:
            folder = space.root / self.folder
            for name, one in validated.items():  # of each sequence, so that models can be compared pair by pair
                write_atomically(folder / f"nats-{name}.bin", one.nats_T.astype("<f4").tobytes())
            text = json.dumps({"model": self.name, "corpora": found}, indent=1, allow_nan=False)
            write_atomically(folder / "perplexity.json", text.encode())
            seal(folder, identity, {})
        distributed.barrier()
