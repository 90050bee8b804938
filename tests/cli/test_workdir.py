"""Where results go when nobody says it."""

import pytest
from helpers.commands import here
from helpers.experiment_file import DESIGN

from ki_ds.cli.options import open_workspace


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An experiment file, in a folder that is not the current one."""
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    (tmp_path / "project").mkdir()
    file = tmp_path / "project" / "e.json"
    file.write_text(DESIGN)
    return file


def test_a_new_work_directory_is_made_in_the_current_folder(elsewhere, tmp_path, capsys):
    assert open_workspace(elsewhere, None, None, None).root == tmp_path / "current" / "work" / "base-to-large"
    assert capsys.readouterr() == ("", "")


def test_one_that_stands_beside_the_file_alone_is_used_and_named(elsewhere, tmp_path, capsys):
    beside = tmp_path / "project" / "work" / "base-to-large"
    beside.mkdir(parents=True)
    assert open_workspace(elsewhere, None, None, None).root == beside
    said = capsys.readouterr()
    assert said.out == "" and f"work directory: {beside}, beside the file; there is none in {tmp_path}" in said.err
    (tmp_path / "current" / "work" / "base-to-large").mkdir(parents=True)
    assert open_workspace(elsewhere, None, None, None).root == tmp_path / "current" / "work" / "base-to-large"


def test_one_that_is_given_is_used(elsewhere, tmp_path):
    (tmp_path / "project" / "work" / "base-to-large").mkdir(parents=True)
    assert open_workspace(elsewhere, None, tmp_path / "given", None).root == tmp_path / "given"


@pytest.mark.parametrize("name", ["a" * 256, "a/" * 2100])
def test_one_that_no_folder_can_be_called_is_refused(elsewhere, name):
    assert "a path has at most 3000 bytes, and 255 between" in here("status", elsewhere, "--workdir", name, code=2)


@pytest.mark.parametrize(
    "setting", ["sequence_length=" + "9" * 400, "engine=" + "a" * 300, "a." * 5000 + "a=1", "seed=1e999", "seed=-1"]
)
def test_hostile_settings_show_no_traceback(elsewhere, setting):
    said = here("plan", elsewhere, "--set", setting, code=2)
    assert said.startswith("error: ") and len(said) < 500
