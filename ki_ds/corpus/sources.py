"""Documents from the sources of a corpus: a deterministic stream of text, one document in memory at a time.

JSON Lines and Parquet are not left to the `datasets` library, which reads the same files: it names no line of a bad
row, takes numbers for text and a missing field for nothing, cannot replace what is no UTF-8, and is slow to import.

Text is UTF-8 with universal newlines. Bytes that are no UTF-8 are decoded to lone surrogates, as JSON's `\\ud800` is,
so that one place finds both, counts them and tells them from a U+FFFD that stands in the file.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import fsspec
from fsspec.registry import known_implementations

from ki_ds.corpus.decompression import decompressed, read_block
from ki_ds.corpus.memory import BOUND_BYTES, bounded
from ki_ds.errors import UserError, nearest, reason, unreadable
from ki_ds.experiment.sources import SOURCE_KINDS, DatasetSource, JsonLinesSource, ParquetSource, Source, TextSource

MAX_DOCUMENT_CHARACTERS = 1 << 20
# characters of a line of JSON, bytes of a row of Parquet: parsed, they may take thirty times as much
MAX_LINE = 1 << 25
READ_BYTES = 1 << 20
PARQUET_ROWS = 64  # in memory at once

FileSource = TextSource | JsonLinesSource | ParquetSource

_BLANK_LINES = re.compile(r"\n\s*\n")
_TO_LAST_SPACE = re.compile(r".*\s", re.DOTALL)
_SPACES = re.compile(r"\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")

codecs.register_error("ki_ds.mark", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


@dataclass
class Tally:
    """What has been yielded; `invalid_utf8` counts the documents in which something was replaced."""

    documents: int = 0
    characters: int = 0
    invalid_utf8: int = 0


@dataclass(frozen=True)
class _Rule:
    """What is done with text that is no UTF-8."""

    place: str
    refuse: bool

    def decode_errors(self) -> str:
        return "strict" if self.refuse else "ki_ds.mark"

    def refusal(self, where: str, what: str) -> UserError:
        return UserError(
            f'{where}: not UTF-8: {what}; convert it, or replace it with U+FFFD by {self.place}.invalid_utf8: "replace"'
        )


@dataclass(frozen=True)
class _File:
    name: str
    size_bytes: int
    open: Callable[[], Any]


def documents(
    sources: Sequence[Source],
    bases: Sequence[Path],
    place: str,
    invalid_utf8: Literal["replace", "refuse"],
    tally: Tally,
    first: int = 0,
) -> Iterator[str]:
    """All documents of the sources, in order: stripped, none empty, each at most MAX_DOCUMENT_CHARACTERS long.

    A longer document comes in pieces, cut at whitespace where there is some. Relative paths are looked up in `bases`,
    the first with a match wins. A file that several sources of a kind and field name is read once, whatever links lead
    to it. `place` is the corpus's JSON path and `first` the number of the first source, for errors. `tally` counts what
    is yielded.

    Raises:
        UserError: a source is missing, unreadable or lacks the field, or it is not UTF-8 and that is refused.
    """
    rule, seen = _Rule(place, refuse=invalid_utf8 == "refuse"), set[tuple[Any, ...]]()
    for index, source in enumerate(sources, first):
        for where, text in _texts(source, bases, f"{place}.sources.{index}", rule, seen):
            for piece in filter(None, _pieces(text.strip())):
                if _SURROGATE.search(piece):
                    if rule.refuse:
                        raise rule.refusal(where, "a lone surrogate")
                    tally.invalid_utf8 += 1
                    piece = _SURROGATE.sub("\ufffd", piece)
                tally.documents += 1
                tally.characters += len(piece)
                yield piece


def files(source: FileSource, bases: Sequence[Path], place: str) -> list[tuple[str, int]]:
    """The absolute path or URL and the size in bytes of each file of a source, sorted.

    A file system that does not tell a size, as some web servers, counts as 0. `place` is the source's JSON path.

    Raises:
        UserError: no file matches, or the file system cannot be reached.
    """
    return [(file.name, file.size_bytes) for file in _found(source, bases, place)]


def _texts(
    source: Source, bases: Sequence[Path], place: str, rule: _Rule, seen: set[tuple[Any, ...]]
) -> Iterator[tuple[str, str]]:
    """Where each text stands, for errors, and the text; files that are `seen` are passed over."""
    if isinstance(source, DatasetSource):
        yield from _dataset(source, bases, place)
        return
    for file in _found(source, bases, place):
        once = (type(source), getattr(source, "field", ""), os.path.realpath(file.name))
        if once in seen:
            continue
        seen.add(once)
        match source:
            case TextSource():
                yield from ((file.name, text) for text in _paragraphs(_blocks(file, rule)))
            case JsonLinesSource():
                yield from _json_lines(file, source.field, rule)
            case ParquetSource():
                yield from _parquet(file, source.field, rule)


# ------------------------------------------------------------------------------------------------------- files


def _found(source: FileSource, bases: Sequence[Path], place: str) -> list[_File]:
    kind = next(kind for kind, cls in SOURCE_KINDS.items() if isinstance(source, cls))
    pattern: str = getattr(source, kind)
    local = "://" not in pattern.removeprefix("file://")
    found = _local(pattern, bases) if local else _remote(pattern, f"{place}.{kind}")
    if not found:
        looked = "" if not local or os.path.isabs(pattern) else f" (looked in {', '.join(map(str, bases))})"
        raise UserError(
            f"{place}.{kind}: no file matches {pattern}{looked}; expected the path, glob or fsspec URL of files "
            "(the files of a folder are FOLDER/**/*)"
        )
    return sorted(found, key=lambda file: file.name)


def _local(pattern: str, bases: Sequence[Path]) -> list[_File]:
    if "\0" in pattern:
        return []
    pattern = os.path.expanduser(pattern.removeprefix("file://"))
    for base in bases or (Path(),):
        # A name that exists is meant as it stands, whatever brackets it has. Links are not resolved: the endings count.
        whole = os.path.join(base, pattern)
        names = [whole] if os.path.isfile(whole) else _matches(str(base), pattern)
        paths: dict[str, str] = {}
        for path in sorted(os.path.abspath(name) for name in names if os.path.isfile(name)):
            paths.setdefault(os.path.realpath(path), path)
        if paths:
            return [_File(path, os.path.getsize(path), partial(open, path, "rb")) for path in paths.values()]
    return []


def _matches(base: str, pattern: str) -> Iterator[str]:
    """What `glob.glob` matches; but where that follows links round and round, `**` enters each real folder once."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from (os.path.join(base, name) for name in glob.glob(pattern, root_dir=base))
        return
    at = parts.index("**")
    before, after = "/".join([*parts[:at], ""]), [part for part in parts[at:] if part]
    while after[:1] == ["**"]:
        del after[0]
    seen: set[str] = set()
    pending = sorted(os.path.join(base, name) for name in (glob.glob(before, root_dir=base) if before else [""]))
    for folder in pending:  # which grows: the folders of a level by their names, then those below them
        if (real := os.path.realpath(folder)) not in seen:
            seen.add(real)
            yield from _matches(folder, "/".join(after) or "*")
            pending += sorted(glob.glob(os.path.join(glob.escape(folder), "*", "")))


