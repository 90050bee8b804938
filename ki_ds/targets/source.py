"""Ranged reads of files, local or behind an fsspec URL (s3://…, gs://…). No file is kept open between reads."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError

Place = Path | str  # a local path, or an fsspec URL


@cache
def _file_system(protocol: str, url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}. Install the fsspec package for {protocol}://.") from None


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
            return int(self.fs.info(self.place)["size"])
        if os.path.isdir(self.place):
            raise IsADirectoryError(21, "is a folder", str(self.place))
        return os.stat(self.place).st_size

    def read(self, start: int, length: int) -> bytes:
        """A range; shorter where the file ends."""
        if self.fs is not None:
            return bytes(self.fs.cat_file(self.place, start=start, end=start + length)) if length else b""
        handle = os.open(self.place, os.O_RDONLY)
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
    """Names of the files in a folder; empty where there is no such folder."""
    if isinstance(folder, Path):
        return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    try:
        listed = Source(folder).fs.ls(folder, detail=False)
    except FileNotFoundError:
        return set()
    return {str(name).rstrip("/").rsplit("/", 1)[-1] for name in listed}
