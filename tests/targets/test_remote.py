"""Targets behind URLs: what they say is what the local folder says, read in ranges.

The S3 server is moto's, a process on loopback with an empty account; nothing leaves the machine.
"""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.folders import forge
from helpers.servers import BUCKET, PER_SHARD, S3, SAMPLES, Plain, make, refused, same

from ki_ds import sealed
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.manifest import open_folder, read_facts
from ki_ds.targets.shard import HEAD, TAIL, Shard, shard_name
from ki_ds.targets.source import join, names

ORDERS = {
    "sequential": list(range(SAMPLES)),
    "random": np.random.default_rng(1).permutation(SAMPLES).tolist(),
    "repeated": [7, 7, 8, 21, 0, 7, 21, 21, 3],
    "one": [13],
}


@pytest.mark.parametrize("order", ORDERS)
def test_remote_targets_are_those_of_the_local_folder(local, upload, order):
    there = upload(local)
    same(open_folder(there.url).read(np.array(ORDERS[order])), open_folder(local).read(np.array(ORDERS[order])))
    assert read_facts(there.url) == read_facts(local)


def test_slash_at_the_end_of_a_url_changes_nothing(local, upload):
    same(open_folder(upload(local).url + "/").read(np.arange(3)), open_folder(local).read(np.arange(3)))


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    many = TAIL // 40 + 100
    note = "n" * (HEAD + 1000)
    return make(tmp_path_factory.mktemp("long") / "targets", samples=many, per_shard=many, rows=1, note=note)


