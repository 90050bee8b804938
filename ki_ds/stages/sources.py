"""What a corpus is read from, as identities record it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ki_ds.corpus.sources import FileSource, files
from ki_ds.errors import UserError
from ki_ds.sealed import MANIFEST, read_manifest
from ki_ds.workspace import Workspace

SAMPLED_BYTES = 1 << 16


def described(space: Workspace, corpus: str, folder: str) -> dict[str, Any]:
    """A corpus's sources, with the names and sizes of their files; for a sealed `folder` whose files are gone, as its
    manifest recorded them."""
    given = space.experiment.corpora[corpus]
    found: list[Any] = []
    for index, source in enumerate(given.sources):
        if isinstance(source, FileSource):
            try:
                listed = files(source, space.bases, f"corpora.{corpus}.sources.{index}")
                found += [[Path(path).name, size, sampled_digest(Path(path))] for path, size in listed]
            except UserError:
                if not (space.root / folder / MANIFEST).exists():
                    raise
                found = read_manifest(space.root / folder)["config"]["sources"][corpus]["files"]
                break
    return {**given.model_dump(mode="json", exclude={"validation"}), "files": found}


def sampled_digest(path: Path) -> str:
    """Of a local file's first and last 64 KiB, which most changes touch; empty for other file systems."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        first = file.read(SAMPLED_BYTES)
        file.seek(max(path.stat().st_size - SAMPLED_BYTES, 0))
        return hashlib.sha256(first + file.read(SAMPLED_BYTES)).hexdigest()[:16]
