"""Indices and frames that no writer gives are refused by name, before memory is asked for."""

import json

import numpy as np
import pytest
import xxhash
import zstandard
from helpers.shards import HOW, LENGTH, build, frame, one_frame, refused, said_by

from ki_ds.errors import UserError
from ki_ds.targets import shard
from ki_ds.targets.codec import Codec
from ki_ds.targets.shard import FOOTER, INDEX, MAGIC, PREFIX, Shard


@pytest.mark.parametrize(
    "footer",
    [
        {"at": 2**64 - 1},
        {"at": 2**64 - 32, "frames": 0},
        {"at": 0, "frames": 2**64 - 1},
        {"frames": 2**60},
        {"frames": 2**63},
        {"at": 0},
        {"at": 1 << 40},
    ],
)
def test_index_place_that_overflows(tmp_path, footer):
    data = one_frame(frame())
    at, frames, checksum, magic = FOOTER.unpack(data[-FOOTER.size :])
    end = FOOTER.pack(footer.get("at", at), footer.get("frames", frames), checksum, magic)
    assert "footer" in refused(tmp_path / "x.kit", data[: -FOOTER.size] + end)


def test_index_that_lies_over_the_header(tmp_path):
    """Its place and size fit the file, but part of it is the header's own text."""
    text = json.dumps(said_by(0, 2, 0, 0, pad="x" * 200)).encode()
    length = PREFIX.size + len(text)
    inside = text[-2 * INDEX.itemsize :]
    end = FOOTER.pack(length - 2 * INDEX.itemsize, 2, xxhash.xxh3_64_intdigest(inside), MAGIC)
    prefix = PREFIX.pack(MAGIC, shard.VERSION, len(text), xxhash.xxh3_64_intdigest(text))
    assert "do not lie one behind the other" in refused(tmp_path / "x.kit", prefix + text + end)


def test_bytes_between_header_and_index_that_no_frame_claims(tmp_path):
    assert "do not lie one behind the other" in refused(tmp_path / "x.kit", build(said_by(0, 0, 0, 0), [b"hidden"]))


@pytest.mark.parametrize(
    "entry",
    [
        {"offset": 0},
        {"offset": 2**64 - 1},
        {"offset": 1 << 40},
        {"compressed": 0},
        {"compressed": 2**32 - 1},
        {"raw": 0},
        {"raw": 2**32 - 1},
        {"raw": len(frame()) + 1},
        {"rows": 0},
        {"rows": 1},
        {"rows": 2**32 - 1},
        {"rows": LENGTH + 1},
        {"zero": 1},
        {"checksum": 1},
    ],
)
def test_index_entry_that_does_not_fit(tmp_path, entry):
    message = refused(tmp_path / "x.kit", one_frame(frame(), **entry))
    assert "do not lie" in message if {*entry} & {"offset", "compressed"} else "sample 0: " in message


def test_index_entry_that_does_not_fit_is_named(tmp_path):
    """The second of three, its sums made good by the third."""
    said, raw = said_by(20, 23, 6, 15), frame()
    packed = zstandard.ZstdCompressor().compress(raw)
    index = np.zeros(3, INDEX)
    for place, (rows, entries) in enumerate(((2, 5), (1, 10), (3, 0))):
        at = PREFIX.size + len(json.dumps(said)) + place * len(packed)
        index[place] = (at, len(packed), HOW.frame_bytes(rows, entries), rows, 0, xxhash.xxh3_64_intdigest(raw), 7)
    assert "sample 21: the index entry" in refused(tmp_path / "x.kit", build(said, [packed] * 3, index))


def test_huge_frame_that_header_and_index_agree_on(tmp_path):
    """Rows, K and size fit each other and say almost 4 GiB; the few compressed bytes cannot hold that."""
    how, rows = Codec(2000, 1024, 1 / 16), (1 << 20) - 1
    raw = how.frame_bytes(rows, rows * how.k)
    claim = bytes.fromhex("28b52ffd a0") + raw.to_bytes(4, "little") + bytes.fromhex("010000")
    assert 3 << 30 < raw < 1 << 32 and zstandard.frame_content_size(claim) == raw
    said = said_by(0, 1, rows, rows * how.k, how, sequence_length=1 << 20)
    assert "sample 0: the index" in refused(tmp_path / "x.kit", one_frame(b"", claim, said, rows=rows, raw=raw))


