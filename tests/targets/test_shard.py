"""Shard files: pinned by bytes written by hand, the same bytes for the same input, a named error for every damage."""

import errno
import json
import os
import re
import struct
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard

import ki_ds
from ki_ds.errors import UserError
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets import shard
from ki_ds.targets.codec import Codec
from ki_ds.targets.distortion import Distortion
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.shard import FOOTER, INDEX, MAGIC, PREFIX, Shard, pack_block, write_shard

FORMAT = Path(ki_ds.__file__).parent / "targets" / "FORMAT.md"
HOW = Codec(300, 4, 1 / 16)
LENGTH = 64  # of a sequence


def sample(number, rows=None, how=HOW):
    """(planes, input digest, distortion of each row): recognisable targets of a sample, rows ragged."""
    rng = np.random.default_rng(number)
    rows = int(rng.integers(0, 5)) if rows is None else rows
    logp = -np.sort(rng.exponential(2, (rows, how.k)), axis=1).astype(np.float32)
    logp[:, 1:][rng.random((rows, how.k - 1)) < 0.2] = -np.inf
    ids = np.stack([rng.choice(how.vocabulary, how.k, replace=False) for _ in range(rows + 1)])[:rows]
    planes, lost = pack_arrays(how, ids, logp, dict.fromkeys(how.scalars, logp[:, 0]))
    return planes, int(rng.integers(0, 2**64, dtype=np.uint64)), lost


def block(numbers, rows=None, how=HOW):
    """Samples as one block."""
    found = [sample(number, None if rows is None else rows[place], how) for place, number in enumerate(numbers)]
    planes = shard.codec.concatenate([how.empty(0), *(planes for planes, _, _ in found)])
    ends = np.cumsum([len(planes) for planes, _, _ in found], dtype=int)
    digests = np.array([digest for _, digest, _ in found], np.uint64)
    return pack_block(how, planes, ends, digests, np.concatenate([np.zeros(0), *(lost for _, _, lost in found)]))


def write(path, start, end, how=HOW, rows=None, **said):
    """A shard of recognisable samples; its header."""
    header = FolderHeader.read({"sequence_length": LENGTH, "codec": how.record, **said})
    return write_shard(path, header, start, [block(range(start, end), rows, how)]).record


def contents(opened):
    """Everything that a shard says, as one comparable value."""
    start, end = opened.header.start, opened.header.end
    frames = opened.read(start, end - start)
    planes = opened.planes(frames)
    numbers = planes.ids(), planes.values_nK, planes.count_n, planes.scalars_Sn
    return opened.header.record, [(f.sample, f.digest, f.rows, f.data) for f in frames], [n.tolist() for n in numbers]


def said_by(start, end, rows, entries, how=HOW, **more):
    """A header."""
    numbers = {"start": start, "end": end, "rows": rows, "entries": entries, "sequence_length": LENGTH}
    return {**numbers, "codec": how.record, **more}


def build(text, frames=(), index=None):
    """Bytes of a shard with right checksums around whatever is said inside; frames are already compressed."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    prefix = PREFIX.pack(MAGIC, shard.VERSION, len(text), xxhash.xxh3_64_intdigest(text))
    body = b"".join(frames)
    table = (np.zeros(0, INDEX) if index is None else index).tobytes()
    at = PREFIX.size + len(text) + len(body)
    return prefix + text + body + table + FOOTER.pack(at, len(table) // 40, xxhash.xxh3_64_intdigest(table), MAGIC)


def one_frame(raw, /, change=None, said=None, **entry):
    """A shard of one frame that says what it is told to: `raw` compressed, the index entry and header changed."""
    said = said_by(0, 1, 2, 5) if said is None else said
    packed = zstandard.ZstdCompressor().compress(raw) if change is None else change
    index = np.zeros(1, INDEX)
    index[0] = (PREFIX.size + len(json.dumps(said)), len(packed), len(raw), 2, 0, xxhash.xxh3_64_intdigest(raw), 7)
    for name, value in entry.items():
        index[name] = value
    return build(said, [packed], index)


def frame(counts=(3, 2), gaps=(7, 34, 219, 2, 3), values=(24, 0, 8, 0, 20), width=2):
    """A decompressed frame of two scalars; as it stands, that of FORMAT.md's example but for the scalars."""
    data = b"".join(bytes(count >> shift & 0xFF for count in counts) + bytes(2 * len(counts)) for shift in (8, 0))
    data += b"".join(bytes(gap >> 8 * byte & 0xFF for gap in gaps) for byte in range(width))
    return data + bytes(values)


