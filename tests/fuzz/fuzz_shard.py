#!/usr/bin/env python3
"""Coverage-guided fuzzing of the shard reader: any bytes give what they say or a UserError, in bounded memory.

By hand, not in the tests: `pip install atheris` (no extra of ki_ds has it), then

    python tests/fuzz/fuzz_shard.py [a folder for new inputs] tests/fuzz/corpus -max_total_time=600

and `… -merge=1 EMPTY FOLDER tests/fuzz/corpus` keeps in EMPTY what is worth it (it runs this file, with the `python3`
of PATH). When a frame's layout changes, run it anew: older inputs are then refused early.
tests/targets/test_fuzz_corpus.py replays the kept inputs without atheris.

An input that begins with `S` is a recipe: build() puts right checksums, offsets and sums around its parts, which
otherwise would keep the fuzzer out. Behind any other first byte the rest is the file as it is.
"""

import json
import os
import re
import struct
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import xxhash
import zstandard

CORPUS = Path(__file__).parent / "corpus"
FIELDS = struct.Struct("<HBBQ")  # of a recipe's frame: rows; how; a field of the index entry, a value for it
SLOTS = 1 << 18  # planes of samples above this are not asked for: they may take as much as their index entry says


def recipe(flags, header, frames):
    """An input: flags 1, 2: the sums of the header, its samples are put right; 4, 8: a cut end, a wrong footer.

    Args:
        frames: (FIELDS as bytes, data); `how` 1: data is already compressed, 2: the index entry's field is overridden.
    """
    chunks = [header, *(part for frame in frames for part in frame)]
    return b"S" + bytes([flags]) + b"".join(struct.pack("<H", len(chunk)) + chunk for chunk in chunks)


def parse(data):
    """The arguments of `recipe`; what is cut is as short as it is."""
    chunks, at = [], 2
    while at < len(data):
        size = int.from_bytes(data[at : at + 2], "little")
        chunks.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    header, rest = (chunks[0] if chunks else b""), chunks[1:]
    return data[1] if len(data) > 1 else 0, header, list(zip(rest[::2], rest[1::2], strict=False))


