"""Shard files: exact on reading, the same bytes for the same input, and a named error for every damaged byte."""

import errno
import json
import os
import tracemalloc

import numpy as np
import pytest
import xxhash
import zstandard

from ki_ds.errors import UserError
from ki_ds.targets import codec, shard
from ki_ds.targets.shard import FOOTER, INDEX, MAGIC, PREFIX, Frame, Shard, ShardFolder, shard_name, write_shard

K, VOCABULARY, LENGTH = 4, 300, 16


def frame(position, rows=None, vocabulary=VOCABULARY):
    """Recognisable targets of a stream position."""
    rng = np.random.default_rng(position)
    rows = int(rng.integers(0, 5)) if rows is None else rows
    logp = -np.sort(rng.exponential(2, (rows, K)), axis=1).astype(np.float32)
    ids = rng.integers(0, vocabulary, (rows, K))
    return Frame(int(rng.integers(0, 2**64, dtype=np.uint64)), codec.pack(ids, logp, logp[:, 0], vocabulary))


def header(start, end, **more):
    return {"start": start, "end": end, "k": K, "vocabulary": VOCABULARY, "sequence_length": LENGTH, **more}


def contents(opened):
    """Everything that a shard says, as one comparable value."""
    frames = [opened.frame(position) for position in range(opened.header["start"], opened.header["end"])]
    return opened.header, [(f.digest, codec.encode(f.planes)) for f in frames]