@pytest.fixture
def small(tmp_path):
    """A shard of three samples, one of them without a row."""
    write(tmp_path / "small.kit", 10, 13, rows=[3, 0, 2], note="ü")
    return tmp_path / "small.kit"


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


# --------------------------------------------------------------------------------------------------- golden

GOLDEN = bytes.fromhex(
    "4b 49 54 93 0d 0a 1a 0a 02 00 00 00 c9 00 00 00 c5 ee 34 90 26 9d 66 ca"
) + (
    b'{"codec":{"k":3,"quantum":0.0625,"scalars":["first","truth"],"values":"log-probability","vocabulary":300},'
    b'"distortion":{"max":0.0,"mean":0.0},"end":5,"entries":5,"rows":2,"sequence_length":8,"start":4}'
) + bytes.fromhex(
    "28 b5 2f fd 20 1b  30 00 00 00 00 ff ff fe f8  30 00 00 03 02 80 c0 80 00  28 00 00 07 22 db 02 03"
    "28 00 00 00 00 00 00 00  28 00 00 18 00 08 00 14  01 00 00"
    "e1 00 00 00 00 00 00 00 33 00 00 00 1b 00 00 00 02 00 00 00 00 00 00 00 14 8f 23 f1 0d bb 04 07"
    "88 77 66 55 44 33 22 11"
    "14 01 00 00 00 00 00 00 01 00 00 00 00 00 00 00 40 b4 20 1e 3f 47 07 54 4b 49 54 93 0d 0a 1a 0a"
)  # fmt: skip


def hexdump():
    """(bytes, comment) by offset, of FORMAT.md's hexdump; the JSON is text there."""
    lines, text = {}, ""
    for line in FORMAT.read_text().partition("## By hand")[2].splitlines():
        if found := re.match(r"    (?P<at>[0-9a-f]{4})  +(?P<hex>(?:[0-9a-f]{2} ?)+)(?: +(?P<comment>\S.*))?$", line):
            lines[int(found["at"], 16)] = bytes.fromhex(found["hex"]), found["comment"] or ""
        elif line.startswith("    0018  {"):
            text = line[10:]
        elif line.startswith("          ") and not text.endswith('"start":4}'):
            text += line.strip()
    return dict(sorted({**lines, 0x18: (text.encode(), "")}.items()))


def test_golden_shard_is_read(tmp_path):
    (tmp_path / "x.kit").write_bytes(GOLDEN)
    opened = Shard(tmp_path / "x.kit")
    assert opened.header.start == 4 and opened.codec == Codec(300, 3, 1 / 16)
    (only,) = opened.read(4)
    planes = opened.planes([only])
    assert (only.sample, only.rows, only.digest) == (4, 2, 0x1122334455667788)
    assert planes.ids().tolist() == [[7, 41, 260], [2, 5, 0]]
    assert planes.count_n.tolist() == [3, 2]
    assert planes.values_nK.tolist() == [[0, 24, 16], [20, 0, 0]]
    assert opened.codec.log_probabilities(planes).tolist() == [[-0.5, -2, -1.5], [-1.5, -0.25, -np.inf]]
    assert opened.codec.scalar(planes, "truth").tolist() == [-1.5, -8]


def test_golden_shard_is_what_is_written_today(tmp_path):
    """If another version of zstd chooses other blocks, this test may go; the one above may not."""
    how = Codec(300, 3, 1 / 16)
    logp = np.array([[-1.5, -0.5, -2], [-np.inf, -0.25, -1.5]], np.float32)
    scalars = {"first": np.array([-0.5, -0.25]), "truth": np.array([-1.5, -8])}
    planes, lost = pack_arrays(how, np.array([[260, 7, 41], [9, 5, 2]]), logp, scalars)
    packed = pack_block(how, planes, np.array([2]), np.array([0x1122334455667788], np.uint64), lost)
    said = write_shard(tmp_path / "x.kit", FolderHeader(8, how), 4, [packed])
    assert (tmp_path / "x.kit").read_bytes() == GOLDEN
    assert said.record == json.loads(GOLDEN[0x18:0xE1])


def test_hexdump_of_the_format_is_the_golden_shard():
    lines, at = hexdump(), 0
    for offset, (data, _) in lines.items():
        assert offset == at
        at += len(data)
    assert b"".join(data for data, _ in lines.values()) == GOLDEN


