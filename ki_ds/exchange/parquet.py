"""Parquet files: written part by part, and read from whoever made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ki_ds.errors import UserError, reason
from ki_ds.exchange.pages import pages
from ki_ds.files import remedy, sync

ROWS_AT_ONCE = 1 << 12
SMALL = 1 << 22  # values of a column chunk that are read, however few bytes hold them
BYTES_OF_A_VALUE, SLACK = 32, 1 << 20  # that a page takes unpacked
PER_BYTE = 16  # values that a byte on disk may hold beyond that: lists of distinct ids take more than a bit each


@contextmanager
def parquet_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes columns to a Parquet file, part by part; the file is whole or absent.

    Raises:
        UserError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary, writer = path.with_name(path.name + ".tmp"), None

    def write(columns: dict[str, Any]) -> None:
        nonlocal writer
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table)

    try:
        yield write
        if writer:
            writer.close()
            sync(temporary)
            temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}. {remedy(error)}") from None
    finally:
        with suppress(OSError):
            if writer and writer.is_open:
                writer.close()
        temporary.unlink(missing_ok=True)


def lists(ends: np.ndarray, values: np.ndarray) -> Any:
    """An Arrow column of int32 or float32 lists that end at `ends`."""
    import pyarrow as pa

    begins = np.concatenate([[0], ends]).astype(np.int32)
    kind = np.float32 if values.dtype.kind == "f" else np.int32
    return pa.ListArray.from_arrays(pa.array(begins), pa.array(values.astype(kind)))


class ParquetReader:
    """Chosen columns of a Parquet file. Whatever is wrong with it is a UserError, and what it claims is bounded by its
    size before it is read."""

    def __init__(self, path: Path):
        """Open it.

        Raises:
            UserError: it is not Parquet.
        """
        import pyarrow.parquet as pq

        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
        with self._worded("is not a Parquet file"):
            # pages are checked where their writer gave them a checksum
            self.file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
            self.schema = self.file.schema_arrow
            self.rows = int(self.file.metadata.num_rows)

    @contextmanager
    def _worded(self, what: str) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (OSError, ValueError, OverflowError, MemoryError, pa.ArrowException) as error:
            raise UserError(f"{self.path}: {what} ({reason(error)[:300]})") from None

    def check(self, columns: list[str]) -> bool:
        """Check, by the headers of its pages, how much some columns hold; whether every page has a checksum.

        Raises:
            UserError: more than the file's size can hold, or it is damaged.
        """
        checksums = True
        with self._worded("is damaged"), self.path.open("rb") as file:
            for group in range(self.file.metadata.num_row_groups):
                meta = self.file.metadata.row_group(group)
                for chunk in map(meta.column, range(meta.num_columns)):
                    if chunk.path_in_schema.split(".")[0] in columns:
                        checksums &= self._check_chunk(file, chunk, meta.num_rows)
        return checksums

    def _check_chunk(self, file: BinaryIO, chunk: Any, rows: int) -> bool:
        begins = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
        found = [*pages(file, max(min(begins), 0), chunk.total_compressed_size)]
        values = sum(page.values for page in found if not page.dictionary)
        if values != chunk.num_values:
            raise ValueError(f"{chunk.path_in_schema}: pages with {values} values, where {chunk.num_values} are said")
        large = [page for page in found if page.unpacked > BYTES_OF_A_VALUE * page.values + SLACK]
        most = SMALL + PER_BYTE * chunk.total_compressed_size if "." in chunk.path_in_schema else rows
        if values > most or large:
            raise ValueError(
                f"{chunk.path_in_schema}: {values} values, {sum(page.unpacked for page in found)} bytes unpacked, in "
                f"{chunk.total_compressed_size}: more than lists of distinct ids can take"
            )
        return all(page.checksum for page in found)

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Tables of consecutive rows.

        Raises:
            UserError: the file is damaged.
        """
        import pyarrow as pa

        with self._worded("is damaged"):
            found = self.file.iter_batches(columns=columns, batch_size=ROWS_AT_ONCE, use_threads=False)
        while True:
            with self._worded("is damaged"):
                batch = next(found, None)
                if batch is None:
                    return
                batch.validate(full=True)
                table = pa.Table.from_batches([batch])
            yield table
