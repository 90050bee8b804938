"""Whole runs under the real launcher, each made once for the tests that look at it."""

import shutil

import pytest
from helpers.commands import here, ki_ds, write
from helpers.experiments import written
from helpers.pipelines import GRAPH, MASKED, SELECTIONS, STORED, TEXT, opened


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """(experiment file, work directory) of the tiny experiment, run to its report."""
    folder = tmp_path_factory.mktemp("whole")
    file = written(folder)
    ki_ds("run", file, "--workdir", folder / "work")
    return file, folder / "work"


@pytest.fixture
def work(whole, tmp_path):
    """A copy of that work directory."""
    return shutil.copytree(whole[1], tmp_path / "work")


@pytest.fixture(scope="session")
def selections(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selections")
    (folder / "a.txt").write_text(TEXT)
    file = write(folder / "e.json", SELECTIONS)
    ki_ds("run", file, "--workdir", folder / "work")
    return file, folder / "work"


@pytest.fixture
def stored(selections):
    """The file of an experiment that reads the predictions of another one."""
    file, _ = selections
    return write(file.parent / "stored.json", STORED)


@pytest.fixture(scope="session")
def graph(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    file = write(folder / "graph.json", GRAPH)
    output = ki_ds("run", file, "--workdir", folder / "work")
    return file, folder / "work", output


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    file = write(folder / "masked.json", MASKED)
    ki_ds("run", file, "--workdir", folder / "work")
    return file, folder / "work"


@pytest.fixture
def space(tmp_path):
    """A work directory with a corpus, made without a rank."""
    file = written(tmp_path, entries=200, models={"s": None})
    here("corpus", file, "--workdir", tmp_path / "work")
    return opened(file, tmp_path / "work")
