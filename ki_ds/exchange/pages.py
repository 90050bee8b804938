"""The headers of a Parquet file's pages, which its libraries do not show: how much the pages hold, and whether they
have checksums. A header is a struct in Thrift's compact form (parquet-format, `PageHeader`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

LARGEST_HEADER = 1 << 12
DICTIONARY_PAGE = 2
NUMBERS_OF = {0: 5, 2: 7, 3: 8}  # by type of page the field whose own field 1 is the number of values
DEEPEST = 8


@dataclass(frozen=True)
class Page:
    """What a page's header says."""

    dictionary: bool
    values: int
    unpacked: int  # bytes
    checksum: bool


def pages(file: BinaryIO, begin: int, length: int) -> Iterator[Page]:
    """The pages of a column chunk, from its first byte on.

    Raises:
        ValueError: they do not fill it one behind the other.
    """
    at, end = begin, begin + length
    while at < end:
        file.seek(at)
        try:
            said, size = _struct(file.read(LARGEST_HEADER), 0, 0)
            kind, unpacked, packed, values = said[1], said[2], said[3], said[NUMBERS_OF[said[1]]][1]
        except (LookupError, TypeError):
            raise ValueError(f"the header of a page at byte {at} cannot be read") from None
        at += size + packed
        if min(unpacked, packed, values) < 0 or at > end:
            raise ValueError("the pages of a column do not fit in it")
        yield Page(kind == DICTIONARY_PAGE, values, unpacked, 4 in said)


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """(values by field, where it ends)."""
    found: dict[int, Any] = {}
    field = 0
    while (head := data[at]) and depth < DEEPEST:
        at += 1
        kind = head & 15
        if head >> 4:
            field += head >> 4
        else:
            field, at = _number(data, at)
        if kind in (1, 2):
            found[field] = kind == 1
        elif kind in (4, 5, 6):
            found[field], at = _number(data, at)
        elif kind == 8:  # bytes
            length, at = _varint(data, at)
            at += length
        elif kind == 12:
            found[field], at = _struct(data, at, depth + 1)
        else:
            raise LookupError
    return found, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while data[at] & 0x80:
        number, shift, at = number | (data[at] & 0x7F) << shift, shift + 7, at + 1
    return number | data[at] << shift, at + 1


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Zigzag."""
    number, at = _varint(data, at)
    return number >> 1 ^ -(number & 1), at
