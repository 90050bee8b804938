"""Targets behind URLs: what they say is what the local folder says, read in ranges, and every failure names the URL.

The S3 server is moto's, a process on loopback with an empty account; nothing leaves the machine.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ki_ds import sealed
from ki_ds.errors import UserError
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets import source
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.manifest import TargetFacts, open_folder, read_facts, seal_targets
from ki_ds.targets.shard import HEAD, TAIL, Shard, pack_block, shard_name, write_shard
from ki_ds.targets.source import Source, join, names

HOW = Codec(vocabulary=50_000, k=16, quantum=1 / 16, scalars=("first", "truth"))
SAMPLES, PER_SHARD, LENGTH = 22, 5, 8
BUCKET = "targets-of-a-test"
SERVER = """
import json, os, sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

application = DomainDispatcherApplication(create_backend_app)

def recorded(environ, start):
    said = []
    def begin(status, headers, *more):
        said.append(status.split()[0])
        return start(status, headers, *more)
    body = b"".join(application(environ, begin))
    one = [environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE"), int(said[-1]), len(body)]
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(one) + "\\n")
    return [body]

server = make_server("127.0.0.1", 0, recorded, threaded=True)
print(server.port, flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # ends with the test
server.serve_forever()
"""


def block(sample, rows, k=HOW.k):
    """Recognisable targets of one sample."""
    rng = np.random.default_rng(sample)
    ids = rng.integers(0, HOW.vocabulary - k, (rows, 1)) + np.stack([rng.permutation(k) for _ in range(rows)])
    scalars = {name: -rng.exponential(3, rows) for name in HOW.scalars}
    planes, distortion = pack_arrays(HOW, ids, np.log(rng.dirichlet(np.ones(k), rows)), scalars)
    digest = rng.integers(0, 2**64, 1, np.uint64)
    return pack_block(HOW, planes, np.array([rows]), digest, distortion)


def make(folder, samples=SAMPLES, per_shard=PER_SHARD, length=LENGTH, rows=None, **header):
    """A finished targets folder: shards and manifest."""
    folder.mkdir(exist_ok=True)
    header = FolderHeader.read({"sequence_length": length, "codec": HOW.record, **header})
    for start in range(0, samples, per_shard):
        end = min(start + per_shard, samples)
        blocks = [block(sample, 1 + sample % length if rows is None else rows) for sample in range(start, end)]
        write_shard(folder / shard_name(start, end), header, start, blocks)
    identity = sealed.Identity("teach", {}, {})
    seal_targets(folder, identity, TargetFacts(samples, per_shard, header))
    return folder


def same(found, expected):
    assert (found.rows, found.digests) == (expected.rows, expected.digests)
    for name in ("ids_nK", "values_nK", "count_n", "scalars_Sn"):
        np.testing.assert_array_equal(getattr(found.planes, name), getattr(expected.planes, name))


def refused(url, call, *arguments):
    """The message of a UserError: one line that begins with the URL, and nothing of the packages beneath."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert message.startswith(str(url)), message
    assert "\n" not in message and "Traceback" not in message and len(message) < 500, message
    assert error.value.__cause__ is None and (error.value.__suppress_context__ or error.value.__context__ is None)
    return message


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return make(tmp_path_factory.mktemp("local") / "targets")


class Server:
    """moto's S3 in a process of its own, which writes down what it is asked for."""

    def __init__(self, folder):
        self.log, errors = folder / "requests", folder / "errors"
        self.log.touch()
        with errors.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(self.log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=file, text=True,
            )  # fmt: skip
        port = self.process.stdout.readline().strip()
        assert port, f"moto's server did not start:\n{errors.read_text()}"
        self.endpoint = f"http://127.0.0.1:{port}"

    def requests(self, since=0):
        """[method, path, range, status, bytes] of each request but the first `since`."""
        return [json.loads(line) for line in self.log.read_text().splitlines()][since:]

    def authenticate(self, after):
        """Look at credentials from the request after `after` on; "inf": never."""
        plain = {"Content-Type": "text/plain"}
        asked = urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", str(after).encode(), plain)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as answer:
            answer.read()

    def stop(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def forget():
    """Drop what fsspec and ki_ds know of file systems: they keep the credentials with which they were made."""
    source._file_system.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("moto", reason="moto's S3 server is not installed (the extra `test` has it)")
    pytest.importorskip("s3fs", reason="s3fs is not installed (the extras `test` and `s3` have it)")
    pytest.importorskip("flask", reason="moto is installed without its server (moto[server])")
    started = Server(tmp_path_factory.mktemp("server"))
    forget()
    yield started
    started.stop()
    forget()


@pytest.fixture
def user(server, monkeypatch, tmp_path):
    """The environment of a user of that server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    said = {
        "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint, "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def newcomer(user):
    """A user with file systems of their own."""
    forget()
    yield user
    forget()


class S3:
    """A folder in a bucket, filled with another client than the one that is tested."""

    def __init__(self, folder, prefix):
        import boto3

        self.client, self.prefix = boto3.client("s3"), prefix
        self.url = f"s3://{BUCKET}/{prefix}"
        self.client.create_bucket(Bucket=BUCKET)
        for file in folder.iterdir():
            self.put(file.name, file.read_bytes())

    def put(self, name, data):
        self.client.put_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}", Body=data)

    def remove(self, name):
        self.client.delete_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}")


class Plain:
    """A folder of a file system that needs no server."""

    def __init__(self, folder, url):
        self.url = url
        self.fs = fsspec.core.url_to_fs(url)[0]
        self.fs.makedirs(url, exist_ok=True)
        for file in folder.iterdir():
            self.put(file.name, file.read_bytes())

    def put(self, name, data):
        self.fs.pipe_file(f"{self.url}/{name}", data)

    def remove(self, name):
        self.fs.rm_file(f"{self.url}/{name}")


@pytest.fixture(params=["memory", "file", "s3"])
def upload(request, tmp_path):
    """Puts a local folder where the protocol says."""
    if request.param == "s3":
        request.getfixturevalue("user")
    prefix = tmp_path.name

    def put(folder):
        if request.param == "s3":
            return S3(folder, prefix)
        return Plain(folder, f"memory://{prefix}" if request.param == "memory" else f"file://{tmp_path}/remote")

    yield put
    if request.param == "memory":
        with contextlib.suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(f"memory://{prefix}", recursive=True)


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


def test_manifest_of_another_stage(local, upload):
    there = upload(local)
    data = json.loads((local / sealed.MANIFEST).read_bytes())
    there.put(sealed.MANIFEST, json.dumps({**data, "stage": "train"}).encode())
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


@pytest.mark.parametrize("part", ["manifest", "listing", "shard"])
def test_bucket_that_is_not_there(user, part):
    url = "s3://no-such-bucket-of-a-test/prefix"
    if part == "manifest":
        assert "not a finished targets folder" in refused(url, open_folder, url)
    elif part == "shard":
        assert "is missing" in refused(url, Shard, f"{url}/{shard_name(0, 5)}")
    else:
        assert names(url) == set()


def every_way(url):
    """Each way to ask a server: each must be refused in its own words."""
    opened = ShardFolder(url, SAMPLES, PER_SHARD, {})
    refused(f"{url}/{sealed.MANIFEST}", open_folder, url)
    refused(f"{url}/{shard_name(0, 5)}", opened.read, np.array([0]))
    refused(f"{url}/", opened.read, np.array([0, 12]))  # from two threads
    return refused(url, opened.missing)


def test_wrong_credentials(local, newcomer, tmp_path):
    there = S3(local, tmp_path.name)
    newcomer.authenticate(0)
    try:
        every_way(there.url)
    finally:
        newcomer.authenticate("inf")
    same(open_folder(there.url).read(np.arange(3)), open_folder(local).read(np.arange(3)))


def test_no_credentials(newcomer, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "redentials" in every_way(f"s3://{BUCKET}/prefix")


def test_server_that_is_not_there(newcomer, monkeypatch, tmp_path):
    gone = Server(tmp_path)
    gone.stop()
    monkeypatch.setenv("AWS_ENDPOINT_URL", gone.endpoint)
    assert gone.endpoint in every_way(f"s3://{BUCKET}/prefix")


def test_endpoint_of_the_configuration_of_fsspec(local, newcomer, monkeypatch, tmp_path):
    there = S3(local, tmp_path.name)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": newcomer.endpoint})
    same(open_folder(there.url).read(np.arange(3)), open_folder(local).read(np.arange(3)))


@pytest.mark.parametrize("error", [RuntimeError("first line\nsecond line"), KeyError("x"), TimeoutError()])
def test_exceptions_of_a_file_system_become_errors_of_one_line(local, monkeypatch, error):
    there = Plain(local, "memory://exceptions")
    opened = open_folder(there.url)
    opened.read(np.array([0]))

    def fail(*_, **__):
        raise error

    for name in ("cat_file", "info", "ls"):
        monkeypatch.setattr(type(there.fs), name, fail)
    refused(f"{there.url}/{shard_name(0, 5)}", opened.read, np.array([1]))
    every_way(there.url)


def test_unknown_size(local, monkeypatch):
    there = Plain(local, "memory://unknown")
    monkeypatch.setattr(type(there.fs), "info", lambda *_, **__: {"type": "file", "size": None})
    assert "how long" in refused(f"{there.url}/{sealed.MANIFEST}", open_folder, there.url)


def test_unknown_protocol():
    assert "nowhere" in refused("nowhere://", open_folder, "nowhere://bucket/prefix")


def test_protocol_whose_package_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "gcsfs" in refused("gs://", open_folder, "gs://bucket/prefix")


def test_range_behind_the_end(local, upload):
    """A file that shrinks between two requests."""
    there, name = upload(local), shard_name(5, 10)
    size = (local / name).stat().st_size
    with contextlib.suppress(OSError):  # S3 refuses a range that begins behind the end
        assert Source(f"{there.url}/{name}").read(size, 10) == b""
    assert len(Source(f"{there.url}/{name}").read(size - 5, 10)) == 5
    assert Source(f"{there.url}/{name}").read(0, 0) == b""