def build(flags, header, frames):
    """Bytes of a shard with right checksums around what a recipe says."""
    from ki_ds.targets import shard
    from ki_ds.targets.codec import Codec

    index = np.zeros(len(frames), shard.INDEX)
    said_of = [FIELDS.unpack(fields[: FIELDS.size].ljust(FIELDS.size, b"\0")) for fields, _ in frames]
    packed = []
    for entry, (rows, how, _, _), (_, data) in zip(index, said_of, frames, strict=True):
        size, raw = len(data), data
        if how & 1:
            try:
                size, raw = zstandard.frame_content_size(data), b""
                raw = zstandard.ZstdDecompressor().decompress(data) if 0 <= size <= 1 << 20 else b""
            except zstandard.ZstdError:
                pass
        packed.append(data if how & 1 else zstandard.ZstdCompressor(level=1).compress(data))
        entry["compressed"], entry["raw"], entry["rows"] = len(packed[-1]), size & 0xFFFFFFFF, rows
        entry["checksum"], entry["digest"] = xxhash.xxh3_64_intdigest(raw), rows
    try:
        said = json.loads(header) if flags & 3 else None
        if isinstance(said, dict):
            if flags & 2:
                said["end"] = said["start"] + len(frames)
            if flags & 1:
                how = Codec.read(said["codec"])
                rows, raw = int(index["rows"].sum()), int(index["raw"].astype(np.int64).sum())
                said |= {"rows": rows, "entries": (raw - how.frame_bytes(rows, 0)) // how.frame_bytes(0, 1)}
            header = json.dumps(said, separators=(",", ":")).encode()
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    begin = shard.PREFIX.size + len(header)
    sizes = index["compressed"].astype(np.uint64)
    index["offset"] = begin + np.cumsum(sizes) - sizes
    for entry, (_, how, place, value) in zip(index, said_of, strict=True):
        if how & 2 and place < len(shard.INDEX.names):
            name = shard.INDEX.names[place]
            entry[name] = value & (1 << 8 * shard.INDEX[name].itemsize) - 1
    table, at = index.tobytes(), begin + sum(map(len, packed))
    footer = shard.FOOTER.pack(at, len(index) + (flags >> 3 & 1), xxhash.xxh3_64_intdigest(table), shard.MAGIC)
    prefix = shard.PREFIX.pack(shard.MAGIC, shard.VERSION, len(header), xxhash.xxh3_64_intdigest(header))
    whole = b"".join([prefix, header, *packed, table, footer])
    return whole[: -(flags >> 4) - 1] if flags & 4 else whole


def check(data, path):
    """Read an input to the end, by way of the file `path`; the UserError's message where it is refused.

    Raises:
        AssertionError: what was read breaks a promise of the format, or took too much memory.
        Exception: any other than UserError is a bug.
    """
    data = build(*parse(data)) if data[:1] == b"S" else data[1:]
    with open(path, "wb") as file:
        file.write(data)
    tracemalloc.start()
    try:
        found, slots = _read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Measured at most 34 a byte of the file (a header of nested empty objects) and 31 a slot, an entry that K allows, a
    # scalar or a count (22 of them to decode, the rest in _promises). 2 MiB: the ends of the file that are read at once
    # and what modules keep when they are first used.
    bound = (2 << 20) + 48 * len(data) + 48 * slots
    assert peak <= bound, f"{peak} bytes were allocated for a file of {len(data)}, at most {bound} were expected"
    return found


def _read(path):
    """(the message or "", slots that were asked for)"""
    from ki_ds.errors import UserError
    from ki_ds.targets.shard import Shard

    slots = 0
    try:
        shard = Shard(path)
        per_row = shard.codec.k + len(shard.codec.scalars) + 1
        frames = []
        for sample, rows in enumerate(shard.index["rows"].tolist(), shard.header.start):
            if slots + rows * per_row <= SLOTS:
                slots += rows * per_row
                frames += shard.read(sample)
        if frames:
            _promises(shard, frames)
        if len(frames) == len(shard.index):
            assert shard.read(shard.header.start, len(frames)) == frames, "read at once they differ"
    except UserError as error:
        message = str(error)
        assert message.startswith(str(path)), f"the message does not begin with the file: {message[:300]}"
        assert "\n" not in message and len(message) < len(str(path)) + 800, f"{len(message)} letters: {message[:900]}"
        return re.sub(r"\d+", "#", message[len(str(path)) :]), slots
    return "", slots


def _promises(shard, frames):
    """What holds for planes that were not refused: the codec's limits, and that they can be written again."""
    how = shard.codec
    planes = shard.planes(frames)
    ids, kept = planes.ids(), planes.kept()
    assert len(planes) == sum(frame.rows for frame in frames) and ids.shape == (len(planes), how.k)
    assert int(planes.count_n.max(initial=0)) <= how.k and planes.scalars_Sn.shape == (len(how.scalars), len(planes))
    assert ids.max(initial=0) < how.vocabulary and not ids[~kept].any() and not planes.values_nK[~kept].any()
    assert (ids[:, 1:] > ids[:, :-1])[kept[:, 1:]].all(), "ids do not rise"
    if not how.counts:
        assert (planes.values_nK.min(axis=1, where=kept, initial=255)[planes.count_n > 0] == 0).all()
    ends = np.cumsum([frame.rows for frame in frames])
    again = [b"".join(parts) for parts in how.encode(planes, ends)]
    assert list(map(len, again)) == [len(frame.data) for frame in frames], "written again it has another length"
    second = how.decode(again, [frame.rows for frame in frames])
    for name in ("ids_nK", "high_nK", "values_nK", "count_n", "scalars_Sn"):
        assert np.array_equal(getattr(planes, name), getattr(second, name)), f"{name} changes when it is written again"


def seeds():
    """Inputs that are valid: small shards of several codecs, as recipes and as files."""
    from ki_ds.kernels.select.pack import pack_arrays
    from ki_ds.targets import shard
    from ki_ds.targets.codec import Codec
    from ki_ds.targets.header import FolderHeader

    hows = [Codec(300, 3, 1 / 16), Codec(70_000, 4, 1 / 4, scalars=("first", "truth", 1.0, 2.0))]
    hows += [
        Codec(65_536, 2, 0.0, ()),
        Codec(5, 5, 1.0, scalars=("truth", "first")),
        Codec(1 << 24, 1, 1 / 1024),
    ]
    rng = np.random.default_rng(0)
    for how in hows:
        blocks, frames = [], []
        for rows in (2, 0, 3):
            ids = np.stack(
                [rng.permutation(min(how.vocabulary, 1 << 16))[: how.k] for _ in range(rows)] or [[0] * how.k]
            )
            ids = ids[:rows].astype(np.int64) * (how.vocabulary // min(how.vocabulary, 1 << 16))
            given = rng.integers(0, 4, ids.shape) if how.counts else np.log(rng.dirichlet(np.ones(how.k), rows))
            if how.k > 2 and rows:
                given[0, 1] = 0 if how.counts else -np.inf
            planes, distortion = pack_arrays(how, ids, given, {name: -rng.exponential(3, rows) for name in how.scalars})
            blocks.append(shard.pack_block(how, planes, np.array([rows]), np.zeros(1, np.uint64), distortion))
            frames.append((FIELDS.pack(rows, 0, 0, 0), b"".join(how.encode(planes, np.array([rows]))[0])))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            said = shard.write_shard(path, FolderHeader(8, how), 4, blocks).record
            yield b"P" + path.read_bytes()
        text = json.dumps(said, separators=(",", ":")).encode()
        yield recipe(3, text, frames)
        packed = [zstandard.ZstdCompressor(level=1).compress(data) for _, data in frames]
        yield recipe(3, text, [(FIELDS.pack(len(d) and 2, 1, 0, 0), d) for d in packed[:1]])


def _mutate(mutate):
    def custom(data, max_size, seed):
        rng = np.random.default_rng(seed)
        if data[:1] != b"S" or rng.random() < 0.1:
            return mutate(data, max_size)
        flags, header, frames = parse(data)
        choice = rng.random()
        if choice < 0.08:
            flags = int(rng.integers(256)) if choice < 0.02 else int(rng.integers(4))
        elif choice < 0.4 or not frames:
            header = _header(rng, header, mutate)
        elif choice < 0.5:
            place = int(rng.integers(len(frames)))
            frames = frames[:place] + ([] if choice < 0.44 else [frames[place]] * 2) + frames[place + 1 :]
        else:
            place = int(rng.integers(len(frames)))
            fields, raw = frames[place]
            if choice < 0.65:
                rows, how, which, value = FIELDS.unpack(fields[: FIELDS.size].ljust(FIELDS.size, b"\0"))
                value = (1 << int(rng.integers(65))) - int(rng.integers(2)) & (1 << 64) - 1
                now = [
                    (rows + int(rng.integers(-2, 3))) % 65536,
                    how ^ int(rng.integers(4)),
                    int(rng.integers(6)),
                    value,
                ]
                fields = FIELDS.pack(
                    *(b if rng.random() < 0.5 else a for a, b in zip((rows, how, which, value), now, strict=True))
                )
            else:
                raw = mutate(raw, len(raw) + int(rng.integers(9)) * 2 + 2)
            frames = [*frames[:place], (fields, raw), *frames[place + 1 :]]
        return recipe(flags, header, frames)[:max_size]

    return custom


def _header(rng, header, mutate):
    """Bytes of the JSON, or a value of it, changed."""
    try:
        said = json.loads(header)
        if rng.random() < 0.2 or not isinstance(said, dict):
            return mutate(header, len(header) + 32)
        inside = said if rng.random() < 0.4 or not isinstance(said.get("codec"), dict) else said["codec"]
        names = [*inside, "start", "codec"]
        odd = [
            0,
            1,
            2,
            3,
            255,
            256,
            1024,
            65536,
            65537,
            1 << 24,
            1 << 31,
            1 << 62,
            -1,
            10**400,
            0.5,
            1e-300,
            1e400,
            None,
        ]
        odd += [
            True,
            "",
            "first",
            "count",
            "log-probability",
            "a\nb" * 99,
            [],
            ["first"],
            [1.0] * 65,
            {},
            [[]] * 99,
        ]
        name = names[int(rng.integers(len(names)))]
        if rng.random() < 0.05:
            inside.pop(name, None)
        elif isinstance(inside.get(name), int) and rng.random() < 0.4:
            inside[name] += int(rng.integers(-2, 3))
        else:
            inside[name] = odd[int(rng.integers(len(odd)))]
        return json.dumps(said, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return mutate(header, len(header) + 32)


def main():
    import atheris

    with atheris.instrument_imports(include=["ki_ds.targets"]):
        import ki_ds.targets.codec
        import ki_ds.targets.folder
        import ki_ds.targets.shard
        import ki_ds.targets.source  # noqa: F401
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        path = Path(folder) / "fuzzed.kit"
        begin = Path(folder) / "seeds"
        begin.mkdir()
        for number, data in enumerate(seeds()):
            check(data, path)
            (begin / str(number)).write_bytes(data)
        arguments = [*sys.argv, str(begin)]
        custom = _mutate(lambda data, size: atheris.Mutate(data, size))  # Setup replaces atheris.Mutate
        atheris.Setup(
            [*arguments, "-timeout=20", "-rss_limit_mb=2048", "-max_len=8192"], lambda data: check(data, path) and None,
            custom_mutator=custom,
        )  # fmt: skip
        atheris.Fuzz()


if __name__ == "__main__":
    main()
