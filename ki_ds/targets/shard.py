"""Shard files: the frames of a fixed range of samples, found through an index, checked on reading.

    magic 8 | version u32 | header length u32 | header checksum u64 | header (JSON)
    frames, one a sample, each zstd
    index, 40 bytes a frame: offset u64 | compressed u32 | raw u32 | rows u32 | 0 u32 | checksum of the raw bytes u64
                             | digest of the input u64
    footer 32 bytes: index offset u64, frames u64, index checksum u64, magic 8

All little-endian; checksums are xxh3_64. FORMAT.md describes every field, with a worked hexdump. A shard is written to
a temporary name, flushed and renamed.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from ki_ds.errors import UserError, reason
from ki_ds.files import write_atomically
from ki_ds.targets import codec
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.distortion import Distortion
from ki_ds.targets.header import FolderHeader, ShardHeader
from ki_ds.targets.source import Place, Source

MAGIC = b"KIT\x93\r\n\x1a\n"
VERSION = 2
PREFIX = struct.Struct("<8sIIQ")
FOOTER = struct.Struct("<QQQ8s")
INDEX = np.dtype([("offset", "<u8"), ("compressed", "<u4"), ("raw", "<u4"), ("rows", "<u4"), ("zero", "<u4"),
                  ("checksum", "<u8"), ("digest", "<u8")])  # fmt: skip
LARGEST_HEADER = 1 << 20
LARGEST_RATIO = 1 << 15  # of zstd: a block of one repeated byte takes 4 bytes for 128 KiB
LARGEST_PLANE = 1 << 26  # rows · K of a sample: 65,536 tokens of 1,024 ids; in memory rows are not ragged
LARGEST_FRAME = 1 << 28  # bytes of a decompressed frame
MOST_SAMPLES = 1 << 20  # in a shard
MOST_FRAMES, MOST_SLOTS = 64, 1 << 22  # of what a tool reads at once
MOST_BYTES = 4 * MOST_SLOTS
HEAD, TAIL = 1 << 13, 1 << 16  # read at once from the file's ends: most often header and index are in them
_local = threading.local()


def shard_name(start: int, end: int) -> str:
    """File name of the shard of samples [start, end)."""
    return f"targets-{start:09d}-{end:09d}.kit"


@dataclass(frozen=True)
class FrameBlock:
    """Compressed frames of consecutive samples, ready to be written."""

    frames: list[bytes]
    index: np.ndarray  # INDEX; offsets are not known yet
    entries: int
    distortion_n: np.ndarray  # KL(original ‖ decoded) of each row, nats


def pack_block(
    how: Codec, planes: Planes, ends: np.ndarray, digests: np.ndarray, distortion_n: np.ndarray
) -> FrameBlock:
    """Encode and compress the rows of consecutive samples; releases the interpreter's lock for most of its time.

    Args:
        ends: [P] where each sample's rows end.
        digests: uint64 [P], of the input that the teacher saw.
    """
    zstd = getattr(_local, "compressor", None)
    if zstd is None:
        zstd = _local.compressor = codec.compressor()
    index = np.zeros(len(ends), INDEX)
    frames = []
    for place, parts in enumerate(how.encode(planes, ends)):
        checksum = xxhash.xxh3_64()
        for part in parts:
            checksum.update(part)
        frames.append(b"".join(codec.compress(zstd, parts)))
        index[place]["raw"], index[place]["checksum"] = sum(map(len, parts)), checksum.intdigest()
    index["compressed"] = [len(frame) for frame in frames]
    index["rows"] = np.diff(ends, prepend=0)
    index["digest"] = digests
    return FrameBlock(frames, index, int(planes.count_n.sum(dtype=np.int64)), distortion_n)


def write_shard(
    path: Path, header: FolderHeader, start: int, blocks: Sequence[FrameBlock], keep: bool = False
) -> ShardHeader:
    """Write the shard of the samples from `start` on, or `keep` the one that is there. Returns its whole header.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    index = np.concatenate([np.zeros(0, INDEX), *(block.index for block in blocks)])
    said = ShardHeader(
        header, start, start + len(index), int(index["rows"].sum()), sum(block.entries for block in blocks),
        Distortion.of(block.distortion_n for block in blocks),
    )  # fmt: skip
    text = json.dumps(said.record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    sizes = index["compressed"].astype(np.uint64)
    index["offset"] = PREFIX.size + len(text) + np.cumsum(sizes) - sizes
    at = PREFIX.size + len(text) + int(sizes.sum())
    table = index.tobytes()
    footer = FOOTER.pack(at, len(index), xxhash.xxh3_64_intdigest(table), MAGIC)
    prefix = PREFIX.pack(MAGIC, VERSION, len(text), xxhash.xxh3_64_intdigest(text))
    write_atomically(path, [prefix, text, *(frame for block in blocks for frame in block.frames), table, footer], keep)
    return said


class Damaged(UserError):
    """A shard whose bytes are not what its writer wrote, as against one that cannot be read just now."""


@dataclass(frozen=True)
class Frame:
    """A decompressed, checked frame."""

    sample: int
    digest: int
    rows: int
    data: bytes


class Shard:
    """An opened shard: its header and index; frames are read when they are asked for."""

    def __init__(self, place: Place):
        """Read header and index.

        Raises:
            UserError: the file is missing, cut, damaged, or of an unknown version.
        """
        self.place, self.source = place, Source(place)
        try:
            size = self.source.size()
            head = self.source.read(0, min(size, HEAD))
            tail = self.source.read(max(size - TAIL, 0), min(size, TAIL))
        except FileNotFoundError:
            raise UserError(f"{place}: is missing. Run `ki-ds teach`: it computes what is not there.") from None
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({reason(error)})") from None
        if size < PREFIX.size + FOOTER.size or len(head) < min(size, HEAD) or len(tail) < min(size, TAIL):
            raise self.bad(f"has {size} bytes, fewer than an empty shard, or was cut while it was read")
        magic, version, length, checksum = PREFIX.unpack_from(head)
        if magic != MAGIC:
            raise self.bad("is not a shard of targets (wrong magic)")
        if version != VERSION:
            raise UserError(
                f"{place}: format version {version}, but this version of ki_ds reads {VERSION}. Use the version that "
                "wrote it, or remove the file and run `ki-ds teach`: it is computed anew."
            )
        if length > min(size - PREFIX.size - FOOTER.size, LARGEST_HEADER):
            raise self.bad(f"header length {length} does not fit the file")
        text = head[PREFIX.size : PREFIX.size + length]
        if len(text) < length:
            text = self._read(PREFIX.size, length)
        if xxhash.xxh3_64_intdigest(text) != checksum:
            raise self.bad("the header's checksum does not match")
        self.header = self._header(text)
        self.codec = self.header.folder.codec
        index_at, frames, index_checksum, end_magic = FOOTER.unpack(tail[-FOOTER.size :])
        if end_magic != MAGIC or index_at + frames * INDEX.itemsize + FOOTER.size != size:
            raise self.bad("is cut short or damaged (the footer does not fit)")
        if frames > MOST_SAMPLES:
            raise self.bad(f"has {frames} samples; a shard holds at most {MOST_SAMPLES}")
        ahead = len(tail) - (size - index_at)
        table = tail[ahead : -FOOTER.size] if ahead >= 0 else self._read(index_at, frames * INDEX.itemsize)
        if xxhash.xxh3_64_intdigest(table) != index_checksum:
            raise self.bad("the index's checksum does not match")
        self.index = np.frombuffer(table, INDEX)
        self.digest = hashlib.sha256(text + table).hexdigest()[:32]  # pins every frame, by the index's checksums
        self._check_index(PREFIX.size + length, index_at)

    def _header(self, text: bytes) -> ShardHeader:
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            raise self.bad("the header is not JSON") from None
        try:
            return ShardHeader.read(said)
        except ValueError as error:
            raise self.bad(str(error)) from None

    def _check_index(self, begin: int, end: int) -> None:
        index, header, how = self.index, self.header, self.codec
        sizes = index["compressed"].astype(np.uint64)
        fits = (index["offset"] == begin + np.cumsum(sizes) - sizes).all() and begin + int(sizes.sum()) == end
        if not fits:
            raise self.bad("the frames do not lie one behind the other from the header to the index")
        if len(index) != header.end - header.start:
            raise self.bad(f"has {len(index)} frames for samples {header.start} to {header.end}")
        raw, rows = index["raw"].astype(np.int64), index["rows"].astype(np.int64)
        per_row, per_entry = how.frame_bytes(1, 0), how.frame_bytes(0, 1)
        entries = (raw - rows * per_row) // per_entry
        wrong = (rows > header.folder.sequence_length) | (raw != rows * per_row + entries * per_entry)
        wrong |= (entries < 0) | (entries > rows * how.k) | (raw > sizes.astype(np.int64) * LARGEST_RATIO)
        wrong |= (rows * how.k > LARGEST_PLANE) | (raw > LARGEST_FRAME)
        if wrong.any() or (index["zero"] != 0).any():
            place = header.start + int(np.flatnonzero(wrong | (index["zero"] != 0))[0])
            raise self.bad(f"sample {place}: the index entry does not fit the header or the file")
        if (int(rows.sum()), int(entries.sum())) != (header.rows, header.entries):
            raise self.bad(f"the index has {rows.sum()} rows and {entries.sum()} entries, the header says otherwise")

    def batches(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(first, count) of runs of samples that take a bounded amount of memory to read and decode at once."""
        first = start
        while first < end:
            entries = self.index[first - self.header.start :][:MOST_FRAMES]
            raw, rows = entries["raw"].astype(np.int64), entries["rows"].astype(np.int64)
            size = np.cumsum(np.maximum(raw, 4 * self.codec.k * rows))
            count = max(int(np.searchsorted(size, MOST_BYTES, side="right")), 1)
            yield first, min(count, end - first)
            first += min(count, end - first)

    def _read(self, start: int, length: int) -> bytes:
        try:
            found = self.source.read(start, length)
        except OSError as error:
            raise UserError(f"{self.place}: cannot be read ({reason(error)})") from None
        if len(found) != length:
            raise self.bad("was cut short")
        return found

    def bad(self, what: str) -> Damaged:
        """The error of a damaged shard, with its remedy."""
        return Damaged(
            f"{self.place}: {what}. `ki-ds targets repair` on its folder sets it aside; then `ki-ds teach` (or the "
            "import, where it was imported) makes it anew."
        )

    def read(self, first: int, count: int = 1) -> list[Frame]:
        """The frames of `count` consecutive samples, decompressed and checked.

        Raises:
            UserError: the shard does not hold them, or one is damaged.
        """
        entries = self.entries(first, count)
        if not count:
            return []
        begin, last = int(entries[0]["offset"]), entries[-1]
        data = memoryview(self._read(begin, int(last["offset"]) + int(last["compressed"]) - begin))
        found = []
        for sample, (at, size, raw, rows, _, checksum, digest) in enumerate(entries.tolist(), first):
            packed = data[at - begin : at - begin + size]
            found.append(Frame(sample, digest, rows, self._decompressed(packed, raw, checksum, sample)))
        return found

    def _decompressed(self, packed: memoryview, raw: int, checksum: int, sample: int) -> bytes:
        zstd = getattr(_local, "decompressor", None)
        if zstd is None:
            zstd = _local.decompressor = zstandard.ZstdDecompressor()
        try:
            if zstandard.frame_content_size(packed) != raw:  # it is allocated before anything is decompressed
                raise self.bad(f"sample {sample}: the frame has another size than the index says")
            data: bytes = zstd.decompress(packed, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self.bad(f"sample {sample}: cannot be decompressed ({error})") from None
        if len(data) != raw or xxhash.xxh3_64_intdigest(data) != checksum:
            raise self.bad(f"sample {sample}: the frame's checksum does not match")
        return data

    def entries(self, first: int, count: int) -> np.ndarray:
        """What the index says of consecutive samples (INDEX).

        Raises:
            UserError: the shard does not hold them.
        """
        place = first - self.header.start
        if not 0 <= place <= place + count <= len(self.index):
            raise self.bad(f"holds samples {self.header.start} to {self.header.end}, asked for {first}")
        return self.index[place : place + count]

    def parts(self, frames: list[Frame], most: int = MOST_SLOTS) -> Iterator[Planes]:
        """The same as `planes`, so many slots (rows · K) at a time.

        Raises:
            UserError: naming the first frame that is not one.
        """
        if sum(frame.rows for frame in frames) * self.codec.k <= most:
            yield self.planes(frames)
            return
        for frame in frames:
            try:
                for data, rows in self.codec.split(frame.data, frame.rows, most):
                    yield self.codec.decode([data], [rows])
            except ValueError as error:
                raise self.bad(f"sample {frame.sample}: {error}") from None

    def planes(self, frames: list[Frame]) -> Planes:
        """The rows of some of its frames, one after the other.

        Raises:
            UserError: naming the first frame that is not one.
        """
        try:
            return self.codec.decode([frame.data for frame in frames], [frame.rows for frame in frames])
        except ValueError:
            for frame in frames:
                try:
                    self.codec.decode([frame.data], [frame.rows])
                except ValueError as error:
                    raise self.bad(f"sample {frame.sample}: {error}") from None
            raise