def _remote(pattern: str, place: str) -> list[_File]:
    try:
        system, path = fsspec.url_to_fs(pattern)
        found = {path: system.info(path)} if system.isfile(path) else system.glob(path, detail=True)
    except Exception as error:  # every file system has exceptions of its own
        remedy = _installation(pattern, error) or "check the URL, the network and the credentials"
        raise UserError(f"{place}: {pattern} cannot be listed: {reason(error)}; {remedy}") from error
    return [
        _File(system.unstrip_protocol(path), info.get("size") or 0, partial(system.open, path, "rb"))
        for path, info in found.items()
        if info["type"] == "file"
    ]


def _installation(pattern: str, error: Exception) -> str:
    for protocol in re.findall(r"([A-Za-z0-9+.-]+)://", pattern):
        known = known_implementations.get(protocol, {})
        if known.get("err") == str(error):
            package = known["class"].partition(".")[0]
            extra = f'"fsspec[{protocol.replace("https", "http")}]"'
            return f"run `pip install {extra if package == 'fsspec' else package}`"
    return ""


def _blocks(file: _File, rule: _Rule) -> Iterator[str]:
    """The text of a file in blocks of about READ_BYTES, decompressed, without a byte order mark."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(rule.decode_errors()), translate=True)
    mark, position = "\ufeff", 0
    try:
        with file.open() as raw, decompressed(raw, file.name) as stream:
            for block in chain(iter(partial(read_block, stream, READ_BYTES), b""), (b"",)):
                position += len(block)
                text = decoder.decode(block, final=not block)
                yield text.removeprefix(mark)
                mark = "" if text else mark
    except UnicodeDecodeError as error:  # its object ends where the block does, and begins with what was pending
        offset = position - len(error.object) + error.start
        raise rule.refusal(f"{file.name}: byte {offset}", error.reason) from error
    except Exception as error:  # every file system and decompressor has exceptions of its own
        raise unreadable(file.name, error) from error


# -------------------------------------------------------------------------------------------------- documents


def _paragraphs(blocks: Iterable[str]) -> Iterator[str]:
    """The texts between blank lines; what is yielded does not depend on where the blocks were cut."""
    rest = ""
    for block in chain(blocks, ("\n\n",)):
        *ended, rest = _BLANK_LINES.split(rest + block)
        yield from ended
        *pieces, rest = _pieces(rest)
        yield from pieces


def _pieces(text: str) -> Iterator[str]:
    """A text, left-stripped, cut at the last whitespace before the limit; all pieces but the last are stripped."""
    start = _SPACES.match(text).end()  # type: ignore[union-attr]
    while len(text) - start > MAX_DOCUMENT_CHARACTERS:
        limit = start + MAX_DOCUMENT_CHARACTERS
        space = _TO_LAST_SPACE.match(text, start, limit + 1)
        cut = space.end() - 1 if space else limit
        yield text[start:cut].rstrip()
        start = _SPACES.match(text, cut).end()  # type: ignore[union-attr]
    yield text[start:]


def _lines(blocks: Iterable[str], name: str) -> Iterator[tuple[str, str]]:
    """Where each line stands, and the line."""
    pending: list[str] = []
    number, length = 1, 0
    for block in chain(blocks, ("\n",)):
        for index, part in enumerate(block.split("\n")):
            if index:
                yield f"{name}:{number}", "".join(pending)
                number, length, pending = number + 1, 0, []
            length += len(part)
            if length > MAX_LINE:
                raise _too_long(f"{name}:{number}", f"a line of more than {MAX_LINE} characters")
            pending.append(part)


def _too_long(where: str, found: str) -> UserError:
    return UserError(f"{where}: {found}; make several documents of it, or leave it out")


def _json_lines(file: _File, field: str, rule: _Rule) -> Iterator[tuple[str, str]]:
    for where, line in _lines(_blocks(file, rule), file.name):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {reason(error)}; expected one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: found {_kind(row)}; expected one object a line")
        _check_field(field, list(row), where)
        if not isinstance(row[field], str):
            raise UserError(f'{where}: "{field}" is {_kind(row[field])}; expected a string')
        yield where, row[field]


def _kind(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _check_field(field: str, present: Sequence[str], where: str) -> None:
    if field not in present:
        listed = ", ".join(map(repr, present[:20])) + (", ..." if len(present) > 20 else "")
        raise UserError(
            f'{where}: there is no "{field}", only {listed or "nothing"}; set the source\'s "field"'
            f"{nearest(field, present)}"
        )


def _parquet(file: _File, field: str, rule: _Rule) -> Iterator[tuple[str, str]]:
    import pyarrow
    from pyarrow import parquet

    # Arrow's own pool takes a gigabyte of addresses ahead: now, and no more, or the bound would count it or miss it.
    pyarrow.allocate_buffer(1)
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    try:
        with file.open() as raw:
            with bounded():
                table = parquet.ParquetFile(raw, buffer_size=READ_BYTES)
            _check_field(field, table.schema_arrow.names, file.name)
            kind = table.schema_arrow.field(field).type
            plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if plain not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise UserError(f'{file.name}: the column "{field}" is of type {kind}; expected strings')
            row = 0
            batches = table.iter_batches(PARQUET_ROWS, columns=[field], use_threads=False)
            while (values := _next_values(batches, plain)) is not None:
                for value in values:
                    if value.is_valid:
                        where = f"{file.name}: row {row}"
                        if (size := value.as_buffer().size) > MAX_LINE:
                            raise _too_long(where, f"a text of {size} bytes, more than {MAX_LINE}")
                        yield where, _decoded(value.as_py(), where, rule)
                    row += 1
                del values  # before the next ones are read
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(
            f"{file.name}: takes more than {BOUND_BYTES >> 20} MiB to read: {reason(error)}; write it anew in smaller "
            "pages and row groups, or leave it out"
        ) from error
    except Exception as error:  # Arrow's own, and those of every file system
        raise unreadable(file.name, error) from error


def _next_values(batches: Iterator[Any], plain: Any) -> Any:
    """As bytes, since Arrow checks no UTF-8 and Python would, with an error for the whole batch; None: at the end."""
    import pyarrow

    with bounded():
        batch = next(batches, None)
        return None if batch is None else batch.column(0).cast(plain).cast(pyarrow.large_binary())


def _decoded(value: bytes, where: str, rule: _Rule) -> str:
    try:
        return value.decode("utf-8", rule.decode_errors())
    except UnicodeDecodeError as error:
        raise rule.refusal(f"{where}: byte {error.start}", error.reason) from error


def _dataset(source: DatasetSource, bases: Sequence[Path], place: str) -> Iterator[tuple[str, str]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{place}.dataset: {reason(error)}; run `pip install datasets`") from error

    name = next((str(base / source.dataset) for base in bases if os.path.isdir(base / source.dataset)), source.dataset)
    where = f"{place}.dataset: {name}"
    try:
        rows = datasets.load_dataset(name, source.configuration, split=source.split, streaming=True)
        for number, row in enumerate(rows):
            _check_field(source.field, list(row), where)
            text = row[source.field]
            if isinstance(text, str):
                yield f"{where}: row {number}", text
            elif text is not None:
                raise UserError(f'{where}: row {number}: "{source.field}" is {_kind(text)}; expected a string')
    except UserError:
        raise
    except Exception as error:  # of datasets, of the hub, of the network and of the files
        raise UserError(
            f"{where}: cannot be loaded: {reason(error)}; check the name, the configuration "
            f'{source.configuration!r}, the split "{source.split}" and the network'
        ) from error
