"""Shard files: the frames of a fixed range of stream positions, found through an index, checked on reading.

    magic 8 | version u32 | header length u32 | header checksum u64 | header (JSON)
    frames, one a stream position, each zstd
    index, 40 bytes a frame: offset u64 | compressed u32 | raw u32 | rows u32 | 0 u32 | checksum of the raw bytes u64
                             | digest of the input u64
    footer 32 bytes: index offset u64, frames u64, index checksum u64, magic 8

All little-endian; checksums are xxh3_64. A shard is written to a temporary name, flushed and renamed.
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from ki_ds.errors import UserError
from ki_ds.sealed import write_atomically
from ki_ds.targets import codec
from ki_ds.targets.codec import Planes

MAGIC = b"KIT\x93\r\n\x1a\n"
VERSION = 1
PREFIX = struct.Struct("<8sIIQ")
FOOTER = struct.Struct("<QQQ8s")
INDEX = np.dtype([("offset", "<u8"), ("compressed", "<u4"), ("raw", "<u4"), ("rows", "<u4"), ("zero", "<u4"),
                  ("checksum", "<u8"), ("digest", "<u8")])  # fmt: skip
LARGEST_HEADER = 1 << 20
LARGEST_RATIO = 1 << 15  # of zstd: a block of one repeated byte takes 4 bytes for 128 KiB
NUMBERS = ("start", "end", "k", "vocabulary", "sequence_length")  # what a header must give to read the frames


@dataclass(frozen=True)
class Frame:
    """The targets of one sequence, and the digest of the input that the teacher saw."""

    digest: int
    planes: Planes


def shard_name(start: int, end: int) -> str:
    """File name of the shard of positions [start, end)."""
    return f"targets-{start:09d}-{end:09d}.kit"


def write_shard(path: Path, header: dict[str, Any], frames: list[Frame], level: int = 3) -> None:
    """Write a shard. `header` must hold start, end, k, vocabulary and sequence_length.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    blocks = [PREFIX.pack(MAGIC, VERSION, len(text), xxhash.xxh3_64_intdigest(text)), text]
    index = np.zeros(len(frames), INDEX)
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=True)
    offset = PREFIX.size + len(text)
    for frame in frames:
        raw = codec.encode(frame.planes)
        packed = compressor.compress(raw)
        fields = (offset, len(packed), len(raw), len(frame.planes), 0, xxhash.xxh3_64_intdigest(raw), frame.digest)
        index[len(blocks) - 2] = fields
        blocks.append(packed)
        offset += len(packed)
    blocks += [index.tobytes(), FOOTER.pack(offset, len(frames), xxhash.xxh3_64_intdigest(index.tobytes()), MAGIC)]
    write_atomically(path, b"".join(blocks))


