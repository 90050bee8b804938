"""Writing survives kills at any instant and a full disk."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.folders import FACTS, IDENTITY, assert_read, fill, write

from ki_ds import sealed
from ki_ds.errors import UserError
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.manifest import TargetFacts, open_folder, seal_targets
from ki_ds.targets.shard import Shard, shard_name

WRITER = """
import importlib.metadata, os, sys
import numpy as np
from pathlib import Path
from ki_ds.sealed import Identity, prepare
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.manifest import TargetFacts, seal_targets
from ki_ds.targets.shard import pack_block, write_shard

HOW, SAMPLES, PER_SHARD, ROWS = Codec(70_000, 40, 1 / 16), 90, 8, 200
IDENTITY = Identity("teach", {"k": 40}, {})

def block(start, end):
    rng, n = np.random.default_rng(start), (end - start) * ROWS
    ids = np.sort(rng.integers(0, 65_000, (n, 40)), axis=1) + np.arange(40)
    values = np.minimum(16 * rng.exponential(3, (n, 40)), 255).astype(np.uint8)
    values -= values.min(axis=1, keepdims=True)
    scalars = np.zeros((len(HOW.scalars), n), np.int16)
    planes = Planes(ids.astype(np.uint16), (ids >> 16).astype(np.uint8), values, np.full(n, 40, np.uint16), scalars)
    digests = np.arange(start, end, dtype=np.uint64)
    return pack_block(HOW, planes, np.arange(ROWS, n + 1, ROWS), digests, np.zeros(n))

BLOCKS = [block(start, min(start + PER_SHARD, SAMPLES)) for start in range(0, SAMPLES, PER_SHARD)]

def fill(folder):
    if prepare(folder, IDENTITY):
        return
    shards, header = ShardFolder(folder, SAMPLES, PER_SHARD), FolderHeader(512, HOW)
    for number in shards.missing():
        write_shard(folder / shards.name(number), header, number * PER_SHARD, [BLOCKS[number]])
    seal_targets(folder, IDENTITY, TargetFacts(SAMPLES, PER_SHARD, header))

assert "torch" not in sys.modules
for line in sys.stdin:  # each run is a process of its own, but python starts only once
    child = os.fork()
    if child == 0:
        fill(Path(line.strip()))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_kill_at_any_instant_loses_nothing(tmp_path):
    """Fifty kills: what is there under its own name is whole, and the end is the same as without them.

    Every second one or so comes within a millisecond from when a temporary file is seen.
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def run(folder, seconds=None, half=False):
        """Whether a run was killed: after some seconds, `half` from when a file is being written on; or may end."""
        writer.stdin.write(f"{folder}\n")
        child = int(writer.stdout.readline())
        if seconds is not None:
            with contextlib.suppress(ProcessLookupError):
                while half and not any(folder.glob("*.kit.*")):
                    os.kill(child, 0)  # is it still there?
                time.sleep(seconds)
                os.kill(child, signal.SIGKILL)
        status = int(writer.stdout.readline())
        assert status in (0, signal.SIGKILL)
        return status != 0

    def check(folder):
        """Every shard that is there, read as a whole."""
        for path in folder.glob("*.kit"):
            opened = Shard(path)
            frames = opened.read(opened.header.start, len(opened.index))
            assert len(opened.planes(frames)) == 200 * len(frames)

    try:
        run(tmp_path / "first")  # when it returns, python has started
        begin = time.monotonic()
        run(tmp_path / "whole")
        longest, rng = time.monotonic() - begin, random.Random(0)
        expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
        assert len(expected) == 13
        killed, halves = 0, 0
        while killed < 50:
            folder = tmp_path / str(killed)
            while run(
                folder, *((rng.uniform(0, longest / 2),) if rng.random() < 0.5 else (rng.uniform(0, 1e-3), True))
            ):
                killed += 1
                halves += any(folder.glob("*.tmp"))
                check(folder)
                assert (folder / "manifest.json").exists() <= (len([*folder.glob("*.kit")]) == 12)
            (folder / "unsealed.json").unlink(missing_ok=True)  # killed between the manifest and its removal
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
            assert_sealed(folder)
            shutil.rmtree(folder)
        assert halves  # else no kill came while a file was written, and this test shows nothing
    finally:
        writer.stdin.close()
        writer.wait(30)
        writer.stdout.close()


def assert_sealed(folder):
    sealed.open_sealed(folder)
    shards = open_folder(folder)
    assert shards.missing() == []
    assert shards.read(np.arange(shards.samples)).digests == list(range(shards.samples))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system may not be mounted here (needs root)")
    yield path
    if subprocess.run(["umount", str(path)], capture_output=True).returncode:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_disk_leaves_no_half_file_and_writing_continues(small_disk):
    folder, how = small_disk / "made", Codec(300, 100, 1 / 16)
    sealed.prepare(folder, IDENTITY)
    (small_disk / "other").write_bytes(bytes(150_000))
    written = []

    def write_all():
        for start in range(0, 100, 10):
            write(folder / shard_name(start, start + 10), start, start + 10, how, rows=15)
            written.append(shard_name(start, start + 10))

    with pytest.raises(UserError, match=r"kit: cannot be written: No space left on device\. Free some space") as error:
        write_all()
    failed = 10 * len(written)
    assert str(error.value).startswith(f"{folder / shard_name(failed, failed + 10)}: ")
    assert written and {path.name for path in folder.iterdir()} == {*written, "unsealed.json"}
    assert ShardFolder(folder, failed, 10).read(np.arange(failed)).rows == [15] * failed
    (small_disk / "other").unlink()
    write(folder / shard_name(failed, failed + 10), failed, failed + 10, how, rows=15)
    assert ShardFolder(folder, failed + 10, 10).read(np.arange(failed + 10)).rows == [15] * (failed + 10)


def test_disk_that_is_full_to_the_last_byte(small_disk):
    """Not even the first byte of a folder's files finds room."""
    folder = small_disk / "made"
    sealed.prepare(folder, IDENTITY)
    with contextlib.suppress(OSError), (small_disk / "other").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with pytest.raises(UserError, match="Free some space"):
        write(folder / shard_name(0, 4), 0, 4)
    with pytest.raises(UserError, match=r"manifest\.json: cannot be written.*Free some space"):
        sealed.seal(folder, IDENTITY, FACTS)
    assert [path.name for path in folder.iterdir()] == ["unsealed.json"]
    (small_disk / "other").unlink()
    fill(folder)
    seal_targets(folder, IDENTITY, TargetFacts.read(FACTS))
    assert_read(open_folder(folder), [*range(10)])
