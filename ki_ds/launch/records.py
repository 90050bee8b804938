"""Small records of a fixed size in the control folder, written in place."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

# Every file has this size, and is written in place: a full disk does not stop a heart. A page, so that 200 characters
# of any script fit in it.
RECORD_BYTES = 4096


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record in place; what fails is tried again at the next beat."""
    data = json.dumps(record).encode()[:RECORD_BYTES].ljust(RECORD_BYTES)
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(handle, data, 0)
        finally:
            os.close(handle)


def read_record(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, or where it is being written."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(RECORD_BYTES))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
