"""A student of imported predictions; a taught folder, damaged and repaired."""

import json
import shutil

import pytest
from helpers.commands import folder_digest, ki_ds, write
from helpers.exchange import EXPERIMENT, TRAIN, damage, run

from ki_ds.targets.manifest import open_folder


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(600)
def test_student_of_imported_predictions_trains_and_repair_leads_to_the_same_bytes(world, tmp_path):
    """A student of the imported folder; and a taught folder, damaged and repaired, of which one shard is computed."""
    root, _, _ = world
    experiment = json.loads(json.dumps(EXPERIMENT))
    student = experiment["models"]["student"]
    experiment["models"]["teacher"] = {"architecture": student["architecture"], "train": TRAIN}
    experiment["models"]["pupil"] = {**student, "inherit": {**student["inherit"], "from": {"a": "teacher"}}}
    experiment["models"]["big"]["targets"]["a"] = str(root / "big@a")
    file, work = write(tmp_path / "tools.json", experiment), tmp_path / "work"
    shutil.copytree(root / "work", work)
    names = ("--name", "train:student", "--name", "train:teacher", "--name", "teach:teacher@a")
    ki_ds("worker", "train,teach", file, "--workdir", work, *names)
    taught = work / "targets" / "teacher@a"
    before = folder_digest(taught)
    times = {path.name: path.stat().st_mtime_ns for path in taught.glob("*.kit")}
    path = damage(taught, 1)
    run("verify", taught, code=1)
    run("repair", taught)
    ki_ds("worker", "teach", file, "--workdir", work, "--name", "teach:teacher@a")
    shutil.rmtree(taught / "aside")
    assert folder_digest(taught) == before
    assert {p.name for p in taught.glob("*.kit") if p.stat().st_mtime_ns != times[p.name]} == {path.name}
    assert "no fault" in run("verify", taught, "--deep", "--against-corpus")
    # a shorter run with other shards, just when one is missing, takes nothing away and keeps to the shards there are
    damage(taught, 1)
    run("repair", taught)
    shutil.rmtree(taught / "aside")
    shorter = ("--set", "models.pupil.train.steps=1", "--set", "samples_per_shard=8")
    ki_ds("worker", "teach", file, "--workdir", work, "--name", "teach:teacher@a", *shorter)
    assert folder_digest(taught) == before
    # a longer run appends whole shards of the same length, and touches none that is there
    names = [path.name for path in sorted(taught.glob("*.kit"))]
    times = {name: (taught / name).stat().st_mtime_ns for name in names}
    longer = ("--set", "models.pupil.train.steps=7", "--set", "samples_per_shard=8")
    ki_ds("worker", "teach", file, "--workdir", work, "--name", "teach:teacher@a", *longer)
    assert [path.name for path in sorted(taught.glob("*.kit"))] == [
        *names,
        "targets-000000032-000000048.kit",
        "targets-000000048-000000056.kit",
    ]
    assert {name: (taught / name).stat().st_mtime_ns for name in names} == times
    assert open_folder(taught).samples == 56
