"""Small records of a fixed size in the control folder, written in place."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

RECORD_BYTES = 4096  # every file has this size, and is written in place: a full disk does not stop a heart


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record in place, its words cut to what fits; what fails is tried again at the next beat."""
    while len(data := json.dumps(record).encode()) > RECORD_BYTES:
        longest = max((key for key in record if isinstance(record[key], str)), key=lambda key: len(record[key]))
        record = {**record, longest: record[longest][: len(record[longest]) * 3 // 4]}
    data = data.ljust(RECORD_BYTES)
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
