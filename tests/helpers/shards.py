"""Shards of recognisable samples, and bytes of shards built by hand."""

import json
import tracemalloc

import numpy as np
import pytest
import xxhash
import zstandard

from ki_ds.errors import UserError
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets import shard
from ki_ds.targets.codec import Codec
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.shard import FOOTER, INDEX, MAGIC, PREFIX, Shard, pack_block, write_shard

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


# FORMAT.md's example
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
