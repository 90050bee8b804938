"""The manifest of a targets folder: how long it is, how it is cut into shards, and what these say alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_ds import sealed
from ki_ds.errors import UserError, reason
from ki_ds.files import file_digest
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.shard import Damaged, Shard
from ki_ds.targets.source import Place, Source, join

MOST_SHARDS = 1 << 17
LARGEST_MANIFEST = 1 << 25  # bytes: of so many shards
FORMER_NAMES = {"positions": "samples", "positions_per_shard": "samples_per_shard"}


@dataclass(frozen=True)
class TargetFacts:
    """What the manifest of a targets folder says of it."""

    samples: int
    samples_per_shard: int
    header: FolderHeader  # of every shard

    @property
    def record(self) -> dict[str, Any]:
        """As in the manifest."""
        return {
            "samples": self.samples, "samples_per_shard": self.samples_per_shard, "header": self.header.record,
        }  # fmt: skip

    @classmethod
    def read(cls, facts: dict[str, Any]) -> TargetFacts:
        """The inverse of `record`.

        Raises:
            ValueError: naming what is not as expected.
        """
        facts = renamed(facts)
        samples, per_shard = _whole(facts, "samples", 0), _whole(facts, "samples_per_shard", 1)
        if not isinstance(facts.get("header"), dict):
            raise ValueError("without the header of its shards")
        return cls(samples, per_shard, FolderHeader.read(facts["header"]))


def _whole(facts: dict[str, Any], name: str, least: int) -> int:
    found = facts.get(name)
    if type(found) is not int or not least <= found < 1 << 47:
        raise ValueError(f"{name}: found {json.dumps(found)[:50]}, expected a whole number")
    return found


def begun_grid(folder: Path, per_shard: int) -> tuple[int, int]:
    """(samples, samples per shard) of a local targets folder, sealed or begun: what is stored once stays, on its own
    grid of shards; 0 and what is given where it does not say so.

    Raises:
        UserError: they are no numbers.
    """
    facts = {"samples": 0, "samples_per_shard": per_shard, **renamed(sealed.begun(folder))}
    try:
        return _whole(facts, "samples", 0), _whole(facts, "samples_per_shard", 1)
    except ValueError as error:
        raise UserError(f"{folder}: its manifest is not one of targets ({error}). Remove the folder") from None


def renamed(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a targets folder, sealed or begun, under today's names: what are samples were once positions."""
    return {FORMER_NAMES.get(name, name): value for name, value in facts.items()}


def read_facts(folder: Place) -> tuple[TargetFacts, dict[str, Any]]:
    """(facts, whole manifest) of a sealed targets folder, local or remote.

    Raises:
        UserError: it is not there, not sealed, or holds no targets.
    """
    source = Source(join(folder, sealed.MANIFEST))
    try:
        size = source.size()
        if size > LARGEST_MANIFEST:
            raise UserError(f"{source.place}: has {size} bytes; expected at most {LARGEST_MANIFEST}")
        data = sealed.parse_manifest(source.read(0, size), str(source.place))
    except FileNotFoundError:
        remote = "does the server answer, and is the name right?"
        remedy = remote if isinstance(folder, str) else "`ki-ds teach` makes and finishes one."
        raise UserError(f"{folder}: there is no {sealed.MANIFEST}: not a finished targets folder; {remedy}") from None
    except OSError as error:
        raise UserError(f"{source.place}: cannot be read ({reason(error)})") from None
    try:
        if data["stage"] != "teach":
            raise ValueError(f"stage {json.dumps(data['stage'])}")
        facts, listed = TargetFacts.read(data["facts"]), len(data["files"])
        if (count := -(-facts.samples // facts.samples_per_shard)) > min(listed, MOST_SHARDS):
            raise ValueError(f"{count} shards for so many samples, of which {listed} files are listed")
        if not isinstance(data.get("digests", {}), dict):
            raise ValueError("digests that are no object")
        return facts, data
    except ValueError as error:
        raise UserError(f"{source.place}: not the manifest of a targets folder ({str(error)[:300]})") from None


def open_folder(folder: Place) -> ShardFolder:
    """A sealed targets folder by its manifest, local or remote.

    Raises:
        UserError: it is not there, not sealed, or holds no targets.
    """
    facts, data = read_facts(folder)
    return ShardFolder(folder, facts.samples, facts.samples_per_shard, facts.header, digests=data.get("digests"))


def seal_targets(
    folder: Path, identity: sealed.Identity, facts: TargetFacts, more: dict[str, Any] | None = None
) -> sealed.Manifest:
    """Seal a targets folder whose shards are all there. Its sub-folders are not part of it: in them lies who computes
    what, and what was set aside. Nor is the last, partial shard of a shorter run, which stays for its readers.
    `more`: further facts, for people to read.

    Raises:
        UserError: a shard is damaged.
    """
    shards = ShardFolder(folder, facts.samples, facts.samples_per_shard)
    beside = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    beside += [path.name for path in folder.glob("*.kit") if not shards.fits(path.name)]
    said = {**facts.record, **(more or {})}
    return sealed.seal(folder, identity, said, tuple(beside), synced="*.kit", digest_of=_digest)


def _digest(file: Path) -> str:
    """Of a shard header and index, which holds the checksum of every frame."""
    if file.suffix != ".kit":
        return file_digest(file)
    try:
        return Shard(file).digest
    except Damaged as error:
        raise UserError(
            f"{file}: was damaged before the folder was finished. Remove it and run again. ({error})"
        ) from None
