"""Names and numbers that `ki-ds targets` is given: refused in words, and nothing is overwritten or mixed."""

import os

import pytest
from helpers.commands import folder_digest, here
from helpers.exchange import run, save

from ki_ds.exchange import export as tables


def test_arrays_are_not_written_among_others(world, tmp_path):
    """Of a longer export some would stay, and look like part of this one."""
    folder = world[0] / "big@a"
    run("export", folder, tmp_path / "arrays", "--workdir", world[0] / "work")
    before = folder_digest(tmp_path / "arrays")
    assert "arrays: is not empty" in here("targets", "export", folder, tmp_path / "arrays", code=2)
    assert folder_digest(tmp_path / "arrays") == before


def test_arrays_are_whole_or_absent(world, tmp_path, monkeypatch):

    def full(parts, folder, save=tables._save):
        save(parts, folder)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tables, "_save", full)
    said = here("targets", "export", world[0] / "big@a", tmp_path / "arrays", code=2)
    assert "arrays: cannot be written: No space left" in said and not any(tmp_path.iterdir())


def test_an_output_that_is_no_folder(world):
    assert "/dev/null: is a file; name a folder" in here("targets", "export", world[0] / "big@a", "/dev/null", code=2)


def test_import_into_a_folder_of_something_else_names_no_other_command(world, tmp_path):
    """`ki-ds run --redo` would not make it again, and removing a stage's folder is no good advice either."""
    root, file, rows = world
    save(rows[:-1], tmp_path / "other.parquet")
    for folder in (root / "work" / "corpora" / "a", root / "big@a"):
        before = folder_digest(folder)
        said = here("targets", "import", file, tmp_path / "other.parquet", folder, "--corpus", "a", "--workdir",
                    root / "work", code=2)  # fmt: skip
        assert "holds something else" in said and "name another folder" in said and "--redo" not in said
        assert folder_digest(folder) == before


def test_import_under_a_name_that_no_model_can_have(world, tmp_path):
    root, file, _ = world
    said = here("targets", "import", file, root / "answers.parquet", tmp_path / "made", "--corpus", "a", "--workdir",
                root / "work", "--name", "../x y", code=2)  # fmt: skip
    assert "--name ../x y: expected the name of a model" in said and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "given",
    [("bench", "--seconds", "inf"), ("bench", "--seconds", "-1"), ("bench", "--seconds", "nan"),
     ("inspect", "--rows", "-3"), ("inspect", "--sample", "-1")],
)  # fmt: skip
def test_numbers_without_sense(world, given):
    command, *options = given
    assert options[0] in here("targets", command, world[0] / "big@a", *options, code=2)
