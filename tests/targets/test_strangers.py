"""Folders that a stranger made: what they claim costs neither memory nor time, and what is no file does not hang."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import xxhash
import zstandard
from helpers.commands import environment
from helpers.folders import FACTS, HEADER, HOW, IDENTITY, assert_read, forge

from ki_ds import sealed
from ki_ds.errors import UserError
from ki_ds.exchange.verify import verify
from ki_ds.targets import manifest as module
from ki_ds.targets.codec import Codec
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.manifest import TargetFacts, open_folder, seal_targets
from ki_ds.targets.shard import FOOTER, INDEX, MAGIC, FrameBlock, Shard, shard_name, write_shard

MOST = 400  # MiB: docs/targets.md


def bomb(folder, samples, slots, full):
    """A small folder whose samples have so many slots (rows · K), in rows that keep no id or K."""
    how = Codec(2000, 1024, 0.0, ())
    rows, count = slots // how.k, how.k if full else 0
    gaps = bytes([0] + [1] * (how.k - 1)) * rows if full else b""
    raw = bytes([count >> 8]) * rows + bytes([count & 255]) * rows + gaps + bytes(len(gaps)) + b"\1" * len(gaps)
    index = np.zeros(1, INDEX)
    frame = zstandard.ZstdCompressor().compress(raw)
    index[0] = (0, len(frame), len(raw), rows, 0, xxhash.xxh3_64_intdigest(raw), 7)
    block = FrameBlock([frame], index, rows * count, np.zeros(rows))
    sealed.prepare(folder, IDENTITY)
    header = FolderHeader(1 << 20, how)
    write_shard(folder / shard_name(0, samples), header, 0, [block] * samples)
    seal_targets(folder, IDENTITY, TargetFacts(samples, samples, header))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1 << 20
    return folder


CHILD = """
import sys
from pathlib import Path
import numpy as np
from ki_ds.errors import UserError
from ki_ds.exchange import inspection
from ki_ds.exchange.export import tables
from ki_ds.exchange.verify import verify
from ki_ds.targets.manifest import open_folder

def peak():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) >> 10  # of this program; ru_maxrss is that of its parent too

def check(entries):
    if entries["rows"].max() > 512:
        raise UserError("another input")

shards, found = open_folder(Path(sys.argv[1])), [peak()]
try:
    shards.read(np.arange(shards.samples), check)
except UserError as error:
    print(error)
found.append(peak())
inspection.statistics(shards)
inspection.rows(shards, 0, 4, None)
found.append(peak())
inspection.bench(shards, 0.01)
found.append(peak())
sum(len(part.ids_E) for part in tables(shards, None))
found.append(peak())
assert verify(shards, deep=True) == []
print(*found, peak())
"""


@pytest.mark.parametrize(("slots", "full"), [(1 << 25, False), (1 << 24, True)])
def test_rows_without_end_take_bounded_memory(tmp_path, slots, full):
    """Of a student, which knows how many rows its sequences have, and of the tools."""
    folder = bomb(tmp_path / "bomb", 1, slots, full)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, folder], env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    said, peaks = done.stdout.splitlines()
    before, student, *tools = map(int, peaks.split())
    assert said == "another input"
    assert student - before < 16 and max(tools) - before < MOST, peaks


def test_manifest_that_claims_shards_without_end(finished):
    forge(finished, facts={**FACTS, "samples": 1 << 24, "samples_per_shard": 1})
    began = time.perf_counter()
    with pytest.raises(UserError, match="16777216 shards for so many samples, of which 3 files are listed"):
        open_folder(finished)
    assert time.perf_counter() - began < 1


def test_manifest_too_large_to_be_one_is_not_read(finished, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_MANIFEST", 1000)
    with pytest.raises(UserError, match=r"manifest\.json: has \d+ bytes; expected at most 1000"):
        open_folder(finished)


def test_sparse_file_that_claims_an_index_without_end(finished):
    path = finished / open_folder(finished).name(0)
    data = path.read_bytes()
    count = 1 << 34  # 640 GB of entries
    with path.open("r+b") as file:
        file.truncate(len(data) + count * INDEX.itemsize)
        file.seek(0, os.SEEK_END)
        file.write(FOOTER.pack(len(data), count, 0, MAGIC))
    with pytest.raises(UserError, match=r"has 17179869184 samples; a shard holds at most 1048576"):
        Shard(path)


def pipe(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, listening, device])
def test_what_is_no_file_is_refused(finished, make, monkeypatch):
    """In the place of a shard, also once that has been opened; and of the manifest."""
    monkeypatch.chdir(finished)  # a socket's path is short
    shards = open_folder(finished)
    assert_read(shards, [0, 9])
    for number in (1, 2):
        (finished / shards.name(number)).unlink()
        make((finished / shards.name(number)).relative_to(finished))
    with pytest.raises(UserError, match=f"{shards.name(1)}: cannot be read .*not a file"):
        shards.read(np.array([5]))
    with pytest.raises(UserError, match=f"{shards.name(2)}: "):
        shards.read(np.array([9]))
    assert {fault.shard for fault in verify(open_folder(finished))} == {1, 2}
    (finished / sealed.MANIFEST).unlink()
    make((finished / sealed.MANIFEST).relative_to(finished))
    for read in (open_folder, sealed.open_sealed, sealed.state):
        with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
            read(*([finished, IDENTITY] if read is sealed.state else [finished]))


def test_split_frames_are_the_frame():
    """Rows of a frame, some at a time, are those of the whole."""
    from helpers.folders import sample

    planes = sample(3, rows=11)[0]
    (parts,) = HOW.encode(planes, np.array([11]))
    frame = b"".join(parts)
    found = [HOW.decode([data], [rows]) for data, rows in HOW.split(frame, 11, 3 * HOW.k)]
    assert [len(part) for part in found] == [3, 3, 3, 2]
    for name in ("ids_nK", "values_nK", "count_n"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in found]), getattr(planes, name))
    with pytest.raises(ValueError, match="do not sum"):
        next(HOW.split(frame[:-3], 11, 12))
    assert HEADER.codec == HOW
