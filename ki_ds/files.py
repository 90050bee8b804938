"""Files: written whole or not at all, digests, and what to do where writing fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError

PIECE = 1 << 26  # bytes
on_piece: list[Callable[[], None]] = []  # who is to be told that long reading or flushing gets on: `launch.heartbeat`
LITTLE = 1 << 20  # bytes: how much is free where a write has just failed for want of room


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON, 32 hexadecimal digits of it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, 32 hexadecimal digits of it."""
    whole = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            whole.update(block)
            _tell()
    return whole.hexdigest()[:32]


def write_atomically(path: Path, data: bytes | Iterable[bytes], keep: bool = False) -> None:
    """Write bytes, or several one after the other, to a temporary name, flush to disk, rename: the file is whole or
    absent. `keep`: a file that is there stays (as far as the file system can do that).

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # process ids of two nodes may be the same
    try:
        with temporary.open("w+b") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            _flush(file.fileno())
        if not keep or not _linked(temporary, path):
            os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written: {error.strerror}. {remedy(error)}") from None


def _linked(temporary: Path, path: Path) -> bool:
    """Whether a file has its name now, or another has; False where the file system knows no links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    temporary.unlink()
    return True


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """While a library writes to a file or folder: torch, safetensors and tokenizers have many words for a full disk.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}. {remedy(error)}") from None
    except UserError:
        raise
    except Exception as error:
        said = [number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.strerror(number) in str(error)]
        if not said and shutil.disk_usage(path.parent).free > LITTLE:
            raise
        number = said[0] if said else errno.ENOSPC
        full = OSError(number, os.strerror(number))
        raise UserError(f"{path}: cannot be written: {full.strerror}. {remedy(full)}") from None


def as_umask_says(folder: Path) -> None:
    """Give a folder's files the permissions of any that is made in it: some libraries write for the owner alone."""
    probe = folder / f"{secrets.token_hex(4)}.tmp"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def remedy(error: OSError) -> str:
    """What to do about a failed write."""
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return "Free some space, or choose another --workdir, and run the same command again: it continues."
    return "Check the folder's permissions, or choose another --workdir."


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        _flush(handle)
    finally:
        os.close(handle)


def _flush(handle: int) -> None:
    """Flush what is open to disk: a large file piece by piece, since a slow disk takes hours for it and is not to look
    like one that hangs."""
    size = os.fstat(handle).st_size if stat.S_ISREG(os.fstat(handle).st_mode) else 0
    try:
        pages = mmap.mmap(handle, size, mmap.MAP_SHARED, mmap.PROT_READ) if size > PIECE else None
    except OSError:  # a file system without
        pages = None
    if pages is not None:
        with pages:
            for begin in range(0, size, PIECE):
                pages.flush(begin, min(PIECE, size - begin))
                _tell()
    os.fsync(handle)
    _tell()


def _tell() -> None:
    for call in on_piece:
        call()
