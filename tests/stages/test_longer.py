"""A model is trained longer in its folder: as if it had been given all steps from the start, or refused with a word."""

import shutil

import pytest
from helpers.commands import here, ki_ds, killed
from helpers.engines import world  # noqa: F401
from helpers.experiments import written
from helpers.folders import FACTS
from helpers.outcomes import perplexity, trained
from helpers.pipelines import opened

from ki_ds.engine.checkpoints import RECORD
from ki_ds.errors import UserError
from ki_ds.experiment.graph import trained_model
from ki_ds.sealed import UNSEALED, begun, seal
from ki_ds.stages import Evaluate, Teach, Train
from ki_ds.training import loop

CONSTANT = {"schedule": "constant", "warmup_steps": 2}
SCHEDULES = {"linear": {}, "constant": CONSTANT, "wsd": {**CONSTANT, "schedule": "wsd", "decay_steps": 4}}
STUDENT = {"train": {**CONSTANT, "evaluate_every": 8}, "inherit": {"alpha_T": None, "schedule": "constant"}}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Of an experiment whose model `t` is trained for 8 steps; its corpus is made."""
    folder = tmp_path_factory.mktemp("longer")
    more = {"dropout": 0.1, "checkpoint_every": 3, "evaluate_every": 4}
    file = written(folder, entries=200, models={"t": {"train": more}, "s": STUDENT})
    here("corpus", file, "--workdir", folder / "work")
    return file


class Workdirs:
    """Work directories of that experiment."""

    def __init__(self, file, root):
        self.file, self.root = file, root

    def __call__(self, name, steps, schedule, **keys):
        work = self.root / name
        if not work.exists():
            shutil.copytree(self.file.parent / "work", work)
        keys |= SCHEDULES[schedule] | {"steps": steps}
        return opened(self.file, work, *(f"models.t.train.{key}={value}" for key, value in keys.items()))


@pytest.fixture
def workdir(file, tmp_path):
    return Workdirs(file, tmp_path)


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_it_is_the_run_that_was_given_all_steps_from_the_start(workdir, schedule, capsys):
    stage = Train("t")
    stage.run(workdir("whole", 12, schedule))
    stage.run(workdir("short", 8, schedule, keep_checkpoints=1))
    longer, folder = workdir("short", 12, schedule), workdir.root / "short" / "models" / "t"
    before, facts = trained(folder.parents[1], "t"), begun(folder)
    assert stage.state(longer) == "unsealed"
    capsys.readouterr()
    stage.run(longer)
    assert f"is trained longer, from a checkpoint of at most {8 if schedule == 'constant' else 4} steps" in (
        capsys.readouterr().out
    )
    lines, weights = trained(workdir.root / "short", "t")
    assert (lines, weights) == trained(workdir.root / "whole", "t")
    shared = 8 if schedule == "constant" else 4
    assert before[0][:shared] == lines[:shared] and before[1] != weights
    assert stage.state(longer) == "sealed" and begun(folder)["steps"] == 12 == facts["steps"] + 4
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "manifest.json", "metrics.jsonl", "model", "tensorboard"
    }  # fmt: skip


def test_interrupted_while_it_is_trained_longer(workdir, monkeypatch):
    stage, update = Train("t"), loop.update
    stage.run(workdir("whole", 12, "wsd"))
    stage.run(workdir("short", 8, "wsd"))
    longer, folder = workdir("short", 12, "wsd"), workdir.root / "short" / "models" / "t"

    def broken(engine, batch, run):
        if batch.step == 7:
            raise InterruptedError
        return update(engine, batch, run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", broken)
        with pytest.raises(InterruptedError):
            stage.run(longer)
    assert stage.state(longer) == "unsealed" and stage.progress(longer) == "7 of 12 steps"
    assert (folder / UNSEALED).exists() and not (folder / "model").exists()
    assert stage.state(workdir("short", 8, "wsd")) == "other"  # it is a run of 12 steps now
    stage.run(workdir("short", 12, "wsd"))
    assert trained(workdir.root / "short", "t") == trained(workdir.root / "whole", "t")


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_killed_while_they_train_a_student_longer(file, tmp_path):
    """Through the command line: targets are added to, the student goes on, its results are made again."""
    common = ("--set", "models.t.train.steps=4", "--set", "models.s.train.checkpoint_every=1", "--processes", 2)
    more, folder = ("--set", "models.s.train.steps=24", *common), tmp_path / "short" / "models" / "s"
    for name, given in (("whole", more), ("short", common)):
        shutil.copytree(file.parent / "work", tmp_path / name)
        ki_ds("run", file, "--workdir", tmp_path / name, *given)
    first = trained(tmp_path / "short", "s")
    assert "begun                          train s (8 of 24 steps)" in here(
        "status", file, "--workdir", tmp_path / "short", *more[:-2]
    )
    latest = folder / "checkpoints" / "latest"
    killed("run", file, "--workdir", tmp_path / "short", *more, when=lambda: latest.read_text() >= "step-00000012")
    assert not (folder / "manifest.json").exists() and not (folder / "model").exists()
    assert "is not finished" in here("evaluate", file, "--workdir", tmp_path / "short", "--name", "s", *more, code=2)
    ki_ds("run", file, "--workdir", tmp_path / "short", *more)
    whole = trained(tmp_path / "whole", "s")
    assert trained(tmp_path / "short", "s") == whole and whole[0][:7] == first[0][:7] and whole[1] != first[1]
    assert perplexity(tmp_path / "short", "s") == perplexity(tmp_path / "whole", "s")


# ------------------------------------------------------------------------------------------------------------ refusals


def sealed(space, stage, *saved):
    """A stage that counts as done, with checkpoints of these steps."""
    folder, steps = space.root / stage.folder, stage.kind == "train" and trained_model(space.experiment, stage.name)
    folder.mkdir(parents=True)
    for step in saved:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:08d}" / RECORD).write_text('{"files": {}}')
    facts = {"content": "w", "steps": steps.train.steps} if steps else FACTS | {"samples": 0}
    seal(folder, stage.identity(space), facts, leave_out=("checkpoints",))
    return stage


LEFT = "A model is trained longer where nothing but more steps is asked for and a checkpoint"


@pytest.mark.parametrize(
    ("schedule", "saved", "steps", "keys", "words"),
    [
        ("linear", [4, 8], 12, {}, "The learning rate falls to the last of the steps, so what was trained is no begin"),
        ("constant", [4, 8], 6, {}, LEFT),
        ("constant", [4, 8], 12, {"learning_rate": 1e-4}, LEFT),
        ("constant", [], 12, {}, f"{LEFT} is left"),
        ("wsd", [5, 8], 12, {}, f"{LEFT} of before its decay is left"),
        ("wsd", [4, 8], 12, {"decay_steps": 5}, LEFT),
    ],
)
def test_what_is_no_beginning_is_refused_with_words(workdir, schedule, saved, steps, keys, words):
    stage = sealed(workdir("work", 8, schedule), Train("t"), *saved)
    other = opened(workdir.file, workdir.root / "work", *(
        f"models.t.train.{key}={value}" for key, value in (SCHEDULES[schedule] | keys | {"steps": steps}).items()
    ))  # fmt: skip
    assert stage.state(other) == "other"
    with pytest.raises(UserError, match=rf"steps: found 8, expected {steps}.*{words}.*\"start_from\": \"t\"\.$"):
        stage.run(other)
    assert sorted(int(path.name[5:]) for path in (other.root / stage.folder).glob("checkpoints/step-*")) == saved
    assert stage.state(workdir("work", 8, schedule)) == "sealed"


def test_alpha_that_goes_by_the_number_of_steps_is_refused(workdir):
    falling = ("models.s.inherit.schedule=linear", "models.s.inherit.alpha_T=2.0")

    def space(steps, *settings):
        return opened(workdir.file, workdir("work", 8, "linear").root, f"models.s.train.steps={steps}", *settings)

    sealed(space(8), Train("t"), 8)
    sealed(space(8), Teach("t@a"))
    stage = sealed(space(8, *falling), Train("s"), 8)
    with pytest.raises(UserError, match=r'steps: found 8, expected 12.* With "alpha_T" alpha goes by the number of st'):
        stage.run(space(12, *falling))
    shutil.rmtree(space(8).root / stage.folder)
    sealed(space(8), stage, 8)
    assert stage.state(space(12)) == "unsealed"


def test_what_was_made_from_the_shorter_one_is_seen_to_be_of_something_else(workdir):
    space, longer = workdir("work", 8, "constant"), workdir("work", 12, "constant")
    sealed(space, Train("t"), 8)
    for stage in (Evaluate("t"), Teach("t@a")):
        sealed(space, stage)
        assert stage.state(space) != "other" == stage.state(longer)
    with pytest.raises(UserError, match=r"inputs.model: found \"w\", expected \"t of 12 steps, trained to 8\""):
        Teach("t@a").check_identity(longer)
    with pytest.raises(UserError, match=r"models/t: is to be trained longer\. Run `ki-ds train`"):
        Train("t").check_identity(longer)  # as the report does
