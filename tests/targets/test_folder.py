"""Folders of shards: random access without open files, writing that survives kills and a full disk, manifests."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ki_ds import sealed
from ki_ds.errors import UserError
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.sealed import Identity
from ki_ds.targets import codec
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.manifest import TargetFacts, open_folder, read_facts
from ki_ds.targets.shard import Shard, pack_block, shard_name, write_shard
from ki_ds.targets.source import Source, join, names, place

HOW = Codec(300, 4, 1 / 16)
HEADER = FolderHeader(16, HOW)
IDENTITY = Identity("teach", {"k": 4}, {"corpora/a": "0" * 32})
FACTS = {"samples": 10, "samples_per_shard": 4, "header": HEADER.record}


def sample(number, how=HOW, rows=None):
    """(planes, input digest): recognisable targets of a sample, some without a row."""
    rng = np.random.default_rng(number)
    rows = int(rng.integers(0, 5)) if rows is None else rows
    logp = -rng.exponential(2, (rows, how.k)).astype(np.float32)
    ids = np.stack([rng.choice(how.vocabulary, how.k, replace=False) for _ in range(rows + 1)])[:rows]
    planes, _ = pack_arrays(how, ids, logp, dict.fromkeys(how.scalars, logp.max(axis=1)))
    return planes, int(rng.integers(0, 2**64, dtype=np.uint64))


def write(path, start, end, how=HOW, rows=None):
    """A shard of recognisable samples."""
    found = [sample(number, how, rows) for number in range(start, end)]
    planes = codec.concatenate([how.empty(0), *(planes for planes, _ in found)])
    ends = np.cumsum([len(planes) for planes, _ in found], dtype=int)
    digests = np.array([digest for _, digest in found], np.uint64)
    write_shard(path, FolderHeader(16, how), start, [pack_block(how, planes, ends, digests, np.zeros(len(planes)))])


def fill(folder, samples=10, per_shard=4):
    """Write the shards that are missing."""
    shards = ShardFolder(folder, samples, per_shard)
    for number in shards.missing():
        start = number * per_shard
        write(folder / shards.name(number), start, min(start + per_shard, samples))


@pytest.fixture
def folder(tmp_path):
    """Ten samples, four a shard: the last shard is shorter."""
    fill(tmp_path)
    return tmp_path


def assert_read(shards, samples):
    """The folder gives what was written there."""
    found, expected = shards.read(np.array(samples)), [sample(number) for number in samples]
    assert found.digests == [digest for _, digest in expected]
    assert found.rows == [len(planes) for planes, _ in expected]
    planes = codec.concatenate([planes for planes, _ in expected])
    for name in ("ids_nK", "values_nK", "count_n", "scalars_Sn"):
        np.testing.assert_array_equal(getattr(found.planes, name), getattr(planes, name))


def open_files(under):
    """Descriptors of this process that lie in a folder."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [path for path in found if path.startswith(str(under))]


# ----------------------------------------------------------------------------------------------------- read


@pytest.mark.parametrize("keep", [1, 128])
@pytest.mark.parametrize(
    "samples",
    [[9], [0, 1, 2, 3], [*range(10)], [*range(9, -1, -1)], [9, 0, 3, 4, 8, 7, 0, 9], [5, 5, 5], [3, 4], [8, 9, 0, 1]],
)
def test_samples_in_any_order(folder, samples, keep):
    assert_read(ShardFolder(folder, 10, 4, keep=keep), samples)


def test_every_order_gives_what_was_written(folder):
    shards, rng = ShardFolder(folder, 10, 4, HEADER, keep=2), np.random.default_rng(0)
    for _ in range(50):
        assert_read(shards, rng.integers(0, 10, rng.integers(1, 30)).tolist())


def test_threads_may_share_a_folder(folder):
    """Each evicts the others' shards."""
    shards = ShardFolder(folder, 10, 4, keep=1)
    orders = [np.random.default_rng(seed).permutation(10).tolist() for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda order: assert_read(shards, order), orders))
    assert len(shards.shards) == 1


@pytest.fixture
def reads(monkeypatch):
    """(file name, start, length) of every ranged read."""
    seen, real = [], Source.read

    def counted(self, start, length):
        seen.append((os.path.basename(self.place), start, length))
        return real(self, start, length)

    monkeypatch.setattr(Source, "read", counted)
    return seen


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([0, 1, 2, 3], 1), ([1, 2], 1), ([*range(10)], 3), ([3, 4], 2), ([2, 1], 2), ([1, 1], 2), ([0, 2], 2), ([7], 1)],
)
def test_neighbours_are_read_at_once(folder, reads, samples, expected):
    shards = ShardFolder(folder, 10, 4)
    shards.read(np.arange(10))
    reads.clear()
    shards.read(np.array(samples))
    assert len(reads) == expected
    for name, start, length in reads:  # no byte more than the frames
        index = next(shard.index for shard in shards.shards.values() if shard.place.name == name)
        assert start in index["offset"] and start + length in index["offset"] + index["compressed"]


