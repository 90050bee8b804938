"""Shard files: the same bytes for the same input, read back in any order; a full disk leaves no file."""

import errno
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
import zstandard
from helpers.shards import (
    HOW,
    LENGTH,
    block,
    sample,
    write,
)

from ki_ds.errors import UserError
from ki_ds.targets import shard
from ki_ds.targets.codec import Codec
from ki_ds.targets.distortion import Distortion
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.shard import Shard, write_shard


@pytest.mark.parametrize("vocabulary", [300, 100_000])
def test_write_then_read(tmp_path, vocabulary):
    how = Codec(vocabulary, 4, 1 / 16, scalars=("first", "truth", 1.0))
    said = write(tmp_path / "x.kit", 40, 60, how, teacher="base", nested={"a": [1, None]})
    opened = Shard(tmp_path / "x.kit")
    assert opened.header.record == said and opened.codec == how
    assert said["teacher"] == "base" and said["nested"] == {"a": [1, None]}
    every = [sample(number, how=how) for number in range(40, 60)]
    assert (said["start"], said["end"]) == (40, 60)
    assert said["rows"] == sum(len(planes) for planes, _, _ in every)
    assert said["entries"] == sum(int(planes.count_n.sum()) for planes, _, _ in every)
    lost = np.concatenate([lost for _, _, lost in every])
    assert said["distortion"] == pytest.approx({"mean": lost.mean(), "max": lost.max()}) and lost.max() > 0
    for first, count in ((59, 1), (40, 20), (47, 3), (40, 1)):  # any order, more than once
        frames = opened.read(first, count)
        expected = every[first - 40 :][:count]
        assert [f.sample for f in frames] == list(range(first, first + count))
        assert [f.digest for f in frames] == [digest for _, digest, _ in expected]
        assert [f.rows for f in frames] == [len(planes) for planes, _, _ in expected]
        planes = shard.codec.concatenate([planes for planes, _, _ in expected])
        assert how.encode(opened.planes(frames), np.array([len(planes)])) == how.encode(planes, np.array([len(planes)]))


def test_shard_without_samples(tmp_path):
    write(tmp_path / "x.kit", 5, 5)
    opened = Shard(tmp_path / "x.kit")
    assert opened.read(5, 0) == [] and len(opened.planes([])) == 0
    assert opened.header.distortion == Distortion(0, 0)
    with pytest.raises(UserError, match="asked for 5"):
        opened.read(5)


def test_same_input_gives_the_same_bytes(tmp_path):
    """Whatever samples were packed together, in however many threads, and in whatever order the header was made."""
    said = {"sequence_length": LENGTH, "codec": HOW.record, "b": 1, "a": {"y": 2, "x": 1}}
    write_shard(tmp_path / "one", FolderHeader.read(said), 0, [block(range(24))])
    with ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(block, [range(a, a + 2) for a in range(0, 24, 2)]))
    said = {"a": {"x": 1, "y": 2}, "b": 1, "codec": HOW.record, "sequence_length": LENGTH}
    write_shard(tmp_path / "two", FolderHeader.read(said), 0, blocks)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_layout_as_a_stranger_would_parse_it(small):
    """FORMAT.md followed with struct and zstd alone."""
    data = small.read_bytes()
    assert data[:8] == data[-8:] == b"KIT\x93\r\n\x1a\n"
    assert int.from_bytes(data[8:12], "little") == 2
    length = int.from_bytes(data[12:16], "little")
    assert int.from_bytes(data[16:24], "little") == xxhash.xxh3_64_intdigest(data[24 : 24 + length])
    said = json.loads(data[24 : 24 + length])
    assert (said["start"], said["end"], said["rows"], said["note"]) == (10, 13, 5, "ü")
    at, frames = (int.from_bytes(data[-32 + 8 * i : -24 + 8 * i], "little") for i in range(2))
    assert (frames, at + 40 * frames + 32) == (3, len(data))
    assert int.from_bytes(data[-16:-8], "little") == xxhash.xxh3_64_intdigest(data[at:-32])
    offset = 24 + length
    for number, (place, rows) in enumerate(((10, 3), (11, 0), (12, 2))):
        found = struct.unpack_from("<QIIIIQQ", data, at + 40 * number)
        planes, digest, _ = sample(place, rows)
        expected = b"".join(HOW.encode(planes, np.array([rows]))[0])
        assert (found[0], found[2], found[3], found[4]) == (offset, len(expected), rows, 0)
        assert found[5:] == (xxhash.xxh3_64_intdigest(expected), digest)
        assert zstandard.ZstdDecompressor().decompress(data[offset : offset + found[1]]) == expected
        offset += found[1]
    assert offset == at


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_no_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=r"x\.kit: cannot be written: .*Free some space"):
        write(tmp_path / "x.kit", 0, 1)
    assert list(tmp_path.iterdir()) == []


def test_failed_rewrite_keeps_the_old_shard(small, monkeypatch):
    before = small.read_bytes()

    def full(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError):
        write(small, 10, 11)
    assert small.read_bytes() == before
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "absent" / "x.kit", 0, 1)
