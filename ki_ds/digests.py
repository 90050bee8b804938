"""Digests of files, remembered for as long as a file stays as it is.

As git's index does: a file whose size, times and inode are those of the last time is not read again. Its time of change
(ctime) is among them, which no program can set: a file that was edited and given its old date is read again.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError
from ki_ds.files import file_digest, write_atomically
from ki_ds.progress import say

LARGE_BYTES = 1 << 30


class Digests:
    """The digests of files, kept in a JSON file of the work directory."""

    def __init__(self, root: Path):
        self.root, self.path = root, root / ".digests.json"
        self.known: dict[str, Any] = {}
        self.changed = False
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(self.path.read_bytes())
            self.known = found if isinstance(found, dict) else {}

    def of(self, file: Path) -> str:
        """SHA-256 of a file's bytes, 32 hexadecimal digits of it; read only where it may have changed."""
        file = file.absolute()
        name = str(file.relative_to(self.root) if file.is_relative_to(self.root) else file)
        stat = file.stat()
        signs = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self.known.get(name)
        if isinstance(known, list) and known[:-1] == signs and isinstance(known[-1], str):
            return known[-1]
        if stat.st_size >= LARGE_BYTES:
            say(f"{file}: reading {stat.st_size / 1e9:.1f} GB, to know it by its content")
        self.known[name], self.changed = [*signs, file_digest(file)], True
        return str(self.known[name][-1])

    def save(self) -> None:
        """Remember them for the next run, where the work directory is there and can be written."""
        if self.changed and self.root.is_dir():
            with contextlib.suppress(UserError):
                write_atomically(self.path, json.dumps(self.known).encode())
            self.changed = False