def test_huge_number_of_rows_that_takes_few_bytes(tmp_path):
    """A row without an entry costs no byte of a compressed frame, but K entries in memory."""
    how = Codec(2000, 1024, 1 / 16)
    rows = shard.LARGEST_PLANE // how.k + 1
    raw = bytes(how.frame_bytes(rows, 0))
    said = said_by(0, 1, rows, 0, how, sequence_length=rows)
    assert "sample 0: the index" in refused(tmp_path / "x.kit", one_frame(raw, said=said, rows=rows))


def test_frame_that_claims_a_huge_content(tmp_path):
    """zstd's own header says how much is allocated."""
    claim = bytes.fromhex("28b52ffd e0") + (1 << 40).to_bytes(8, "little") + bytes.fromhex("010000")
    assert zstandard.frame_content_size(claim) == 1 << 40
    assert "sample 0: the frame has another size" in refused(tmp_path / "x.kit", one_frame(frame(), change=claim))


def test_frame_that_is_smaller_or_larger_than_it_says(tmp_path):
    """zstd's header agrees with the index, the blocks do not."""
    raw = frame()
    for data in (raw[:-1], raw + b"\0", b"", raw * 1000):
        block_ = (len(data) << 3 | 1).to_bytes(3, "little") + data
        claim = bytes.fromhex("28b52ffd 20") + bytes([len(raw)]) + block_
        assert "sample 0: " in refused(tmp_path / "x.kit", one_frame(raw, change=claim))


@pytest.mark.parametrize(
    "change", [b"", b"\0", b"abcdefgh", bytes.fromhex("28b52ffd"), bytes.fromhex("502a4d18 00000000")]
)
def test_frame_that_is_not_zstd(tmp_path, change):
    assert "sample 0: " in refused(tmp_path / "x.kit", one_frame(frame(), change=change))


def test_frame_without_its_size(tmp_path):
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(frame())
    assert "another size" in refused(tmp_path / "x.kit", one_frame(frame(), change=unsized))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (frame(counts=(5, 0)), "a row has 5 entries, more than K = 4"),
        (frame(counts=(3, 1)), "do not sum to its 5 entries"),
        (frame(counts=(3, 3)), "do not sum to its 5 entries"),
        (frame(gaps=(7, 0, 219, 2, 3)), "do not rise"),
        (frame(gaps=(7, 65_535, 219, 2, 3)), "an id of"),
        (frame(gaps=(7, 34, 259, 2, 3)), "an id of 300 in a vocabulary of 300"),
        (frame(gaps=(7, 34, 219, 2, 65_530)), "an id of 65532 in a vocabulary of 300"),
    ],
)
def test_rows_that_no_writer_gives_are_named(tmp_path, raw, message):
    """Also among good frames that are decoded with them."""
    found = refused(tmp_path / "x.kit", one_frame(raw))
    assert "sample 0: " in found and message in found
    said, frames, index = said_by(30, 33, 6, 15), [], np.zeros(3, INDEX)
    at = PREFIX.size + len(json.dumps(said))
    for place, data in enumerate((frame(), raw, frame())):
        frames.append(zstandard.ZstdCompressor().compress(data))
        index[place] = (at, len(frames[-1]), len(data), 2, 0, xxhash.xxh3_64_intdigest(data), 7)
        at += len(frames[-1])
    found = refused(tmp_path / "x.kit", build(said, frames, index))
    assert "sample 31: " in found and message in found
    assert [f.sample for f in Shard(tmp_path / "x.kit").read(30, 3)] == [30, 31, 32]


def test_ids_that_wrap_around_32_bits_are_named(tmp_path):
    how, largest = Codec(1 << 24, 300, 1 / 16), (1 << 24) - 1
    raw = frame((258,), [largest] * 257 + [258], bytes(258), width=3)
    said = said_by(0, 1, 1, 258, how)
    assert "sample 0: an id of" in refused(tmp_path / "x.kit", one_frame(raw, said=said, rows=1))


@pytest.mark.parametrize(
    ("first", "count"), [(9, 1), (13, 1), (-1, 1), (0, 1), (10**12, 1), (10, 4), (12, 2), (11, -1)]
)
def test_sample_that_the_shard_does_not_hold(small, first, count):
    with pytest.raises(UserError, match=rf"samples 10 to 13, asked for {first}"):
        Shard(small).read(first, count)
