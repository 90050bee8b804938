"""A named error for every damage to a shard, before memory is asked for."""

import json
import os
import warnings

import numpy as np
import pytest
from helpers.shards import GOLDEN, HOW, LENGTH, build, contents, refused, said_by, write

from ki_ds.errors import UserError
from ki_ds.targets import shard
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.shard import INDEX, Shard, pack_block, write_shard


def block_types(data):
    """Types of the blocks of a zstd frame of our writer: 0 raw, 1 repeated, 2 compressed."""
    at, found = 5 + {0: 1, 1: 2, 2: 4, 3: 8}[data[4] >> 6], []
    assert data[4] & 0x20  # no window
    while True:
        header = int.from_bytes(data[at : at + 3], "little")
        found.append(header >> 1 & 3)
        at += 3 + (1 if found[-1] == 1 else header >> 3)
        if header & 1:
            assert at == len(data)
            return found


@pytest.fixture(scope="module", params=["golden", "compressed"])
def whole(request, tmp_path_factory):
    """Bytes of a shard of about a kilobyte; of one, some are Huffman codes."""
    if request.param == "golden":
        return GOLDEN
    path = tmp_path_factory.mktemp("whole") / "x.kit"
    write(path, 10, 13, rows=[48, 0, 2])
    opened, data = Shard(path), path.read_bytes()
    at, size = (int(opened.index[0][name]) for name in ("offset", "compressed"))
    assert {0, 2} <= set(block_types(data[at : at + size])) and len(data) < 1500
    return data


def test_flipped_bit_never_gives_other_numbers(whole, tmp_path):
    path = tmp_path / "x.kit"
    path.write_bytes(whole)
    expected, silent = contents(Shard(path)), []
    damaged = bytearray(whole)
    with path.open("r+b", buffering=0) as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        for bit in range(8 * len(whole)):
            place = bit >> 3
            damaged[place] ^= 1 << (bit & 7)
            os.pwrite(file.fileno(), damaged[place : place + 1], place)
            try:
                assert contents(Shard(path)) == expected, (
                    f"bit {bit & 7} of byte {place} changes the numbers in silence"
                )
                silent.append(bit)
            except UserError:
                pass
            damaged[place] = whole[place]
            os.pwrite(file.fileno(), damaged[place : place + 1], place)
        assert contents(Shard(path)) == expected
    assert len(silent) < len(whole) // 20, silent  # a few bits of zstd's own mean nothing


def test_cut_file_is_refused_at_any_length(whole, tmp_path):
    path = tmp_path / "x.kit"
    path.write_bytes(whole)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(UserError) as error:
            contents(Shard(path))
        assert str(error.value).startswith(f"{path}: ")


def test_file_cut_after_it_was_opened(small):
    opened, data = Shard(small), small.read_bytes()
    for length in (0, int(opened.index[0]["offset"]), int(opened.index[2]["offset"]) + 1):
        small.write_bytes(data[:length])
        with pytest.raises(UserError, match="was cut short"):
            opened.read(10, 3)
    small.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        opened.read(10)


def test_bytes_added_or_taken_out_are_refused(small):
    data = small.read_bytes()
    refused(small, data + b"\0")
    refused(small, data + data)
    refused(small, b"\0" + data)
    for place in (9, 30, len(data) // 2, len(data) - 40):
        refused(small, data[:place] + data[place + 1 :])
        refused(small, data[:place] + b"\0" + data[place:])


def test_missing_file_and_folder_in_its_place(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    places = {"absent.kit": "is missing.*ki-ds teach", "": "cannot be read", "file/x.kit": "cannot be read"}
    for name, message in places.items():
        with pytest.raises(UserError, match=message):
            Shard(tmp_path / name)


def test_other_files_are_not_shards(tmp_path):
    assert "magic" in refused(tmp_path / "text", b"not a shard of targets, but some text that is long enough for one")


@pytest.mark.parametrize("version", [0, 1, 3, 2**32 - 1])
def test_unknown_version_is_named(small, version):
    data = bytearray(small.read_bytes())
    data[8:12] = version.to_bytes(4, "little")
    message = refused(small, bytes(data))
    assert f"version {version}, but this version of ki_ds reads 2" in message


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, (1 << 20) + 1, 1 << 20, 1000])
def test_huge_header_length(small, length):
    data = bytearray(small.read_bytes())
    data[12:16] = length.to_bytes(4, "little")
    assert f"header length {length}" in refused(small, bytes(data))


def test_header_longer_than_what_is_read_at_first(tmp_path):
    """Up to a mebibyte is read, and one byte more is refused although the file holds it."""
    for size in (shard.HEAD, shard.TAIL, shard.LARGEST_HEADER):
        said = said_by(0, 0, 0, 0, note="")
        said["note"] = "x" * (size - len(json.dumps(said)))
        (tmp_path / "x.kit").write_bytes(build(said))
        assert Shard(tmp_path / "x.kit").header.record == said
    said["note"] += "x"
    assert f"header length {size + 1}" in refused(tmp_path / "x.kit", build(said))


def test_index_longer_than_what_is_read_at_first(tmp_path):
    count = shard.TAIL // INDEX.itemsize + 100
    packed = pack_block(HOW, HOW.empty(0), np.zeros(count, int), np.arange(count, dtype=np.uint64), np.zeros(0))
    write_shard(tmp_path / "x.kit", FolderHeader(LENGTH, HOW), 0, [packed])
    opened = Shard(tmp_path / "x.kit")
    assert [raw.digest for raw in opened.read(0, count)] == list(range(count))