def test_small_shard_is_opened_by_two_reads(folder, reads):
    ShardFolder(folder, 10, 4).shard(1)
    assert len(reads) == 2


def test_few_indices_are_kept_and_not_read_twice(folder, monkeypatch):
    opened, real = [], Shard.__init__

    def counted(self, path):
        opened.append(path.name)
        real(self, path)

    monkeypatch.setattr(Shard, "__init__", counted)
    shards = ShardFolder(folder, 10, 4, keep=2)
    for number in (0, 1, 4, 0, 5, 8):
        shards.read(np.array([number]))
        assert len(shards.shards) <= 2
    assert opened == [shards.name(0), shards.name(1), shards.name(2)]
    shards.read(np.array([6]))  # used last before 8: still there
    assert len(opened) == 3
    shards.read(np.array([0]))
    assert opened[3:] == [shards.name(0)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are looked up in /proc")
def test_no_file_stays_open(folder):
    with (folder / shard_name(0, 4)).open():
        assert len(open_files(folder)) == 1  # the look-up itself sees open files
    shards = ShardFolder(folder, 10, 4)
    shards.read(np.arange(9, -1, -1))
    shards.missing()
    assert open_files(folder) == []
    (folder / shard_name(4, 8)).write_bytes(b"damaged")
    with pytest.raises(UserError):
        ShardFolder(folder, 10, 4).read(np.array([5]))
    assert open_files(folder) == []


@pytest.mark.parametrize("number", [10, 11, 4000, -1])
def test_sample_beyond_the_folder(folder, number):
    with pytest.raises(UserError, match=rf"holds samples 0 to 10, asked for {number}\. Run `ki-ds teach`"):
        ShardFolder(folder, 10, 4).read(np.array([0, number]))


def test_no_sample_at_all(folder):
    with pytest.raises(ValueError, match="no sample"):
        ShardFolder(folder, 10, 4).read(np.zeros(0, int))


def test_missing_shard_is_named(folder):
    (folder / shard_name(4, 8)).unlink()
    shards = ShardFolder(folder, 10, 4)
    assert_read(shards, [0, 9])
    with pytest.raises(UserError, match=r"targets-000000004-000000008\.kit: is missing\. Run `ki-ds teach`"):
        shards.read(np.array([0, 5, 9]))


def test_damaged_frame_does_not_touch_the_others(folder):
    path = folder / shard_name(4, 8)
    opened, data = Shard(path), bytearray(path.read_bytes())
    data[int(opened.index[1]["offset"]) + 8] ^= 1
    path.write_bytes(data)
    shards = ShardFolder(folder, 10, 4)
    assert_read(shards, [4, 6, 7])
    with pytest.raises(UserError, match=r"targets-000000004-000000008\.kit: sample 5: "):
        shards.read(np.array([4, 5, 6]))


def test_shard_renamed_to_another_range_is_refused(folder):
    (folder / shard_name(0, 4)).replace(folder / shard_name(4, 8))
    with pytest.raises(UserError, match="its header gives start = 0, expected 4"):
        ShardFolder(folder, 10, 4).read(np.array([5]))


def test_shard_of_a_shorter_folder_is_refused(folder):
    (folder / shard_name(8, 10)).replace(folder / shard_name(8, 11))
    with pytest.raises(UserError, match="its header gives end = 10, expected 11"):
        ShardFolder(folder, 11, 4).read(np.array([8]))


def test_shard_packed_in_another_way_is_refused(folder):
    write(folder / shard_name(4, 8), 4, 8, Codec(300, 4, 1 / 8))
    shards = ShardFolder(folder, 10, 4, HEADER)
    assert_read(shards, [0])
    with pytest.raises(UserError, match=r"targets-000000004-.* its header gives codec = .*0\.125.*expected .*0\.0625"):
        shards.read(np.array([5]))


def test_names_sort_by_sample_and_the_last_shard_ends_early(folder):
    shards = ShardFolder(folder, 10, 4)
    assert len(shards) == 3
    expected = [shards.name(number) for number in range(3)]
    assert expected == [
        "targets-000000000-000000004.kit",
        "targets-000000004-000000008.kit",
        "targets-000000008-000000010.kit",
    ]
    assert expected == sorted(path.name for path in folder.iterdir())


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


# --------------------------------------------------------------------------------------------------- source


def test_ranges_of_a_local_file(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    source = Source(tmp_path / "file")
    assert source.size() == 100
    for start, length in ((0, 100), (0, 0), (99, 1), (90, 50), (100, 5), (1000, 5), (7, 20)):
        assert source.read(start, length) == bytes(range(100))[start : start + length]


def test_reads_that_the_system_cuts_are_continued(tmp_path, monkeypatch):
    """A read of more than 2 GiB, or one that a signal interrupts, returns less than was asked for."""
    (tmp_path / "file").write_bytes(bytes(range(100)))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, length, start: real(handle, min(length, 7), start))
    assert Source(tmp_path / "file").read(3, 500) == bytes(range(3, 100))


def test_places_are_paths_or_urls(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert place(str(tmp_path)) == tmp_path
    assert join(tmp_path, "a") == tmp_path / "a"
    assert join(place("s3://bucket/folder/"), "a") == "s3://bucket/folder/a"
    assert names(tmp_path) == {"a"} and names(tmp_path / "absent") == set() and names(tmp_path / "a") == set()


# ------------------------------------------------------------------------------------------------ manifests


@pytest.fixture
def finished(tmp_path):
    """A sealed folder."""
    sealed.prepare(tmp_path / "made", IDENTITY)
    fill(tmp_path / "made")
    sealed.seal(tmp_path / "made", IDENTITY, FACTS)
    return tmp_path / "made"


def test_sealed_folder_is_opened_by_its_manifest(finished):
    facts, manifest = read_facts(finished)
    assert (
        facts == TargetFacts(10, 4, HEADER)
        and facts.record == FACTS
        and manifest["fingerprint"] == IDENTITY.fingerprint
    )
    shards = open_folder(finished)
    assert shards.codec == HOW
    assert_read(shards, [9, 0, 5])


def test_manifest_binds_the_shards(finished):
    write(finished / shard_name(4, 8), 4, 8, Codec(300, 4, 1 / 8))
    with pytest.raises(UserError, match="its header gives codec"):
        open_folder(finished).read(np.array([5]))


def test_folder_without_a_manifest(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"there is no manifest\.json: not a finished targets folder"):
            open_folder(path)


def test_folder_that_is_not_finished(tmp_path):
    sealed.prepare(tmp_path / "made", IDENTITY)
    fill(tmp_path / "made")
    with pytest.raises(UserError, match="not a finished targets folder; `ki-ds teach` makes and finishes one"):
        open_folder(tmp_path / "made")


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("targets-000000000-000000008.kit", True), ("targets-000000016-000000020.kit", True),
        ("targets-000000024-000000032.kit", True),  # of a longer run
        ("targets-000000016-000000019.kit", False), ("targets-000000004-000000012.kit", False),
        ("targets-000000024-000000030.kit", False), ("notes.kit", False), ("targets-000000008-000000000.kit", False),
    ],
)  # fmt: skip
def test_which_files_are_shards_of_a_folder(tmp_path, name, fits):
    assert ShardFolder(tmp_path, 20, 8).fits(name) == fits


