"""The manifest of a targets folder: how long it is, how it is cut into shards, and what these say alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_ds import sealed
from ki_ds.errors import UserError, reason
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.source import Place, Source, join

MOST_SHARDS = 1 << 24
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
        for name, least in (("samples", 0), ("samples_per_shard", 1)):
            found = facts.get(name)
            if type(found) is not int or not least <= found < 1 << 47:
                raise ValueError(f"{name}: found {json.dumps(found)}, expected a whole number")
        if -(-facts["samples"] // facts["samples_per_shard"]) > MOST_SHARDS:
            raise ValueError(f"more than {MOST_SHARDS} shards")
        if not isinstance(facts.get("header"), dict):
            raise ValueError("without the header of its shards")
        return cls(facts["samples"], facts["samples_per_shard"], FolderHeader.read(facts["header"]))


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
        data = sealed.parse_manifest(source.read(0, source.size()), str(source.place))
    except FileNotFoundError:
        remote = "does the server answer, and is the name right?"
        remedy = remote if isinstance(folder, str) else "`ki-ds teach` makes and finishes one."
        raise UserError(f"{folder}: there is no {sealed.MANIFEST}: not a finished targets folder; {remedy}") from None
    except OSError as error:
        raise UserError(f"{source.place}: cannot be read ({reason(error)})") from None
    try:
        if data["stage"] != "teach":
            raise ValueError(f"stage {json.dumps(data['stage'])}")
        return TargetFacts.read(data["facts"]), data
    except ValueError as error:
        raise UserError(f"{source.place}: not the manifest of a targets folder ({str(error)[:300]})") from None


def open_folder(folder: Place) -> ShardFolder:
    """A sealed targets folder by its manifest, local or remote.

    Raises:
        UserError: it is not there, not sealed, or holds no targets.
    """
    facts, _ = read_facts(folder)
    return ShardFolder(folder, facts.samples, facts.samples_per_shard, facts.header)


def seal_targets(folder: Path, identity: sealed.Identity, facts: TargetFacts) -> sealed.Manifest:
    """Seal a targets folder whose shards are all there. Its sub-folders are not part of it: in them lies who computes
    what, and what was set aside."""
    beside = tuple(entry.name for entry in folder.iterdir() if entry.is_dir())
    return sealed.seal(folder, identity, facts.record, leave_out=beside, synced="*.kit")
