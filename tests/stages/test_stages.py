"""The list of stages: a stage that is defined here and added to it is planned, shown, run, sealed and skipped."""

import json

import pytest
from helpers.commands import here
from helpers.experiments import written

from ki_ds.experiment.graph import load_experiment
from ki_ds.planning.costs import Cost
from ki_ds.sealed import Identity, prepare, read_manifest, seal
from ki_ds.stages import STAGES
from ki_ds.stages.pipeline import stages
from ki_ds.stages.stage import Stage
from ki_ds.workspace import Workspace


class Count(Stage):
    """How often each token stands in a corpus."""

    kind, parent, command = "count", "counts", "corpus"
    runs = 0

    @classmethod
    def of(cls, experiment):
        return [cls(name) for name in experiment.corpora]

    def inputs(self, experiment):
        return [f"corpora/{self.name}"]

    def identity(self, space):
        return Identity(self.kind, {}, {f"corpora/{self.name}": space.tokens(self.name).digest})

    def refuse(self, space, ranks, here, refusals):
        if ranks > 7:
            refusals.lines.append(f"count {self.name}: {ranks} ranks are too many to count")

    def cost(self, space, ranks, room):
        return Cost(tokens=4321, note="counting is cheap")

    def progress(self, space):
        return "half of it"

    def run(self, space):
        Count.runs += 1
        folder, identity = space.root / self.folder, self.identity(space)
        if prepare(folder, identity):
            return
        (folder / "counts.json").write_text(json.dumps({"tokens": space.tokens(self.name).train.size}))
        seal(folder, identity, {})

    def conclusion(self, space):
        return [f"{self.name} is counted"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A tiny experiment, while there are seven stages."""
    monkeypatch.setattr(Count, "runs", 0)
    STAGES.append(Count)
    yield written(tmp_path)
    STAGES.remove(Count)


def test_seventh_stage_is_planned_shown_run_sealed_and_skipped(file, tmp_path):
    work = tmp_path / "work"
    plan = here("plan", file, "--workdir", work)
    assert "count a" in plan and "4.32k" in plan and "counting is cheap" in plan
    assert "to do                          count a (half of it)" in here("status", file, "--workdir", work)
    assert "too many to count" in here("corpus", file, "--workdir", work, "--processes", 8, code=2)
    first = here("corpus", file, "--workdir", work)
    assert "count a: done in" in first and first.rstrip().endswith("a is counted") and Count.runs == 1
    assert read_manifest(work / "counts" / "a")["files"] == {
        "counts.json": (work / "counts/a/counts.json").stat().st_size
    }
    assert "sealed                         count a" in here("status", file, "--workdir", work)
    assert "count a: done before" in here("corpus", file, "--workdir", work) and Count.runs == 1
    longer = here("status", file, "--workdir", work, "--set", "sequence_length=16")
    assert "made from another experiment   corpus a" in longer


def test_seventh_stage_stands_behind_what_it_reads(file):
    found = [str(stage) for stage in stages(load_experiment(file))]
    assert found.index("corpus a") < found.index("count a") and found[-1] == "count a"


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_makes_a_folder_that_is_told_by_its_label(kind, tmp_path):
    file = written(tmp_path)
    space = Workspace(load_experiment(file), file, tmp_path / "work")
    made = kind.of(space.experiment)
    assert made and len({stage.folder for stage in made}) == len({stage.label for stage in made}) == len(made)
    assert all(stage.kind == kind.kind and stage.state(space) == "absent" for stage in made)
