"""A targets folder that a longer run extends: what is vouched for anew is what was there, and readers read on."""

import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.folders import forge
from helpers.shards import HOW, block
from helpers.teaching import made, opened

from ki_ds import sealed
from ki_ds.errors import UserError
from ki_ds.stages.teach import Teach
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.manifest import open_folder
from ki_ds.targets.shard import Shard
from ki_ds.teaching import job as module
from ki_ds.teaching.job import complete, store, teach


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made(tmp_path_factory.mktemp("extension"), samples=16, inference={"micro_batch_size": 8})


def taught(file, work, steps, *settings):
    """The targets of a student that is taught for so many steps of 8 samples."""
    settings = ("models.s.train.batch_size=8", f"models.s.inherit.teacher_steps={steps}", *settings)
    space, stage = opened(file, work, *settings), Teach("t@a")
    identity = stage.identity(space)
    teach(work / "targets" / "t@a", identity, stage.job(space, identity), torch.device("cpu"))
    return work / "targets" / "t@a"


@pytest.fixture
def folder(file, tmp_path):
    """Of 24 samples in a shard of 16 and one of 8."""
    work = tmp_path / "work"
    work.mkdir()
    for name in ("corpora", "tokenizer"):
        (work / name).symlink_to(file.parent / "work" / name)
    return taught(file, work, 3)


def test_student_reads_on_while_its_targets_are_extended(file, folder):
    student = open_folder(folder)
    expected = open_folder(folder).read(np.arange(24))
    student.read(np.arange(4))
    taught(file, folder.parents[1], 5)
    assert open_folder(folder).samples == 40
    found = student.read(np.arange(24))
    assert found.digests == expected.digests
    np.testing.assert_array_equal(found.planes.ids_nK, expected.planes.ids_nK)
    longer = open_folder(folder).read(np.arange(24))
    np.testing.assert_array_equal(longer.planes.ids_nK, expected.planes.ids_nK)
    assert complete(folder, 40) and not complete(folder, 41)


def test_shard_that_was_changed_is_not_vouched_for_anew(file, folder):
    shards = open_folder(folder)
    path, manifest = folder / shards.name(0), (folder / sealed.MANIFEST).read_bytes()
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # of the index
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=f"{path.name}: the index's checksum"):
        taught(file, folder.parents[1], 5)
    assert (folder / sealed.MANIFEST).read_bytes() == manifest  # still sealed, so that `repair` can set it aside


@pytest.mark.parametrize("wrong", [{"samples": "24"}, {"samples": None}, {"samples_per_shard": 0}, {"header": 7}])
@pytest.mark.parametrize("state", ["sealed", "unsealed"])
def test_facts_of_the_wrong_kind_are_refused(file, folder, wrong, state):
    facts = {**sealed.read_manifest(folder)["facts"], **wrong}
    if state == "sealed":
        forge(folder, facts=facts)
    elif "header" in wrong:
        pytest.skip("a folder that is being filled has none")
    else:
        record = json.loads((folder / sealed.MANIFEST).read_text())
        (folder / sealed.UNSEALED).write_text(json.dumps({**record, "facts": facts}))
        (folder / sealed.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"not (one|the manifest) of"):
        taught(file, folder.parents[1], 5)


def test_more_shards_than_a_manifest_can_list_are_refused_before_anything_runs(file, folder, monkeypatch):
    monkeypatch.setattr(module, "MOST_SHARDS", 2)
    with pytest.raises(UserError, match="40 samples in shards of 16 are more than 2 files; expected a larger"):
        taught(file, folder.parents[1], 5)


def test_shard_of_the_rank_that_was_first_stays(tmp_path):
    """The slower one's may differ by rounding, and the folder may be sealed meanwhile."""
    header = FolderHeader(64, HOW)
    job = SimpleNamespace(header=header)
    store(tmp_path / "x.kit", job, 0, [block(range(4))])
    first = (tmp_path / "x.kit").read_bytes()
    store(tmp_path / "x.kit", job, 0, [block(range(10, 14))])
    assert (tmp_path / "x.kit").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["x.kit"]


def test_shard_is_written_where_the_file_system_knows_no_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store(tmp_path / "x.kit", SimpleNamespace(header=FolderHeader(64, HOW)), 0, [block(range(4))])
    assert Shard(tmp_path / "x.kit").header.end == 4 and [path.name for path in tmp_path.iterdir()] == ["x.kit"]
