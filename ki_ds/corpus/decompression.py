"""Compressed files, block by block."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from typing import IO, Any

from ki_ds.corpus.memory import bounded


def decompressed(raw: IO[bytes], name: str) -> Any:
    """A stream of what a file holds, which its ending says how to decompress."""
    match os.path.splitext(name)[1].lower():
        case ".gz":
            return gzip.open(raw)
        case ".xz":
            return lzma.open(raw)
        case ".bz2":
            return bz2.open(raw)
        case ".zst":
            import pyarrow  # zstandard's own reader takes a file that is cut short for a whole one

            return pyarrow.CompressedInputStream(raw, "zstd")
    return raw


def read_block(stream: IO[bytes], size: int) -> bytes:
    """The next bytes, at most so many; a decompressor may be told to keep gigabytes of what it has written."""
    with bounded():
        return stream.read(size)
