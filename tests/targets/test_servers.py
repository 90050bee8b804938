"""Servers that fail or refuse: every failure names the URL, in one line.

The S3 server is moto's, a process on loopback with an empty account; nothing leaves the machine.
"""

import contextlib
import sys

import fsspec
import numpy as np
import pytest
from helpers.servers import (
    BUCKET,
    PER_SHARD,
    S3,
    SAMPLES,
    Plain,
    Server,
    refused,
    same,
)

from ki_ds import sealed
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.manifest import open_folder
from ki_ds.targets.shard import Shard, shard_name
from ki_ds.targets.source import Source, names


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
