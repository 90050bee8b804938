"""Sets damaged shards of a targets folder aside, so that just those are made again."""

from __future__ import annotations

from pathlib import Path

from ki_ds.errors import UserError
from ki_ds.exchange.verify import Fault
from ki_ds.targets.folder import ShardFolder

ASIDE = "aside"  # where damaged shards are kept, within their folder


def repair(folder: Path, shards: ShardFolder, faults: list[Fault]) -> list[Path]:
    """Set the damaged shards aside, so that `teach` computes them again; where they are now.

    Raises:
        UserError: every single shard seems to be damaged, or they cannot be moved.
    """
    bad = list(dict.fromkeys(fault.shard for fault in faults if fault.damaged))
    if len(bad) == len(shards) > 1:
        raise UserError(
            f"{folder}: all {len(bad)} shards seem to be damaged, the first: {faults[0].message} More likely the "
            "manifest or the corpus is another one; nothing was set aside."
        )
    moved = []
    for number in bad:
        path = folder / shards.name(number)
        try:
            (folder / ASIDE).mkdir(exist_ok=True)
            moved.append(path.rename(folder / ASIDE / path.name))
        except OSError as error:
            raise UserError(f"{path}: cannot be set aside: {error.strerror}") from None
    return moved
