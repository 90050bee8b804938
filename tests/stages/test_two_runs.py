"""Two runs of one work directory: each folder has one maker at a time, and ends whole."""

import subprocess

import pytest
from helpers.commands import command, environment, folder_digest, here
from helpers.experiments import written

from ki_ds.launch.lock import held


@pytest.fixture
def file(tmp_path):
    return written(tmp_path, corpora={"b": {"sources": [{"text": "a.txt"}], "validation": 0.2}})


def test_a_folder_that_another_run_makes_is_refused_before_it_is_touched(file, tmp_path):
    work = tmp_path / "work"
    here("corpus", file, "--workdir", work, "--name", "tokenizer")
    with held(work, ["corpora/a"]):
        said = here("corpus", file, "--workdir", work, code=2)
        assert f"{work}/corpora/a: is being made by another run: host" in said
        assert not (work / "corpora" / "a").exists()
        assert "corpus a (being made by host" in here("status", file, "--workdir", work)
        here("corpus", file, "--workdir", work, "--name", "b")  # another folder
    here("corpus", file, "--workdir", work)
    assert "being made" not in here("status", file, "--workdir", work)


@pytest.mark.launch
def test_two_at_once_leave_what_one_alone_leaves(file, tmp_path):
    here("corpus", file, "--workdir", tmp_path / "alone")
    work = tmp_path / "work"
    pipes = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    runs = [subprocess.Popen(command("corpus", file, "--workdir", work), **pipes) for _ in range(2)]
    for process in runs:
        said, _ = process.communicate(timeout=120)
        assert process.returncode in (0, 2), said
        assert process.returncode == 0 or "is being made by another run" in said
    here("corpus", file, "--workdir", work)  # what a refusal left undone
    assert folder_digest(work / "corpora") == folder_digest(tmp_path / "alone" / "corpora")
