"""Stage: text to a memory-mapped array of token sequences, split into a training and a validation part.

Documents are cut into one flow of tokens with the separator behind each, and the flow into sequences of S tokens:
causal: S tokens; masked: begin token, S - 2 tokens, separator (RoBERTa's full sentences across document boundaries,
Liu et al. 2019, section 4.2, cut at tokens rather than sentences). The rest that fills no sequence is dropped.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ki_ds.corpus.sources import Tally, documents
from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.errors import UserError
from ki_ds.experiment.schema import MOST_TOKENS, Corpus
from ki_ds.files import remedy
from ki_ds.progress import Progress
from ki_ds.sealed import MANIFEST, Manifest, open_sealed

BATCH_CHARACTERS = 1 << 20
READ_BYTES = 1 << 20
DOCUMENT_CHARACTERS = 256  # the least that a document counts for: its encoding takes about a kilobyte, however short
PARTS = ("train", "validation")
DTYPES = {"<u2": 2, "<u4": 4}  # bytes of an id


@dataclass(frozen=True)
class Tokens:
    """An opened corpus."""

    manifest: Manifest
    train: np.ndarray  # [sequences, S] memory map
    validation: np.ndarray

    @property
    def digest(self) -> str:
        """Of the contents."""
        return self.manifest.digest


def open_tokens(folder: Path) -> Tokens:
    """Open a sealed corpus folder.

    Raises:
        UserError: it is not sealed, a file of it was lost or cut, or its manifest does not describe its files.
    """
    manifest = open_sealed(folder)
    said: list[Any] = [manifest.facts.get(key) for key in ("dtype", "sequence_length", "sequences")]
    dtype, length, sequences = said
    counts: list[Any] = [sequences.get(part) for part in PARTS] if isinstance(sequences, dict) else []
    numbers = all(type(number) is int and number > 0 for number in (length, *counts))
    if not (counts and numbers and length <= MOST_TOKENS and isinstance(dtype, str) and dtype in DTYPES):
        raise _foreign(folder, f"dtype {dtype!r}, sequence_length {length!r}, sequences {sequences!r}")
    maps = []
    for part, count in zip(PARTS, counts, strict=True):
        file, expected = folder / f"{part}.bin", count * length * DTYPES[dtype]
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            raise _foreign(folder, f"{count} sequences of {length} ids, {expected} bytes, but {file.name} has {size}")
        maps.append(np.memmap(file, np.dtype(dtype), mode="r", shape=(count, length)))
    return Tokens(manifest, *maps)


def _foreign(folder: Path, said: str) -> UserError:
    return UserError(
        f"{folder / MANIFEST}: does not describe token files of ki_ds ({said:.300}); expected a dtype of "
        f"{', '.join(DTYPES)} and sizes that are those of the files. Remove {folder} and run again: it is made anew."
    )


def held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the validation part: by a hash of its text, so that duplicates stay together."""
    return xxhash.xxh3_64_intdigest(text.encode(), seed=1) < share * 2.0**64


class _Writer:
    """One part: a flow of tokens, cut into sequences and appended to a file of a temporary name that is its own."""

    def __init__(self, path: Path, length: int, dtype: np.dtype, begin: int | None, end: int | None):
        self.path, self.temporary = path, path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        self.file = self.temporary.open("wb")
        self.length, self.dtype = length, dtype
        self.before = [] if begin is None else [begin]
        self.after = [] if end is None else [end]
        self.width = length - len(self.before) - len(self.after)
        self.waiting: list[int] = []
        self.sequences = 0
        self.digest = xxhash.xxh3_128()

    def append(self, ids: list[int]) -> None:
        self.waiting += ids
        if len(self.waiting) >= 64 * self.width:
            self.flush()

    def flush(self) -> None:
        count = len(self.waiting) // self.width
        flow = np.asarray(self.waiting[: count * self.width], self.dtype).reshape(count, self.width)
        rows = np.empty((count, self.length), self.dtype)
        rows[:, : len(self.before)] = self.before
        rows[:, len(self.before) : len(self.before) + self.width] = flow
        rows[:, self.length - len(self.after) :] = self.after
        data = rows.tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.sequences += count
        del self.waiting[: count * self.width]

    def finish(self) -> None:
        """Give the file its name, once what lies on disk is what was written.

        Raises:
            UserError: it is not.
        """
        self.flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        found = xxhash.xxh3_128()
        with self.temporary.open("rb") as file:
            if hasattr(os, "posix_fadvise"):  # read from the disk, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while block := file.read(READ_BYTES):
                found.update(block)
        if found.digest() != self.digest.digest():
            raise UserError(
                f"{self.temporary}: what lies on disk is not what was written: digest {found.hexdigest()}, expected "
                f"{self.digest.hexdigest()}. Something else writes to this file, or the disk loses data: check both, "
                "and run again."
            )
        os.replace(self.temporary, self.path)


def build(
    folder: Path, name: str, corpus: Corpus, bases: list[Path], tokenizer: TextTokenizer, objective: str, length: int
) -> dict[str, Any]:
    """Tokenise a corpus into `folder`; returns the facts for its manifest. Memory is bounded by a batch of documents.

    Raises:
        UserError: a source cannot be read, either part comes out empty, the disk is full or loses data.
    """
    place = f"corpora.{name}"
    dtype = np.dtype("<u2" if tokenizer.size <= 1 << 16 else "<u4")
    begin, end = (tokenizer.begin, tokenizer.separator) if objective == "mlm" else (None, None)
    tally = Tally()
    writers: dict[str, _Writer] = {}
    try:
        for part in PARTS:
            writers[part] = _Writer(folder / f"{part}.bin", length, dtype, begin, end)
        with Progress(f"corpus {name}", None, "documents") as progress:
            for batch in _batches(documents(corpus.sources, bases, place, corpus.invalid_utf8, tally)):
                for text, ids in zip(batch, tokenizer.encode(batch), strict=True):
                    part = "validation" if held_out(text, corpus.validation) else "train"
                    writers[part].append([*ids, tokenizer.separator])
                progress.advance(len(batch), f"{tally.characters / 1e6:,.1f}M characters")
        for writer in writers.values():
            writer.finish()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}. {remedy(error)}") from None
    finally:
        for writer in writers.values():
            with contextlib.suppress(OSError):  # what did not fit on a full disk
                writer.file.close()
            with contextlib.suppress(OSError):  # most often it has its name by now
                writer.temporary.unlink()
    sequences = {part: writer.sequences for part, writer in writers.items()}
    for part in PARTS:
        if not sequences[part]:
            share = "larger" if part == "validation" else "smaller"
            more = f", a {share} {place}.validation (now {corpus.validation})" if tally.documents else ""
            raise UserError(
                f"{place}: {tally.documents} documents, {tally.characters} characters, give no {part} sequence of "
                f"{length} tokens. Expected more text{more} or a smaller sequence_length."
            )
    contents = [writers[part].digest.hexdigest() for part in PARTS]
    return {
        "content": xxhash.xxh3_128_hexdigest("|".join([*contents, dtype.str, str(length), tokenizer.digest]).encode()),
        "tokenizer": tokenizer.digest,
        "vocabulary": tokenizer.size,
        "sequence_length": length,
        "dtype": dtype.str,
        "sequences": sequences,
        "documents": tally.documents,
        "characters": tally.characters,
        "invalid_utf8": tally.invalid_utf8,
    }


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += max(len(text), DOCUMENT_CHARACTERS)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
