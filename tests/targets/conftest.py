"""A shard, a folder, and a folder behind a URL."""

import contextlib
import os

import fsspec
import pytest
from helpers import folders, shards
from helpers.servers import (
    S3,
    Plain,
    Server,
    forget,
    make,
)

from ki_ds import sealed
from ki_ds.targets.manifest import TargetFacts, seal_targets


@pytest.fixture
def small(tmp_path):
    """A shard of three samples, one of them without a row."""
    shards.write(tmp_path / "small.kit", 10, 13, rows=[3, 0, 2], note="ü")
    return tmp_path / "small.kit"


@pytest.fixture
def folder(tmp_path):
    """Ten samples, four a shard: the last shard is shorter."""
    folders.fill(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    return make(tmp_path_factory.mktemp("local") / "targets")


@pytest.fixture(scope="session")
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


@pytest.fixture
def finished(tmp_path):
    """A sealed folder."""
    sealed.prepare(tmp_path / "made", folders.IDENTITY)
    folders.fill(tmp_path / "made")
    seal_targets(tmp_path / "made", folders.IDENTITY, TargetFacts.read(folders.FACTS))
    return tmp_path / "made"
