"""Whole runs that the tests of this folder share: made once, copied, disturbed, compared with."""

import shutil

import pytest
from helpers.commands import ki_ds
from helpers.experiments import written
from helpers.outcomes import STEPS

from ki_ds.launch import signals


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(experiment file, work directory) of a tiny experiment as two ranks under the deepspeed launcher made it."""
    return made(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """(experiment file, work directory) of a run long enough to be disturbed, which was not."""
    models = {
        "t": {"train": {"steps": 5}},
        "s": {
            "train": {"steps": STEPS, "learning_rate": 1e-3, "checkpoint_every": 25, "evaluate_every": 100},
            "inherit": {"alpha_T": None, "teacher_steps": 60},
        },
    }
    return made(tmp_path_factory.mktemp("undisturbed"), name="faults", models=models, samples_per_shard=8)


@pytest.fixture
def work(undisturbed, tmp_path):
    """A copy of its work directory, as it is before the student is trained."""
    _, done = undisturbed
    for name in ("tokenizer", "corpora", "targets", "models"):
        shutil.copytree(done / name, tmp_path / "work" / name)
    shutil.rmtree(tmp_path / "work" / "models" / "s")
    return tmp_path / "work"


def made(folder, **changes):
    file = written(folder, **changes)
    ki_ds("run", file, "--workdir", folder / "work", "--processes", 2)
    return file, folder / "work"


@pytest.fixture(autouse=True)
def nothing_asked():
    """What this process has heard is no request to the tests that come after."""
    yield
    signals.asked.clear()