def build(text, frames=(), index=None, **footer):
    """Bytes of a shard with right checksums around whatever is said inside; frames are already compressed."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    prefix = PREFIX.pack(MAGIC, shard.VERSION, len(text), xxhash.xxh3_64_intdigest(text))
    body = b"".join(frames)
    table = (np.zeros(0, INDEX) if index is None else index).tobytes()
    values = {"at": PREFIX.size + len(text) + len(body), "frames": len(table) // INDEX.itemsize, **footer}
    end = FOOTER.pack(values["at"], values["frames"], xxhash.xxh3_64_intdigest(table), MAGIC)
    return prefix + text + body + table + end


def one_frame(raw, /, change=None, said=None, **entry):
    """A shard of one frame that says what it is told to: `raw` compressed, the index entry and header changed."""
    said = header(0, 1) if said is None else said
    packed = zstandard.ZstdCompressor().compress(raw) if change is None else change
    index = np.zeros(1, INDEX)
    index[0] = (PREFIX.size + len(json.dumps(said)), len(packed), len(raw), 2, 0, xxhash.xxh3_64_intdigest(raw), 7)
    for name, value in entry.items():
        index[name] = value
    return build(said, [packed], index)


@pytest.fixture
def small(tmp_path):
    """A shard of three positions, one of them without a target position."""
    path = tmp_path / "small.kit"
    write_shard(path, header(10, 13, note="ü"), [frame(10, 3), frame(11, 0), frame(12, 2)])
    return path


def refused(path, data=None):
    """The message with which a file is refused, while little memory is asked for."""
    if data is not None:
        path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            contents(Shard(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20, f"{peak} bytes were allocated for a file of {path.stat().st_size}"
    assert str(error.value).startswith(str(path))
    return str(error.value)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 100_000])
def test_write_then_read(tmp_path, vocabulary):
    frames = [frame(position, vocabulary=vocabulary) for position in range(40, 60)]
    said = header(40, 60, vocabulary=vocabulary, teacher="base", quantum=codec.QUANTUM, nested={"a": [1, None]})
    write_shard(tmp_path / "x.kit", said, frames)
    opened = Shard(tmp_path / "x.kit")
    assert opened.header == said
    for position in (59, 40, 47, 40):  # any order, more than once
        found, expected = opened.frame(position), frames[position - 40]
        assert found.digest == expected.digest
        assert codec.encode(found.planes) == codec.encode(expected.planes)


def test_shard_without_positions(tmp_path):
    write_shard(tmp_path / "x.kit", header(5, 5), [])
    with pytest.raises(UserError, match="asked for 5"):
        Shard(tmp_path / "x.kit").frame(5)


def test_same_input_gives_the_same_bytes(tmp_path):
    frames = [frame(position) for position in range(8)]
    said = header(0, 8, b=1, a=2)
    write_shard(tmp_path / "one", said, frames)
    write_shard(tmp_path / "two", dict(reversed(said.items())), frames)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_layout_as_a_stranger_would_parse_it(small):
    """The layout of the docstring, followed with struct and zstd alone."""
    data = small.read_bytes()
    assert data[:8] == data[-8:] == b"KIT\x93\r\n\x1a\n"
    assert int.from_bytes(data[8:12], "little") == 1
    length = int.from_bytes(data[12:16], "little")
    assert int.from_bytes(data[16:24], "little") == xxhash.xxh3_64_intdigest(data[24 : 24 + length])
    assert json.loads(data[24 : 24 + length]) == header(10, 13, note="ü")
    at, frames = (int.from_bytes(data[-32 + 8 * i : -24 + 8 * i], "little") for i in range(2))
    assert (frames, at + 40 * frames + 32) == (3, len(data))
    assert int.from_bytes(data[-16:-8], "little") == xxhash.xxh3_64_intdigest(data[at:-32])
    offset = 24 + length
    for number, position in enumerate((10, 11, 12)):
        entry = data[at + 40 * number : at + 40 * (number + 1)]
        parts = [entry[0:8], entry[8:12], entry[12:16], entry[16:20], entry[20:24], entry[24:32], entry[32:40]]
        found, packed, raw, rows, zero, checksum, digest = (int.from_bytes(part, "little") for part in parts)
        assert (found, zero) == (offset, 0)
        block = zstandard.ZstdDecompressor().decompress(data[offset : offset + packed])
        assert (len(block), xxhash.xxh3_64_intdigest(block)) == (raw, checksum)
        expected = frame(position, rows)
        assert (block, digest) == (codec.encode(expected.planes), expected.digest)
        offset += packed
    assert offset == at


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_flipped_byte_never_gives_other_data(small, flip):
    data, expected = small.read_bytes(), contents(Shard(small))
    silent = []
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= flip
        small.write_bytes(damaged)
        try:
            assert contents(Shard(small)) == expected, f"byte {place} changes the data in silence"
            silent.append(place)
        except UserError:
            pass
    assert len(silent) < len(data) // 20  # a few bits of zstd's own header mean nothing


def test_cut_file_is_refused_at_any_length(small):
    data = small.read_bytes()
    for length in range(len(data)):
        refused(small, data[:length])


def test_bytes_added_or_taken_out_are_refused(small):
    data = small.read_bytes()
    refused(small, data + b"\0")
    refused(small, data + data)
    refused(small, b"\0" + data)
    for place in (9, 30, len(data) // 2, len(data) - 40):
        refused(small, data[:place] + data[place + 1 :])
        refused(small, data[:place] + b"\0" + data[place:])


def test_missing_file_and_folder_in_its_place(tmp_path):
    for path, message in ((tmp_path / "absent.kit", "is missing"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=message):
            Shard(path)


def test_other_files_are_not_shards(tmp_path):
    assert "magic" in refused(tmp_path / "text", b"not a shard of targets, but some text that is long enough for one")


def test_unknown_version_is_named(small):
    data = bytearray(small.read_bytes())
    data[8:12] = (9).to_bytes(4, "little")
    message = refused(small, bytes(data))
    assert "version 9" in message
    assert "reads 1" in message


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 1 << 20, 400])
def test_huge_header_length(small, length):
    data = bytearray(small.read_bytes())
    data[12:16] = length.to_bytes(4, "little")
    assert f"header length {length}" in refused(small, bytes(data))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"start": ' + b"9" * 5000 + b"}"])
def test_header_that_is_not_json(tmp_path, text):
    assert "header" in refused(tmp_path / "x.kit", build(text))


@pytest.mark.parametrize("said", [[], None, "start", 3, {}, {"start": 0, "end": 0}])
def test_header_without_its_keys(tmp_path, said):
    assert "sequence_length" in refused(tmp_path / "x.kit", build(said))


@pytest.mark.parametrize("key", ["start", "end", "k", "vocabulary", "sequence_length"])
@pytest.mark.parametrize("value", ["0", None, 1.0, True, [0], {}, -1])
def test_header_of_wrong_types(tmp_path, key, value):
    assert key in refused(tmp_path / "x.kit", build({**header(0, 0), key: value}))


def test_header_that_ends_before_it_starts(tmp_path):
    refused(tmp_path / "x.kit", build(header(7, 3)))


def test_number_of_frames_that_is_not_the_header_s(tmp_path):
    raw = codec.encode(frame(0, 2).planes)
    contents_of_one = one_frame(raw)
    path = tmp_path / "x.kit"
    path.write_bytes(contents_of_one)
    assert contents(Shard(path))[1] == [(7, raw)]  # the builder itself makes readable shards
    assert "1 frames" in refused(path, one_frame(raw, said=header(0, 2)))


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
    raw = codec.encode(frame(0, 2).planes)
    data = one_frame(raw)
    at, frames, checksum, magic = FOOTER.unpack(data[-FOOTER.size :])
    end = FOOTER.pack(footer.get("at", at), footer.get("frames", frames), checksum, magic)
    assert "footer" in refused(tmp_path / "x.kit", data[: -FOOTER.size] + end)


def test_index_that_lies_over_the_header(tmp_path):
    """Its place and size fit the file, but part of it is the header's own text."""
    text = json.dumps({**header(0, 2), "pad": "x" * 200}).encode()
    length = PREFIX.size + len(text)
    inside = np.frombuffer(text[-2 * INDEX.itemsize :], INDEX)
    end = FOOTER.pack(length - 2 * INDEX.itemsize, 2, xxhash.xxh3_64_intdigest(inside.tobytes()), MAGIC)
    refused(
        tmp_path / "x.kit", PREFIX.pack(MAGIC, shard.VERSION, len(text), xxhash.xxh3_64_intdigest(text)) + text + end
    )


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
        {"rows": 0},
        {"rows": 2**32 - 1},
        {"rows": LENGTH + 1},
        {"checksum": 1},
    ],
)
def test_index_entry_that_does_not_fit(tmp_path, entry):
    refused(tmp_path / "x.kit", one_frame(codec.encode(frame(0, 2).planes), **entry))