def test_numbers_beside_the_hexdump_are_its_own():
    says = {at: comment for at, (_, comment) in hexdump().items()}
    index = np.frombuffer(GOLDEN, INDEX, 1, 0x114)[0]

    def number(at, size):
        return int.from_bytes(GOLDEN[at : at + size], "little")

    assert f"version {number(0x8, 4)}" in says[0x8]
    assert f"header: {number(0xC, 4)} bytes" in says[0xC] and number(0xC, 4) == 0xE1 - 0x18
    assert number(0x10, 8) == xxhash.xxh3_64_intdigest(GOLDEN[0x18:0xE1])
    assert f"{GOLDEN[0xE6]} bytes when decompressed" in says[0xE1] and GOLDEN[0xE6] == index["raw"]
    blocks = {
        0xE7: "raw block of 6 bytes", 0xF0: "raw block of 6 bytes", 0xF9: "raw block of 5 bytes", 0x101: "another",
        0x109: "another", 0x111: "the last block, empty",
    }  # fmt: skip
    for (at, text), end in zip(blocks.items(), [*blocks, 0x114][1:], strict=True):
        assert text in says[at] and at + 3 + (number(at, 3) >> 3) == end
        assert number(at, 3) & 7 == (at == 0x111)  # raw; the last one
        assert not (size := re.search(r"of (\d+) bytes", text)) or int(size[1]) == number(at, 3) >> 3
    rows = [int.from_bytes([GOLDEN[0xEA + i], GOLDEN[0xF3 + i]], "big", signed=i > 1) for i in range(6)]
    assert f"counts are {rows[0]} and {rows[1]}" in says[0xF3] and "counts" in says[0xEA]
    beside = re.findall(r"([0-9a-f]{4}) = (?:(-\d+) = )?(-[\d.]+) · 256", says[0xEC] + says[0xEE])
    assert [float(nats) * 256 for *_, nats in beside] == rows[2:] == [-128, -64, -384, -2048]
    assert [int.from_bytes(bytes.fromhex(text), "big", signed=True) for text, *_ in beside] == rows[2:]
    assert [int(units) for _, units, _ in beside[:2]] == rows[2:4]
    assert [GOLDEN[0xFC + i] for i in range(5)] == [7, 41 - 7, 260 - 41, 2, 5 - 2]
    assert "7, 41 - 7 = 34, 260 - 41 = 219; 2, 5 - 2 = 3" in says[0xFC]
    assert "7 lies 24 quanta = 1.5 nats higher" in says[0x10C] and GOLDEN[0x10C] / 16 == 1.5
    assert "20 quanta = 1.25 nats above" in says[0x10F] and GOLDEN[0x110] / 16 == 1.25
    assert f"lies at {index['offset']:#x}" in says[0x114] and GOLDEN[index["offset"] :][:4].hex() == "28b52ffd"
    assert f"{index['compressed']} bytes, {index['raw']} decompressed" in says[0x11C]
    assert f"{index['rows']} rows, zero" in says[0x124] and index["zero"] == 0
    data = zstandard.ZstdDecompressor().decompress(GOLDEN[0xE1:0x114])
    assert f"checksum of the {len(data)} bytes" in says[0x12C] and xxhash.xxh3_64_intdigest(data) == index["checksum"]
    assert f"{index['digest']:#x}" in says[0x134]
    assert f"index lies at {number(0x13C, 8):#x}" in says[0x13C] and number(0x13C, 8) == 0x114
    assert "one entry" in says[0x144] and number(0x144, 8) == 1
    assert number(0x14C, 8) == xxhash.xxh3_64_intdigest(GOLDEN[0x114:0x13C])


