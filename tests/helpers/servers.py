"""Folders of targets on an S3 server of this machine, and on file systems that need none."""

import json
import subprocess
import sys
import urllib.request

import fsspec
import numpy as np
import pytest

from ki_ds import sealed
from ki_ds.errors import UserError
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets import source
from ki_ds.targets.codec import Codec
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.manifest import TargetFacts, seal_targets
from ki_ds.targets.shard import pack_block, shard_name, write_shard

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
