"""A bound on the memory that reading somebody's file may take, held by the operating system.

A few hundred bytes of Parquet, or a header of xz, can ask for gigabytes; what a file says of its own sizes proves
nothing.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

BOUND_BYTES = 1 << 30


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within, the process's private memory grows by BOUND_BYTES at most; beyond, whoever allocates is refused, and
    raises MemoryError or an exception of its own. On Linux; elsewhere there is no bound."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[5])
    except OSError:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * resource.getpagesize() + BOUND_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit if before[0] < 0 else min(limit, before[0]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