def test_manifest_that_cannot_be_read(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        open_folder(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        open_folder(tmp_path / "file")


def test_manifest_of_another_stage(finished):
    change(finished, stage="train")
    with pytest.raises(UserError, match=r'not the manifest of a targets folder \(stage "train"\)'):
        open_folder(finished)


def change(folder, **keys):
    """Put other values into a manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe\0", b"[]", b"3", b"null", b'"teach"', b"{}", b"[" * 100_000, b'{"stage": "teach"}']
)
def test_manifest_that_is_garbage(finished, text):
    (finished / "manifest.json").write_bytes(text)
    with pytest.raises(UserError, match=r"manifest\.json: (cannot be read|not a manifest)"):
        open_folder(finished)


def test_manifest_of_another_schema(finished):
    change(finished, schema=9)
    with pytest.raises(UserError, match="schema 9, but this version of ki_ds reads 1"):
        open_folder(finished)


@pytest.mark.parametrize("facts", [[], None, "samples", {}, {"samples": 10, "samples_per_shard": 4}])
def test_manifest_without_its_facts(finished, facts):
    change(finished, facts=facts)
    with pytest.raises(UserError, match=r"manifest\.json: not "):
        open_folder(finished)


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": "10"},
        {"samples": -1},
        {"samples": True},
        {"samples_per_shard": 0},
        {"samples_per_shard": 4.0},
        {"header": []},
        {"header": {}},
        {"header": {"codec": {"k": 3}}},
    ],
)
def test_manifest_whose_facts_are_of_the_wrong_kind(finished, wrong):
    change(finished, facts={**FACTS, **wrong})
    with pytest.raises(UserError, match=r"manifest\.json: not the manifest of a targets folder"):
        open_folder(finished)


# ---------------------------------------------------------------------------------------- kills, a full disk

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
    sealed.seal(folder, IDENTITY, FACTS)
    assert_read(open_folder(folder), [*range(10)])