def test_huge_frame_that_header_and_index_agree_on(tmp_path):
    """rows, K and raw size fit each other and say 4 GiB; the few compressed bytes cannot hold that."""
    k = 2**30
    raw = codec.frame_bytes(1, k, VOCABULARY)
    claim = bytes.fromhex("28b52ffd a0") + raw.to_bytes(4, "little") + bytes.fromhex("010000")
    assert zstandard.frame_content_size(claim) == raw
    refused(tmp_path / "x.kit", one_frame(b"abc", change=claim, said=header(0, 1, k=k), rows=1, raw=raw))


def test_frame_that_claims_a_huge_content(tmp_path):
    """zstd's own header says how much is allocated."""
    raw = codec.encode(frame(0, 2).planes)
    claim = bytes.fromhex("28b52ffd e0") + (1 << 40).to_bytes(8, "little") + bytes.fromhex("010000")
    assert zstandard.frame_content_size(claim) == 1 << 40
    refused(tmp_path / "x.kit", one_frame(raw, change=claim))


@pytest.mark.parametrize("change", [b"", b"\0", b"abcdefgh", bytes.fromhex("28b52ffd")])
def test_frame_that_is_not_zstd(tmp_path, change):
    refused(tmp_path / "x.kit", one_frame(codec.encode(frame(0, 2).planes), change=change))


def test_frame_without_its_size(tmp_path):
    raw = codec.encode(frame(0, 2).planes)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    assert "another size" in refused(tmp_path / "x.kit", one_frame(raw, change=unsized))


def test_count_above_k_with_right_checksums(tmp_path):
    raw = bytearray(codec.encode(frame(0, 2).planes))
    raw[0:2] = (K + 1).to_bytes(2, "little")
    assert f"more than K = {K}" in refused(tmp_path / "x.kit", one_frame(bytes(raw)))


@pytest.mark.parametrize("position", [9, 13, -1, 0, 10**12])
def test_position_that_the_shard_does_not_hold(small, position):
    with pytest.raises(UserError, match=rf"positions 10 to 13, asked for {position}"):
        Shard(small).frame(position)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_no_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="Free some space"):
        write_shard(tmp_path / "x.kit", header(0, 1), [frame(0)])
    assert list(tmp_path.iterdir()) == []


def test_failed_rewrite_keeps_the_old_shard(small, monkeypatch):
    before = small.read_bytes()

    def full(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError):
        write_shard(small, header(10, 11), [frame(10)])
    assert small.read_bytes() == before
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_shard(tmp_path / "absent" / "x.kit", header(0, 1), [frame(0)])


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def folder(tmp_path):
    """Ten positions, four a shard: the last shard is partial."""
    for start, end in ((0, 4), (4, 8), (8, 10)):
        frames = [frame(position) for position in range(start, end)]
        write_shard(tmp_path / shard_name(start, end), header(start, end), frames)
    return tmp_path


def test_names_sort_by_position_and_the_last_shard_ends_early(folder):
    shards = ShardFolder(folder, 10, 4)
    assert len(shards) == 3
    names = [shards.name(number) for number in range(3)]
    assert names == [
        "targets-000000000-000000004.kit",
        "targets-000000004-000000008.kit",
        "targets-000000008-000000010.kit",
    ]
    assert names == sorted(path.name for path in folder.iterdir())


def test_every_position_by_random_access(folder):
    shards = ShardFolder(folder, 10, 4, keep_open=1)
    for position in (9, 0, 3, 4, 8, 7, 0, 9):
        found, expected = shards.frame(position), frame(position)
        assert (found.digest, codec.encode(found.planes)) == (expected.digest, codec.encode(expected.planes))


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


@pytest.mark.parametrize("position", [10, 11, 4000, -1])
def test_position_beyond_the_folder(folder, position):
    with pytest.raises(UserError):
        ShardFolder(folder, 10, 4).frame(position)


def test_few_shards_stay_open_and_are_not_opened_twice(folder, monkeypatch):
    opened = []
    real = Shard.__init__

    def counted(self, path):
        opened.append(path.name)
        real(self, path)

    monkeypatch.setattr(Shard, "__init__", counted)
    shards = ShardFolder(folder, 10, 4, keep_open=2)
    for position in (0, 1, 4, 0, 5, 8):
        shards.frame(position)
        assert len(shards.shards) <= 2
    assert opened == [shards.name(0), shards.name(1), shards.name(2)]
    shards.frame(6)  # used last before 8: still open
    assert len(opened) == 3
    shards.frame(0)
    assert opened[3:] == [shards.name(0)]


def test_shard_renamed_to_another_range_is_refused(folder):
    (folder / shard_name(0, 4)).replace(folder / shard_name(4, 8))
    with pytest.raises(UserError, match="its header gives start = 0, expected 4"):
        ShardFolder(folder, 10, 4).frame(5)
