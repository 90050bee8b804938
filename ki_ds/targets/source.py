"""Ranged reads of files, local or behind an fsspec URL (s3://…, gs://…). No file is kept open between reads."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError, reason

Place = Path | str  # a local path, or an fsspec URL


@cache
def _file_system(protocol: str, url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}. Install the fsspec package for {protocol}://.") from None


def _asked(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a file system says.

    Raises:
        OSError: whatever it raises: the packages behind it have exceptions of their own.
    """
    try:
        return call(*arguments, **named)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {reason(error)}") from None


class Source:
    """One file, read in ranges."""

    def __init__(self, place: Place):
        self.place = place
        self.fs: Any = None
        if isinstance(place, str) and "://" in place:
            protocol, rest = place.split("://", 1)
            self.fs = _file_system(protocol, f"{protocol}://{rest.split('/')[0]}")

    def size(self) -> int:
        """Bytes.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it cannot be reached.
        """
        if self.fs is not None:
            info = _asked(self.fs.info, self.place)
            if info["type"] == "directory":
                raise IsADirectoryError(21, "is a folder", str(self.place))
            if info.get("size") is None:
                raise OSError("the server does not say how long it is")
            return int(info["size"])
        found = os.stat(self.place)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(21, "is a folder", str(self.place))
        if not stat.S_ISREG(found.st_mode):
            raise OSError("is a pipe, a socket or a device, not a file")
        return found.st_size

    def read(self, start: int, length: int) -> bytes:
        """A range; shorter where the file ends."""
        if self.fs is not None:
            return bytes(_asked(self.fs.cat_file, self.place, start=start, end=start + length)) if length else b""
        handle = os.open(self.place, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place would wait for a writer
        try:
            found = os.pread(handle, length, start)
            while len(found) < length and (more := os.pread(handle, length - len(found), start + len(found))):
                found += more
            return found
        finally:
            os.close(handle)


def join(folder: Place, name: str) -> Place:
    """A file of a folder."""
    return f"{folder.rstrip('/')}/{name}" if isinstance(folder, str) else folder / name


def place(text: str) -> Place:
    """A path, or a URL as it is."""
    return text if "://" in text else Path(text)


def names(folder: Place) -> set[str]:
    """Names of the files in a folder; empty where there is no such folder.

    Raises:
        UserError: the server cannot be asked.
    """
    if isinstance(folder, Path):
        return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    fs = Source(folder).fs
    try:
        fs.invalidate_cache()
        listed = _asked(fs.ls, folder, detail=False)
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({reason(error)})") from None
    finally:
        fs.invalidate_cache()  # files come and go, and size would ask the listing
    return {str(name).rstrip("/").rsplit("/", 1)[-1] for name in listed}