def test_header_and_index_longer_than_the_first_reads(long, upload):
    asked = np.array([0, TAIL // 40 + 99, 5])
    same(open_folder(upload(long).url).read(asked), open_folder(long).read(asked))


def test_one_sample_asks_for_ranges_and_not_for_the_file(tmp_path, user):
    folder = make(tmp_path / "large", samples=600, per_shard=300, length=128, rows=128)
    there = S3(folder, tmp_path.name)
    size = (folder / shard_name(300, 600)).stat().st_size
    assert size > 8 * (HEAD + TAIL)
    opened = open_folder(there.url)
    begin = len(user.requests())
    opened.read(np.array([437]))
    heads = [one for one in user.requests(begin) if one[0] == "HEAD"]
    gets = [one for one in user.requests(begin) if one[0] == "GET"]
    assert len(heads) == 1 and len(gets) == 3 and len(user.requests(begin)) == 4
    assert {one[1] for one in gets} == {f"/{BUCKET}/{tmp_path.name}/{shard_name(300, 600)}"}
    assert all(asked and status == 206 for _, _, asked, status, _ in gets), "a GET without a range"
    assert sum(one[4] for one in gets) < size // 6

    begin = len(user.requests())
    opened.read(np.array([301, 302, 303, 440]))  # the shard is known, neighbours are one read
    assert [(one[0], one[3]) for one in user.requests(begin)] == [("GET", 206)] * 2
    assert sum(one[4] for one in user.requests(begin)) < size // 20


def test_only_shards_that_are_asked_for_are_touched(local, user, tmp_path):
    there = S3(local, tmp_path.name)
    begin = len(user.requests())
    open_folder(there.url).read(np.array([0, 1, 11]))
    asked = {Path(one[1]).name for one in user.requests(begin)}
    assert asked == {sealed.MANIFEST, shard_name(0, 5), shard_name(10, 15)}
    assert all(one[2] for one in user.requests(begin) if one[0] == "GET")


def test_missing_shard(local, upload):
    there = upload(local)
    there.remove(shard_name(5, 10))
    opened = open_folder(there.url)
    message = refused(f"{there.url}/{shard_name(5, 10)}", opened.read, np.arange(SAMPLES))
    assert "is missing" in message and "ki-ds teach" in message
    same(opened.read(np.arange(10, 15)), open_folder(local).read(np.arange(10, 15)))


@pytest.mark.parametrize("left", [0, 10, 60, -1])
def test_truncated_shard(local, upload, left):
    there, name = upload(local), shard_name(5, 10)
    there.put(name, (local / name).read_bytes()[:left])
    refused(f"{there.url}/{name}", open_folder(there.url).read, np.arange(5, 10))


def test_flipped_byte(local, upload):
    there, name = upload(local), shard_name(5, 10)
    data = (local / name).read_bytes()
    at = int(Shard(local / name).index[2]["offset"])
    for place in (30, at + 20, len(data) - 100, len(data) - 1):  # header, frame, index, footer
        there.put(name, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert "repair" in refused(f"{there.url}/{name}", open_folder(there.url).read, np.arange(5, 10))
    same(open_folder(there.url).read(np.arange(5)), open_folder(local).read(np.arange(5)))


def test_shard_that_goes_while_it_is_open(local, upload):
    there, name = upload(local), shard_name(5, 10)
    opened = open_folder(there.url)
    opened.read(np.array([5]))
    there.remove(name)
    assert "cannot be read" in refused(f"{there.url}/{name}", opened.read, np.array([6]))


def test_shard_of_another_folder(local, upload):
    there = upload(local)
    there.put(shard_name(5, 10), (local / shard_name(0, 5)).read_bytes())
    assert "start" in refused(f"{there.url}/{shard_name(5, 10)}", open_folder(there.url).read, np.array([6]))


def test_folder_without_a_manifest(local, upload):
    there = upload(local)
    there.remove(sealed.MANIFEST)
    assert "not a finished targets folder" in refused(there.url, open_folder, there.url)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"stage": "teach"}'])
def test_damaged_manifest(local, upload, text):
    there = upload(local)
    there.put(sealed.MANIFEST, text)
    refused(f"{there.url}/{sealed.MANIFEST}", open_folder, there.url)


def test_manifest_of_another_stage(local, upload, tmp_path):
    there = upload(local)
    forge(shutil.copytree(local, tmp_path / "copy"), stage="train")
    there.put(sealed.MANIFEST, (tmp_path / "copy" / sealed.MANIFEST).read_bytes())
    assert '"train"' in refused(f"{there.url}/{sealed.MANIFEST}", open_folder, there.url)


def test_folder_in_the_place_of_a_shard(local, upload):
    there, name = upload(local), shard_name(5, 10)
    there.remove(name)
    if isinstance(there, Plain):
        there.fs.makedirs(f"{there.url}/{name}")
    there.put(f"{name}/inside", b"x" * 1000)
    assert "is a folder" in refused(f"{there.url}/{name}", open_folder(there.url).read, np.array([6]))


def test_listing_sees_what_came_and_went(local, upload):
    there = upload(local)
    assert names(there.url) == {file.name for file in local.iterdir()}
    opened = open_folder(there.url)
    assert opened.missing() == []
    data = (local / shard_name(5, 10)).read_bytes()
    there.remove(shard_name(5, 10))
    assert opened.missing() == [1]
    there.put(shard_name(5, 10), data)
    assert opened.missing() == []
    assert names(join(there.url, "nothing")) == set()


def test_shard_that_is_replaced_after_a_listing(local, upload):
    """File systems keep listings, with sizes: a size of yesterday must not be believed."""
    there, name = upload(local), shard_name(5, 10)
    whole = (local / name).read_bytes()
    there.put(name, whole[:100])
    opened = open_folder(there.url)
    assert opened.missing() == []
    there.put(name, whole)
    same(opened.read(np.arange(5, 10)), open_folder(local).read(np.arange(5, 10)))


def test_threads_and_second_instances(local, upload):
    there = upload(local)
    expected = open_folder(local)
    one, other = open_folder(there.url), open_folder(there.url)
    start = threading.Barrier(6)

    def read(number):
        start.wait()
        rng = np.random.default_rng(number)
        opened = (one, other)[number % 2]
        for _ in range(4):
            asked = rng.integers(0, SAMPLES, 9)
            same(opened.read(asked), expected.read(asked))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))
    same(open_folder(there.url).read(np.arange(SAMPLES)), expected.read(np.arange(SAMPLES)))


def test_few_shards_in_memory_are_opened_again(local, upload):
    facts, _ = read_facts(local)
    opened = ShardFolder(upload(local).url, SAMPLES, PER_SHARD, facts.header, keep=1)
    same(opened.read(np.array([0, 21, 1, 20])), open_folder(local).read(np.array([0, 21, 1, 20])))
    assert len(opened.shards) == 1
