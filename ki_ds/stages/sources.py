"""What stages are given from outside, as identities record it: by its content, however it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ki_ds.corpus.sources import FileSource, files
from ki_ds.errors import UserError
from ki_ds.experiment.sources import SOURCE_KINDS
from ki_ds.sealed import MANIFEST, read_manifest
from ki_ds.workspace import Workspace


def described(space: Workspace, corpus: str) -> dict[str, Any]:
    """How a corpus's sources are read, and the digests of their files; of files that are not local their names and
    sizes.

    Raises:
        UserError: a file is not there.
    """
    given, found = space.experiment.corpora[corpus], []
    for index, source in enumerate(given.sources):
        record = source.model_dump(mode="json")
        if isinstance(source, FileSource):
            kind = next(kind for kind in SOURCE_KINDS if kind in record)
            place = f"corpora.{corpus}.sources.{index}"
            record[kind] = [_file(space, path, size, place) for path, size in files(source, space.bases, place)]
        found.append(record)
    space.digests.save()
    return {"sources": found, "invalid_utf8": given.invalid_utf8}


def _file(space: Workspace, name: str, size: int, place: str) -> Any:
    path = Path(name)
    if not path.is_file():
        return [path.name, size]
    try:
        return space.digests.of(path)
    except OSError as error:
        raise UserError(f"{place}: {path}: cannot be read: {error.strerror}") from None


def or_recorded(space: Workspace, folder: str, key: str, found: Callable[[], Any]) -> Any:
    """What was found outside; for a sealed folder whose origin is gone, what its manifest recorded of it.

    Raises:
        UserError: as `found`, where the folder is not sealed.
    """
    try:
        return found()
    except UserError:
        if not (space.root / folder / MANIFEST).exists():
            raise
        return read_manifest(space.root / folder)["config"].get(key)
