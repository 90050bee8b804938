"""Files: written whole or not at all, also on a full disk; and digests."""

import errno
import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers.folders import contents, refusal

from ki_ds import files
from ki_ds.files import digest, file_digest, write_atomically
from ki_ds.sealed import (
    MANIFEST,
    UNSEALED,
    Identity,
    prepare,
    seal,
    state,
)

ONE = Identity("corpus", {"seed": 1, "corpus": {"validation": 0.005}}, {"tokenizer": "aaaa"})

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


# -------------------------------------------------------------------------------------------------- atomic writes


def test_written_file_is_whole_and_alone(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert contents(tmp_path) == {"a": b"two"}


def test_a_folder_that_does_not_exist(tmp_path):
    assert refusal(write_atomically, tmp_path / "no" / "a", b"x").startswith(
        f"{tmp_path / 'no' / 'a'}: cannot be written:"
    )


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, number):
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, function, fail)
    text = refusal(write_atomically, path, b"new")
    assert text.startswith(f"{path}: cannot be written: {os.strerror(number)}. ")
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert ("Free some space" if full else "Check the folder's permissions") in text
    assert contents(tmp_path) == {"a": b"old"}


@needs_dev_full
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, size):
    """The temporary file is a link to a device that is always full, so that the kernel itself refuses the bytes."""
    path = tmp_path / "a"
    write_atomically(path, b"old")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * size)
    (tmp_path / "a.0000.tmp").symlink_to("/dev/full")
    assert "Free some space, or choose another --workdir, and run the same command again" in refusal(
        write_atomically, path, b"x" * size
    )
    assert contents(tmp_path) == {"a": b"old"} and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_stage_on_a_full_disk_goes_on_once_there_is_space(small_disk):
    folder = small_disk / "wb"
    prepare(folder, ONE)
    (folder / "data").write_bytes(b"x" * 40_000)
    text = refusal(seal, folder, ONE, {"long": "y" * 40_000})
    assert text.startswith(f"{folder / MANIFEST}: cannot be written: No space left on device. Free some space")
    assert state(folder, ONE) == "unsealed" and sorted(contents(folder)) == ["data", UNSEALED]
    assert seal(folder, ONE, {"short": 1}).facts == {"short": 1}


# -------------------------------------------------------------------------------------------------------- digests


def test_digest_depends_on_the_value_and_not_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert len({digest(value) for value in (1, "1", 1.0, [1], {"1": 1}, None, True, "é", [[1]])}) == 9


def test_golden_digest():
    """Folders made before a change of the library are found again after it."""
    assert digest({"a": [1, 2.5, None, "é"]}) == "d10f86951f0443079a60cb4cfeaf7a5e"
    assert ONE.fingerprint == "67e3f535100781a5d45af227fd2e6d5f"


def test_nan_has_no_digest():
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_file_digest_is_sha256_and_a_sign_of_life(tmp_path, monkeypatch, size):
    path, told = tmp_path / "f", []
    monkeypatch.setattr(files, "on_piece", [lambda: told.append(1)])
    path.write_bytes(b"ab" * (size // 2) + b"c" * (size % 2))
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    assert len(told) == -(-size // (1 << 20))
    assert re.fullmatch("[0-9a-f]{32}", file_digest(path))