class Shard:
    """An open shard, read through a memory map."""

    def __init__(self, path: Path):
        """Read header and index.

        Raises:
            UserError: the file is missing, cut, damaged, or of an unknown version.
        """
        self.path = path
        try:
            self.data = np.memmap(path, np.uint8, mode="r")
        except FileNotFoundError:
            raise UserError(f"{path}: is missing. Run `ki-ds teach`: it computes what is not there.") from None
        except (OSError, ValueError) as error:
            raise self._bad(f"cannot be read ({error})") from None
        size = len(self.data)
        if size < PREFIX.size + FOOTER.size:
            raise self._bad(f"has {size} bytes, fewer than an empty shard")
        magic, version, length, checksum = PREFIX.unpack(self._bytes(0, PREFIX.size))
        if magic != MAGIC:
            raise self._bad("is not a shard of targets (wrong magic)")
        if version != VERSION:
            raise UserError(f"{path}: format version {version}, but this version of ki_ds reads {VERSION}")
        if length > min(size - PREFIX.size - FOOTER.size, LARGEST_HEADER):
            raise self._bad(f"header length {length} does not fit the file")
        text = self._bytes(PREFIX.size, length)
        if xxhash.xxh3_64_intdigest(text) != checksum:
            raise self._bad("the header's checksum does not match")
        self.header = self._header(text)
        index_at, frames, index_checksum, end_magic = FOOTER.unpack(self._bytes(size - FOOTER.size, FOOTER.size))
        if end_magic != MAGIC or index_at + frames * INDEX.itemsize + FOOTER.size != size:
            raise self._bad("is cut short or damaged (the footer does not fit)")
        table = self._bytes(index_at, frames * INDEX.itemsize)
        if xxhash.xxh3_64_intdigest(table) != index_checksum:
            raise self._bad("the index's checksum does not match")
        self.index = np.frombuffer(table, INDEX)
        sizes = self.index["compressed"].astype(np.uint64)
        begin = PREFIX.size + length
        fits = (self.index["offset"] == begin + np.cumsum(sizes) - sizes).all() and begin + int(sizes.sum()) == index_at
        if not fits:
            raise self._bad("the frames do not lie one behind the other from the header to the index")
        if frames != self.header["end"] - self.header["start"]:
            raise self._bad(f"has {frames} frames for positions {self.header['start']} to {self.header['end']}")

    def _header(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            raise self._bad("the header is not JSON") from None
        numbers = [header.get(name) for name in NUMBERS] if isinstance(header, dict) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers) or header["start"] > header["end"]:
            raise self._bad(f"the header must give whole numbers {', '.join(NUMBERS)}, found {str(header)[:200]}")
        return header

    def _bytes(self, start: int, length: int) -> bytes:
        return self.data[start : start + length].tobytes()

    def _bad(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}. Remove the file and run `ki-ds teach`: it is computed anew.")

    def frame(self, position: int) -> Frame:
        """The frame of a stream position.

        Raises:
            UserError: the frame is damaged.
        """
        place = position - self.header["start"]
        if not 0 <= place < len(self.index):
            raise self._bad(f"holds positions {self.header['start']} to {self.header['end']}, asked for {position}")
        entry = self.index[place]
        offset, compressed, raw, rows = (int(entry[name]) for name in ("offset", "compressed", "raw", "rows"))
        k, vocabulary = self.header["k"], self.header["vocabulary"]
        fits = rows <= self.header["sequence_length"] and raw == codec.frame_bytes(rows, k, vocabulary)
        if not fits or raw > compressed * LARGEST_RATIO:
            raise self._bad(f"position {position}: the index entry does not fit the header or the file")
        packed = self._bytes(offset, compressed)
        try:
            if zstandard.frame_content_size(packed) != raw:  # it is allocated before anything is decompressed
                raise self._bad(f"position {position}: the frame has another size than the index says")
            data = zstandard.ZstdDecompressor().decompress(packed)
        except zstandard.ZstdError as error:
            raise self._bad(f"position {position}: cannot be decompressed ({error})") from None
        if len(data) != raw or xxhash.xxh3_64_intdigest(data) != int(entry["checksum"]):
            raise self._bad(f"position {position}: the frame's checksum does not match")
        try:
            return Frame(int(entry["digest"]), codec.decode(data, rows, k, vocabulary))
        except ValueError as error:
            raise self._bad(f"position {position}: {error}") from None


class ShardFolder:
    """Random access to the frames of a folder of shards, with the last few shards kept open."""

    def __init__(
        self,
        folder: Path,
        positions: int,
        positions_per_shard: int,
        keep_open: int = 8,
        header: dict[str, Any] | None = None,
    ):
        """`header`: what every shard's header must say, for instance its K and vocabulary."""
        self.folder, self.positions, self.per_shard = folder, positions, positions_per_shard
        self.header = header or {}
        self.keep_open = keep_open
        self.shards: OrderedDict[int, Shard] = OrderedDict()

    def frame(self, position: int) -> Frame:
        """The frame of a stream position.

        Raises:
            UserError: the shard is missing or damaged.
        """
        number = position // self.per_shard
        shard = self.shards.pop(number, None) or self._open(number)
        self.shards[number] = shard
        if len(self.shards) > self.keep_open:
            self.shards.popitem(last=False)
        return shard.frame(position)

    def _open(self, number: int) -> Shard:
        shard = Shard(self.folder / self.name(number))
        start = number * self.per_shard
        expected = {**self.header, "start": start, "end": min(start + self.per_shard, self.positions)}
        for key, value in expected.items():
            if shard.header.get(key) != value:
                raise shard._bad(f"its header gives {key} = {shard.header.get(key)}, expected {value}")
        return shard

    def name(self, number: int) -> str:
        """File name of the shard with this number."""
        start = number * self.per_shard
        return shard_name(start, min(start + self.per_shard, self.positions))

    def __len__(self) -> int:
        return -(-self.positions // self.per_shard)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        return [number for number in range(len(self)) if not (self.folder / self.name(number)).exists()]
