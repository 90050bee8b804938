"""Real text for experiments of the tests: the documentation of installed packages."""

import tempfile
from functools import cache
from pathlib import Path

from ki_ds.corpus.documentation import write_documentation

FOLDER = tempfile.TemporaryDirectory(prefix="ki_ds-documents-")  # removed when the process ends


@cache
def documentation(*names):
    """A source of an experiment file: the documents of the named packages, written once a process."""
    path = Path(FOLDER.name) / f"{'-'.join(names)}.jsonl"
    write_documentation(path, names)
    return {"jsonl": str(path)}
