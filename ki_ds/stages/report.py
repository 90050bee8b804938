"""Stage: everything that was measured → report.html, figures and summary.json."""

from __future__ import annotations

import json

from ki_ds.experiment.schema import Experiment
from ki_ds.sealed import MANIFEST, Identity, State, check_contents
from ki_ds.stages.evaluate import Evaluate
from ki_ds.stages.stage import Stage
from ki_ds.stages.train import Train
from ki_ds.workspace import Workspace


class Report(Stage):
    """Curves, tables and savings; made anew by every run, from whatever is there."""

    kind, parent, command, lasting = "report", "", "report", False
    help = "Write the report."

    @classmethod
    def of(cls, experiment: Experiment) -> list[Report]:
        return [cls("report")]

    def inputs(self, experiment: Experiment) -> list[str]:
        return ["tokenizer", *(f"corpora/{name}" for name in experiment.corpora)]

    def identity(self, space: Workspace) -> Identity:
        return Identity(self.kind, {}, {})

    def state(self, space: Workspace) -> State:
        return "sealed" if (space.root / self.folder / "report.html").exists() else "absent"

    def run(self, space: Workspace) -> None:
        from ki_ds.report.page import report  # matplotlib, which nothing else waits for

        for one in (*Train.of(space.experiment), *Evaluate.of(space.experiment)):
            one.check_identity(space)  # show nothing that was made from something else, or changed
            if (space.root / one.folder / MANIFEST).exists():
                check_contents(space.root / one.folder, space.digests.of)
        report(space.experiment, space.root)

    def conclusion(self, space: Workspace) -> list[str]:
        from ki_ds.report.words import words

        folder = space.root / self.folder
        summary = json.loads((folder / "summary.json").read_text())
        return ["", *words(summary), "", f"report: {folder / 'report.html'}"]
