"""Shard files are pinned by bytes written by hand: FORMAT.md's example, and one of counts."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import xxhash
import zstandard
from helpers.shards import GOLDEN

import ki_ds
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets.codec import Codec
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.shard import INDEX, Shard, pack_block, write_shard

FORMAT = Path(ki_ds.__file__).parent / "targets" / "FORMAT.md"


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