def test_shard_of_counts_written_by_hand(tmp_path):
    """Three bytes an id, counts, ragged rows, tails, a sample without rows, and blocks as a stranger may cut them."""
    names = ["first", "truth", "tail@2"]
    frames = [
        bytes.fromhex("00 00 00  ff 80 fe  fe 80 fe  01 80 ff")  # high bytes: counts, first, truth, tail
        + bytes.fromhex("02 00 01  00 00 c0  80 00 c0  00 00 ff")  # low bytes
        + bytes([0x45, 0x01, 0xFF, 0x23, 0x00, 0xFF, 0x00, 0x01, 0x00])  # 0x45 + 0x2300, 0x10001 further; 0xffff
        + bytes([3, 255, 1]),
        b"",
        bytes(40),
    ]
    packed = [
        # single segment, one byte of size; raw blocks of 6, 18, 0 and 12 bytes
        b"\x28\xb5\x2f\xfd\x20\x24" + b"".join(
            (last | size << 3).to_bytes(3, "little") + frames[0][at : at + size]
            for at, size, last in ((0, 6, 0), (6, 18, 0), (24, 0, 0), (24, 12, 1))
        ),
        b"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00",
        # a block of one repeated byte; four bytes of size and a window
        b"\x28\xb5\x2f\xfd\x80\x58" + (40).to_bytes(4, "little") + (1 | 1 << 1 | 40 << 3).to_bytes(3, "little") + b"\0",
    ]  # fmt: skip
    text = json.dumps(
        {
            "codec": {"vocabulary": 80_000, "k": 4, "values": "count", "quantum": 0, "scalars": names},
            "sequence_length": 16, "start": 7, "end": 10, "rows": 8, "entries": 3, "colour": "blue",
        }
    ).encode()  # fmt: skip
    data = b"KIT\x93\r\n\x1a\n" + struct.pack("<IIQ", 2, len(text), xxhash.xxh3_64_intdigest(text)) + text
    index = b""
    for rows, raw, block_, digest in zip((3, 0, 5), frames, packed, (1, 2, 2**64 - 1), strict=True):
        checksum = xxhash.xxh3_64_intdigest(raw)
        index += struct.pack("<QIIIIQQ", len(data), len(block_), len(raw), rows, 0, checksum, digest)
        data += block_
    footer = struct.pack("<QQQ", len(data), 3, xxhash.xxh3_64_intdigest(index)) + b"KIT\x93\r\n\x1a\n"
    (tmp_path / "x.kit").write_bytes(data + index + footer)
    opened = Shard(tmp_path / "x.kit")
    found = opened.read(7, 3)
    assert [(raw.sample, raw.digest, raw.rows) for raw in found] == [(7, 1, 3), (8, 2, 0), (9, 2**64 - 1, 5)]
    planes = opened.planes(found)
    assert planes.count_n.tolist() == [2, 0, 1] + [0] * 5
    assert planes.ids()[:3].tolist() == [[0x2345, 0x12346, 0, 0], [0] * 4, [0xFFFF, 0, 0, 0]]
    assert planes.values_nK[:3].tolist() == [[3, 255, 0, 0], [0] * 4, [1, 0, 0, 0]]
    stored = [opened.codec.scalar(planes, scalar)[:3].tolist() for scalar in ("first", "truth", 2)]
    assert stored == [[-1, -np.inf, -1.25], [-1.5, -np.inf, -1.25], [1, -np.inf, -1 / 256]]
    assert opened.header.folder.more["colour"] == "blue"


# ---------------------------------------------------------------------------------------------------- write


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


# --------------------------------------------------------------------------------------------------- damage


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


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"start": ' + b"9" * 5000 + b"}", b"\xd8\0", b"NaN"],
)
def test_header_that_is_not_json(tmp_path, text):
    assert "header" in refused(tmp_path / "x.kit", build(text))


def test_header_nested_as_deep_as_json_allows(tmp_path):
    """What can be parsed must be shown too."""
    for depth in range(880, 1000, 4):
        for inner in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
            assert "header" in refused(tmp_path / "x.kit", build(inner))
            said = json.dumps({**said_by(0, 0, 0, 0), "codec": "HERE"}).encode()
            assert "header" in refused(tmp_path / "x.kit", build(said.replace(b'"HERE"', inner)))


@pytest.mark.parametrize("said", [[], None, "start", 3, {}, {"start": 0, "end": 0}])
def test_header_without_its_keys(tmp_path, said):
    assert "sequence_length" in refused(tmp_path / "x.kit", build(said))


@pytest.mark.parametrize("key", ["start", "end", "rows", "entries", "sequence_length"])
@pytest.mark.parametrize("value", ["0", None, 1.0, True, [0], {}, -1, 1 << 70])
def test_header_of_wrong_types(tmp_path, key, value):
    assert key in refused(tmp_path / "x.kit", build({**said_by(0, 0, 0, 0), key: value}))


@pytest.mark.parametrize("change", [{"k": 1025}, {"quantum": 10**400}, {"scalars": ["truth"]}, {"vocabulary": 1 << 30}])
def test_header_whose_codec_is_none(tmp_path, change):
    said = said_by(0, 0, 0, 0, codec={**HOW.record, **change})
    assert "the header's codec: " in refused(tmp_path / "x.kit", build(said))
    assert "the header's codec: " in refused(tmp_path / "x.kit", build({**said, "codec": None}))


def test_header_that_ends_before_it_starts(tmp_path):
    refused(tmp_path / "x.kit", build(said_by(7, 3, 0, 0)))


@pytest.mark.parametrize("change", [{"rows": 3}, {"entries": 6}, {"end": 2}, {"start": 1}, {"sequence_length": 1}])
def test_header_that_says_otherwise_than_the_index(tmp_path, change):
    path, raw = tmp_path / "x.kit", frame()
    path.write_bytes(one_frame(raw))
    assert contents(Shard(path))[1] == [(0, 7, 2, raw)]  # the builder itself makes readable shards
    refused(path, one_frame(raw, said={**said_by(0, 1, 2, 5), **change}))


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
