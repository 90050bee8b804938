"""The manifest vouches for each shard: another one with the same header is found, wherever the folder is opened."""

import json
import shutil

import fsspec
import numpy as np
import pytest
from helpers.folders import FACTS, HEADER, IDENTITY, assert_read, fill, forge, sample, write

from ki_ds import sealed
from ki_ds.errors import UserError
from ki_ds.exchange.verify import verify
from ki_ds.targets.distortion import Distortion
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.manifest import TargetFacts, open_folder, seal_targets
from ki_ds.targets.shard import FrameBlock, Shard, pack_block, write_shard


def another(path):
    """A shard of other predictions about the same input, under the same header; as many bytes where it can be."""
    opened = Shard(path)
    header = opened.header
    numbers = range(header.start, header.end)
    found = [sample(number + 1000, rows=rows) for number, rows in zip(numbers, opened.index["rows"], strict=True)]
    planes = opened.codec.empty(0) if not found else _joined([planes for planes, _ in found])
    block = pack_block(
        opened.codec, planes, np.cumsum(opened.index["rows"]), opened.index["digest"], np.zeros(len(planes))
    )
    write_shard(path, header.folder, header.start, [block])
    assert Shard(path).header.record == header.record


def _joined(parts):
    from ki_ds.targets.codec import concatenate

    return concatenate(parts)


def swapped(path):
    another(path)


def distorted(path):
    """Its frames, and another distortion in the header."""
    opened = Shard(path)
    data = path.read_bytes()
    frames = [data[at : at + size] for at, size in opened.index[["offset", "compressed"]].tolist()]
    lost = np.full(opened.header.rows, 1e-5)
    write_shard(path, opened.header.folder, opened.header.start, [
        FrameBlock(frames, opened.index.copy(), opened.header.entries, lost)])  # fmt: skip
    assert Shard(path).header.distortion == Distortion(1e-5, 1e-5)


@pytest.mark.parametrize("change", [swapped, distorted])
@pytest.mark.parametrize("remote", [False, True])
def test_another_shard_in_its_place_is_found(finished, tmp_path, change, remote):
    path = finished / open_folder(finished).name(1)
    change(path)
    folder = finished
    if remote:
        folder = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(str(finished), folder, recursive=True)
    shards = open_folder(folder)
    with pytest.raises(UserError, match=f"{path.name}: is another shard than the manifest vouches for.*repair"):
        shards.read(np.array([5]))
    assert_read(shards, [0, 9])
    (fault,) = verify(open_folder(folder))
    assert fault.shard == 1 and fault.damaged


def test_folder_that_was_sealed_without_digests_is_read(finished):
    record = json.loads((finished / sealed.MANIFEST).read_text())
    for key in ("digests", "manifest"):
        record.pop(key)
    (finished / sealed.MANIFEST).write_text(json.dumps(record))
    assert_read(open_folder(finished), [*range(10)])
    assert verify(open_folder(finished)) == []


@pytest.mark.parametrize("facts", [{"samples": 8}, {"samples_per_shard": 5}])
def test_manifest_with_other_numbers_is_found(finished, facts):
    path = finished / sealed.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "facts": {**FACTS, **facts}}))
    with pytest.raises(UserError, match="was changed after it was written"):
        open_folder(finished)


def test_damaged_shard_is_not_sealed(tmp_path):
    sealed.prepare(tmp_path / "made", IDENTITY)
    fill(tmp_path / "made")
    path = tmp_path / "made" / ShardFolder(tmp_path, 10, 4).name(1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path.name}: was damaged before the folder was finished. Remove it"):
        seal_targets(tmp_path / "made", IDENTITY, TargetFacts.read(FACTS))
    assert not (tmp_path / "made" / sealed.MANIFEST).exists()


def test_reader_that_was_opened_before_an_extension_reads_after_it(finished):
    """The last, partial shard is computed again as a longer one, but what a student is reading stays where it is."""
    before = open_folder(finished)
    assert_read(before, [0])  # the last shard has not been opened
    for samples in (13, 16):
        sealed.reopen(finished, IDENTITY)
        fill(finished, samples)
        seal_targets(finished, IDENTITY, TargetFacts(samples, 4, HEADER))
        assert_read(before, [9, 8, 0])
        after = open_folder(finished)
        assert_read(after, [*range(samples)])
        assert verify(after) == []
        listed = sealed.read_manifest(finished)["files"]
        assert sorted(listed) == [after.name(number) for number in range(len(after))]
    assert {path.name for path in finished.glob("*.kit")} - {*listed} == {
        before.name(2),
        "targets-000000012-000000013.kit",
    }
    assert sealed.open_sealed(finished).facts["samples"] == 16


def test_copy_made_by_somebody_who_makes_every_digest_right_is_read(finished, tmp_path):
    """Digests are against accidents: this is what they cannot see."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    name = open_folder(copy).name(1)
    another(copy / name)
    record = sealed.read_manifest(copy)
    forge(copy, digests={**record["digests"], name: Shard(copy / name).digest})
    open_folder(copy).read(np.array([5]))


def test_write_is_what_is_sealed(finished):
    """A shard that is written again with the same samples has the same digest."""
    name = open_folder(finished).name(1)
    write(finished / name, 4, 8)
    assert Shard(finished / name).digest == sealed.read_manifest(finished)["digests"][name]
