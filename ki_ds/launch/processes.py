"""Says which process it is, so that others can tell whether it is still there."""

from __future__ import annotations

import contextlib
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What a record holds of the process that writes it."""
    host, process = socket.gethostname(), os.getpid()
    return {"host": host, "process": process, "machine": _machine(process), "began": _began(process)}


def is_here(record: dict[str, Any]) -> bool:
    """Whether this machine can be asked for the process of a record."""
    return bool(record.get("machine") == _machine(os.getpid()))


def is_alive(record: dict[str, Any]) -> bool:
    """Whether the process of a record is there; on its machine."""
    process = record.get("process")
    return type(process) is int and process > 0 and _began(process) == record.get("began") is not None


def _began(process: int) -> str | None:
    """When a process of this machine began, in the kernel's count, so that a number that is used again is not taken for
    it; None where it is gone, though its parent may not have asked for its end yet."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _answers(process)
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _answers(process: int) -> str | None:
    """The same for systems without /proc, which tell only whether there is one."""
    try:
        os.kill(process, 0)
    except PermissionError:
        pass
    except OSError:
        return None
    return "unknown"


@cache
def _machine(_process: int) -> str:
    """Names this machine's numbering of processes: two containers of one host number theirs differently."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)
