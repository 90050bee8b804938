"""Imported targets, and a copy of them to be damaged."""

import shutil

import pytest
from helpers.commands import here, write
from helpers.exchange import EXPERIMENT, SAMPLES, answer, run, save


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """An experiment with its corpus, the questions of its first samples, and a teacher's answers, imported."""
    root = tmp_path_factory.mktemp("tools")
    file = write(root / "tools.json", EXPERIMENT)
    here("corpus", file, "--workdir", root / "work")
    arguments = ("--corpus", "a", "--workdir", root / "work")
    run("ask", file, root / "questions.parquet", *arguments, "--samples", SAMPLES)
    rows = answer(root / "questions.parquet")
    save(rows, root / "answers.parquet")
    said = run("import", file, root / "answers.parquet", root / "big@a", *arguments, "--name", "big")
    assert f"{SAMPLES} samples" in said
    return root, file, rows


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the imported folder, to be damaged."""
    shutil.copytree(world[0] / "big@a", tmp_path / "big@a")
    return tmp_path / "big@a"
