"""Parquet files, written part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def parquet_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes columns to a Parquet file, part by part; the file is whole or absent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary, writer = path.with_name(path.name + ".tmp"), None

    def write(columns: dict[str, Any]) -> None:
        nonlocal writer
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
        writer.write_table(table)

    try:
        yield write
        if writer:
            writer.close()
            temporary.rename(path)
    finally:
        if writer and writer.is_open:
            writer.close()
        temporary.unlink(missing_ok=True)


def lists(ends: np.ndarray, values: np.ndarray) -> Any:
    """An Arrow column of int32 or float32 lists that end at `ends`."""
    import pyarrow as pa

    begins = np.concatenate([[0], ends]).astype(np.int32)
    kind = np.float32 if values.dtype.kind == "f" else np.int32
    return pa.ListArray.from_arrays(pa.array(begins), pa.array(values.astype(kind)))
