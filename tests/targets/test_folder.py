"""Folders of shards: random access without open files, in threads, whatever the order."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.folders import HEADER, assert_read, open_files, write

from ki_ds.errors import UserError
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.shard import Shard, shard_name
from ki_ds.targets.source import Source, join, names, place


@pytest.mark.parametrize("keep", [1, 128])
@pytest.mark.parametrize(
    "samples",
    [[9], [0, 1, 2, 3], [*range(10)], [*range(9, -1, -1)], [9, 0, 3, 4, 8, 7, 0, 9], [5, 5, 5], [3, 4], [8, 9, 0, 1]],
)
def test_samples_in_any_order(folder, samples, keep):
    assert_read(ShardFolder(folder, 10, 4, keep=keep), samples)


def test_every_order_gives_what_was_written(folder):
    shards, rng = ShardFolder(folder, 10, 4, HEADER, keep=2), np.random.default_rng(0)
    for _ in range(50):
        assert_read(shards, rng.integers(0, 10, rng.integers(1, 30)).tolist())


def test_threads_may_share_a_folder(folder):
    """Each evicts the others' shards."""
    shards = ShardFolder(folder, 10, 4, keep=1)
    orders = [np.random.default_rng(seed).permutation(10).tolist() for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda order: assert_read(shards, order), orders))
    assert len(shards.shards) == 1


@pytest.fixture
def reads(monkeypatch):
    """(file name, start, length) of every ranged read."""
    seen, real = [], Source.read

    def counted(self, start, length):
        seen.append((os.path.basename(self.place), start, length))
        return real(self, start, length)

    monkeypatch.setattr(Source, "read", counted)
    return seen


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([0, 1, 2, 3], 1), ([1, 2], 1), ([*range(10)], 3), ([3, 4], 2), ([2, 1], 2), ([1, 1], 2), ([0, 2], 2), ([7], 1)],
)
def test_neighbours_are_read_at_once(folder, reads, samples, expected):
    shards = ShardFolder(folder, 10, 4)
    shards.read(np.arange(10))
    reads.clear()
    shards.read(np.array(samples))
    assert len(reads) == expected
    for name, start, length in reads:  # no byte more than the frames
        index = next(shard.index for shard in shards.shards.values() if shard.place.name == name)
        assert start in index["offset"] and start + length in index["offset"] + index["compressed"]


def test_small_shard_is_opened_by_two_reads(folder, reads):
    ShardFolder(folder, 10, 4).shard(1)
    assert len(reads) == 2


