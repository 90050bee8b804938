"""A changed experiment: refused early, made again where that is wanted; what nothing names is removed."""

import json
import shutil

import pytest
from helpers.commands import here, ki_ds, killed
from helpers.pipelines import opened

from ki_ds.cli import options
from ki_ds.launch.lock import held
from ki_ds.sealed import set_aside
from ki_ds.stages.clean import remove, unnamed
from ki_ds.stages.train import Train

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]


CHANGED = ("--set", "models.t.train.learning_rate=4e-3")


def fingerprints(work):
    return {
        str(path.parent.relative_to(work)): json.loads(path.read_text())["fingerprint"]
        for path in work.glob("*/*/manifest.json")
    }


def test_a_changed_model_is_refused_before_anything_runs(whole, work):
    shutil.rmtree(work / "corpora")  # hours of work, which would come first
    shutil.rmtree(work / "results")
    here("corpus", whole[0], "--workdir", work, "--name", "a")
    shutil.rmtree(work / "targets")
    before = fingerprints(work)
    for command in ("run", "plan"):
        said = here(command, whole[0], "--workdir", work, *CHANGED, code=2)
        assert "models/t: made from another experiment" in said and "learning_rate: found 0.005, expected 0.004" in said
        assert "ki-ds run --redo" in said
    assert fingerprints(work) == before


def test_status_shows_all_that_a_change_touches(whole, work):
    said = here("status", whole[0], "--workdir", work, *CHANGED).splitlines()
    again = [line.split()[-9:] for line in said if "to be made again" in line]
    assert len(again) == 5  # models/t, targets/t@a, models/s, results of both
    assert any("train t (8 of 8 steps; to be made again: made from something else)" in line for line in said)
    assert any("train s (8 of 8 steps; to be made again: reads targets/t@a)" in line for line in said)


def test_redo_asks_first(whole, work, monkeypatch):
    before = fingerprints(work)
    said = here("run", whole[0], "--workdir", work, *CHANGED, "--redo", code=2)
    assert "5 to be made again:" in said and "nothing was done: say --yes" in said
    monkeypatch.setattr(options.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(options.typer, "confirm", lambda _: False)
    here("run", whole[0], "--workdir", work, *CHANGED, "--redo", code=1)
    assert fingerprints(work) == before and not [*work.glob("*/.*.old")]


@pytest.mark.slow
def test_redo_makes_again_what_was_changed_and_what_stands_on_it(whole, work, tmp_path):
    before = fingerprints(work)
    ki_ds("run", whole[0], "--workdir", work, *CHANGED, "--redo", "--yes")
    ki_ds("run", whole[0], "--workdir", tmp_path / "fresh", *CHANGED)
    after = fingerprints(work)
    assert after == fingerprints(tmp_path / "fresh")
    assert {name for name in before if before[name] != after[name]} == {
        "models/t", "targets/t@a", "models/s", "results/t", "results/s"
    }  # fmt: skip
    assert not [*work.glob("*/.*.old")]
    assert "0 of them with faults" in here("verify", work)


def test_the_old_folder_waits_until_the_new_one_is_sealed(whole, work):
    killed("run", whole[0], "--workdir", work, *CHANGED, "--redo", "--yes", when=(work / "models" / ".t.old").exists)
    assert json.loads((work / "models" / ".t.old" / "manifest.json").read_text())["stage"] == "train"
    assert not (work / "models" / "t" / "manifest.json").exists()
    for changed in (CHANGED, ()):
        said = [line for line in here("status", whole[0], "--workdir", work, *changed).splitlines() if "again" in line]
        assert len(said) == 5 and "train t" in said[0] and "reads models/t" in said[1]
        here("run", whole[0], "--workdir", work, *changed, "--redo", code=2)  # still asks
    before = (work / "models" / ".t.old" / "manifest.json").read_bytes()
    here("train", whole[0], "--workdir", work, "--name", "t", code=2)
    space = opened(whole[0], work)
    space.redo = True
    for begun in (True, False):  # killed a moment before
        if not begun:
            set_aside(work / "models" / "t", Train("t").identity(space))
        Train("t").make_way(space)  # as a rank does before it trains
    assert (work / "models" / "t" / "manifest.json").read_bytes() == before
    assert not [*work.glob("*/.*.old")]


def test_clean_leaves_alone_what_waits_for_a_folder_that_is_being_made(whole, work):
    shutil.copytree(work / "models" / "t", work / "models" / ".s.old")
    with held(work, ["models/s"]):
        assert "being made" in here("clean", whole[0], "--workdir", work, "--yes", code=2)
    assert (work / "models" / ".s.old").exists()


def test_what_is_gone_meanwhile_is_cleaned_already(whole, work):
    shutil.copytree(work / "models" / "t", work / "models" / "former")
    space = opened(whole[0], work)
    found = unnamed(space)
    for _ in range(2):
        for one in found:
            remove(space, one)
    assert len(found) == 1 and not unnamed(space)


def test_clean_removes_what_nothing_names(whole, work):
    file, extra = whole[0], work / "models" / "former"
    shutil.copytree(work / "models" / "t", extra)
    shutil.copytree(work / "models" / "t", work / "models" / ".s.old")
    (work / "models" / "notes").mkdir()  # not ki_ds's
    before = fingerprints(work)
    said = here("clean", file, "--workdir", work, code=2)
    assert "2 to be removed:" in said and "models/former" in said and "MB)" in said and extra.exists()
    here("clean", file, "--workdir", work, "--yes")
    del before["models/former"], before["models/.s.old"]
    assert fingerprints(work) == before and (work / "models" / "notes").exists()
    assert "nothing to be removed" in here("clean", file, "--workdir", work)
