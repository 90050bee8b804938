"""Is every sealed folder of a work directory as it was when it was sealed?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ki_ds.digests import Digests
from ki_ds.errors import UserError
from ki_ds.exchange import verify as exchange
from ki_ds.files import file_digest
from ki_ds.sealed import MANIFEST, check_contents, read_manifest
from ki_ds.targets.manifest import open_folder

SHARDS = "*.kit"


@dataclass(frozen=True)
class Verdict:
    """What was found of a sealed folder."""

    folder: str  # under the work directory
    faults: list[str]
    note: str = ""  # what could not be checked


def sealed_folders(root: Path) -> list[str]:
    """The folders of a work directory that have a manifest.

    Raises:
        UserError: there is none.
    """
    found = sorted(
        str(path.parent.relative_to(root))
        for pattern in (f"*/{MANIFEST}", f"*/*/{MANIFEST}")
        for path in root.glob(pattern)
        if not path.relative_to(root).parts[0].startswith(".")
    )
    if not found:
        raise UserError(f"{root}: not a work directory with anything finished in it (no */{MANIFEST})")
    return found


def verify(root: Path, deep: bool) -> Iterator[Verdict]:
    """Every sealed folder of a work directory, one after the other.

    Its manifest against the manifest's own digest, the sizes and digests of its files against the manifest, and of each
    shard of targets the header and index. Files that did not change since they were last read are not read again,
    unless `deep`: then every byte is, and every row of targets decoded.

    Raises:
        UserError: it is no work directory.
    """
    digests = Digests(root)
    for folder in sealed_folders(root):
        yield _folder(root, folder, file_digest if deep else digests.of, deep)
    digests.save()


def _folder(root: Path, folder: str, digest_of: Callable[[Path], str], deep: bool) -> Verdict:
    path, faults = root / folder, []
    try:
        record = read_manifest(path)
        check_contents(path, digest_of, leave_out=SHARDS)
        if record["stage"] == "teach":
            faults = _shards(path, deep)
    except UserError as error:
        return Verdict(folder, [str(error)])
    return Verdict(folder, faults, "" if "digests" in record else "its manifest holds no digests: sizes alone")


def _shards(path: Path, deep: bool) -> list[str]:
    shards = open_folder(path)
    if deep:
        return [fault.message for fault in exchange.verify(shards, deep=True)]
    faults = []
    for number in range(len(shards)):
        try:
            shards.shard(number)
        except UserError as error:
            faults.append(str(error))
    return faults