def test_few_indices_are_kept_and_not_read_twice(folder, monkeypatch):
    opened, real = [], Shard.__init__

    def counted(self, path):
        opened.append(path.name)
        real(self, path)

    monkeypatch.setattr(Shard, "__init__", counted)
    shards = ShardFolder(folder, 10, 4, keep=2)
    for number in (0, 1, 4, 0, 5, 8):
        shards.read(np.array([number]))
        assert len(shards.shards) <= 2
    assert opened == [shards.name(0), shards.name(1), shards.name(2)]
    shards.read(np.array([6]))  # used last before 8: still there
    assert len(opened) == 3
    shards.read(np.array([0]))
    assert opened[3:] == [shards.name(0)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are looked up in /proc")
def test_no_file_stays_open(folder):
    with (folder / shard_name(0, 4)).open():
        assert len(open_files(folder)) == 1  # the look-up itself sees open files
    shards = ShardFolder(folder, 10, 4)
    shards.read(np.arange(9, -1, -1))
    shards.missing()
    assert open_files(folder) == []
    (folder / shard_name(4, 8)).write_bytes(b"damaged")
    with pytest.raises(UserError):
        ShardFolder(folder, 10, 4).read(np.array([5]))
    assert open_files(folder) == []


@pytest.mark.parametrize("number", [10, 11, 4000, -1])
def test_sample_beyond_the_folder(folder, number):
    with pytest.raises(UserError, match=rf"holds samples 0 to 10, asked for {number}\. Run `ki-ds teach`"):
        ShardFolder(folder, 10, 4).read(np.array([0, number]))


def test_no_sample_at_all(folder):
    with pytest.raises(ValueError, match="no sample"):
        ShardFolder(folder, 10, 4).read(np.zeros(0, int))


def test_missing_shard_is_named(folder):
    (folder / shard_name(4, 8)).unlink()
    shards = ShardFolder(folder, 10, 4)
    assert_read(shards, [0, 9])
    with pytest.raises(UserError, match=r"targets-000000004-000000008\.kit: is missing\. Run `ki-ds teach`"):
        shards.read(np.array([0, 5, 9]))


def test_damaged_frame_does_not_touch_the_others(folder):
    path = folder / shard_name(4, 8)
    opened, data = Shard(path), bytearray(path.read_bytes())
    data[int(opened.index[1]["offset"]) + 8] ^= 1
    path.write_bytes(data)
    shards = ShardFolder(folder, 10, 4)
    assert_read(shards, [4, 6, 7])
    with pytest.raises(UserError, match=r"targets-000000004-000000008\.kit: sample 5: "):
        shards.read(np.array([4, 5, 6]))


def test_shard_renamed_to_another_range_is_refused(folder):
    (folder / shard_name(0, 4)).replace(folder / shard_name(4, 8))
    with pytest.raises(UserError, match="its header gives start = 0, expected 4"):
        ShardFolder(folder, 10, 4).read(np.array([5]))


def test_shard_of_a_shorter_folder_is_refused(folder):
    (folder / shard_name(8, 10)).replace(folder / shard_name(8, 11))
    with pytest.raises(UserError, match="its header gives end = 10, expected 11"):
        ShardFolder(folder, 11, 4).read(np.array([8]))


def test_shard_packed_in_another_way_is_refused(folder):
    write(folder / shard_name(4, 8), 4, 8, Codec(300, 4, 1 / 8))
    shards = ShardFolder(folder, 10, 4, HEADER)
    assert_read(shards, [0])
    with pytest.raises(UserError, match=r"targets-000000004-.* its header gives codec = .*0\.125.*expected .*0\.0625"):
        shards.read(np.array([5]))


def test_names_sort_by_sample_and_the_last_shard_ends_early(folder):
    shards = ShardFolder(folder, 10, 4)
    assert len(shards) == 3
    expected = [shards.name(number) for number in range(3)]
    assert expected == [
        "targets-000000000-000000004.kit",
        "targets-000000004-000000008.kit",
        "targets-000000008-000000010.kit",
    ]
    assert expected == sorted(path.name for path in folder.iterdir())


def test_missing_names_what_a_longer_run_lacks(folder):
    assert ShardFolder(folder, 10, 4).missing() == []
    assert ShardFolder(folder, 16, 4).missing() == [2, 3]  # the partial shard is made again, whole
    assert ShardFolder(folder, 8, 4).missing() == []
    (folder / shard_name(4, 8)).unlink()
    assert ShardFolder(folder, 10, 4).missing() == [1]
    assert ShardFolder(folder / "absent", 10, 4).missing() == [0, 1, 2]
    assert ShardFolder(folder, 0, 4).missing() == []


def test_file_under_construction_is_missing(folder):
    (folder / shard_name(4, 8)).rename(folder / (shard_name(4, 8) + ".123.tmp"))
    assert ShardFolder(folder, 10, 4).missing() == [1]


def test_ranges_of_a_local_file(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    source = Source(tmp_path / "file")
    assert source.size() == 100
    for start, length in ((0, 100), (0, 0), (99, 1), (90, 50), (100, 5), (1000, 5), (7, 20)):
        assert source.read(start, length) == bytes(range(100))[start : start + length]


def test_reads_that_the_system_cuts_are_continued(tmp_path, monkeypatch):
    """A read of more than 2 GiB, or one that a signal interrupts, returns less than was asked for."""
    (tmp_path / "file").write_bytes(bytes(range(100)))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, length, start: real(handle, min(length, 7), start))
    assert Source(tmp_path / "file").read(3, 500) == bytes(range(3, 100))


def test_places_are_paths_or_urls(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert place(str(tmp_path)) == tmp_path
    assert join(tmp_path, "a") == tmp_path / "a"
    assert join(place("s3://bucket/folder/"), "a") == "s3://bucket/folder/a"
    assert names(tmp_path) == {"a"} and names(tmp_path / "absent") == set() and names(tmp_path / "a") == set()
