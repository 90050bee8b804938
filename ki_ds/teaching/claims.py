"""Work shared out through the file system: who takes which shard of a targets folder, and who seals it.

A claim is a file that only one rank can make (O_EXCL), in a folder of this launch's own; it says who made it, for
people to read. No rank waits for another: when every shard is claimed, idle ranks compute those that are not there yet
again, as MapReduce's backup tasks (Dean and Ghemawat 2004). Whoever is first writes the shard; the bytes are the same,
so that a slow or dead rank holds nobody up.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ki_ds.errors import UserError
from ki_ds.launch import distributed, heartbeat
from ki_ds.sealed import MANIFEST, Manifest, open_sealed
from ki_ds.targets.folder import ShardFolder

CLAIMS = "claims"  # where claims lie, within the folder that is being filled
POLL_S = 0.2
LAG_S = 60.0  # within which a shared file system shows what another node has made
PATIENCE_S = 60.0  # with the rank that seals


class Claims:
    """This rank's view of the shards that a launch has to compute."""

    def __init__(self, shards: ShardFolder, missing: list[int], folder: Path, rank: int, world_size: int):
        self.shards, self.folder, self.rank, self.world_size = shards, folder, rank, world_size
        self.untried, self.left = deque(missing), list(missing)
        self.taken: set[str] = set()

    def next(self, backups: bool = True) -> int | None:
        """The shard to compute now: an unclaimed one; then, with `backups`, one that another rank has claimed but not
        yet written, ranks beginning at different ones. None where nothing is left."""
        while self.untried:
            number = self.untried.popleft()
            if not self.there(number) and self.claim(str(number)):
                return number
        self.left = [number for number in self.left if not self.there(number)] if backups else []
        return self.left[self.rank * len(self.left) // self.world_size] if self.left else None

    def there(self, number: int) -> bool:
        """Whether a shard has been written; asked for by name, since listings may lag."""
        return (Path(self.shards.folder) / self.shards.name(number)).exists()

    def count(self) -> int:
        """How many of all shards are there, as far as a listing shows."""
        return len(self.shards) - len(self.shards.missing())

    def claim(self, name: str) -> bool:
        """Take something that nobody has taken in this launch."""
        if name in self.taken:
            return False
        try:
            with (self.folder / name).open("x") as file:
                file.write(f"rank {self.rank} on {socket.gethostname()}\n")
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # sealed meanwhile
                self.taken = set(os.listdir(self.folder))  # spares most of the tries that would fail
            return False
        except FileNotFoundError:  # the targets are sealed, or a new launch has begun
            return False
        return True


def shared(shards: ShardFolder) -> Claims:
    """The claims of a launch that begins; all ranks call this.

    Raises:
        UserError: a rank does not see the folder that rank 0 has made.
    """
    root = Path(shards.folder) / CLAIMS
    token, missing = "", []
    if distributed.rank() == 0:
        token, missing = secrets.token_hex(4), shards.missing()
        shutil.rmtree(root, ignore_errors=True)
        (root / token).mkdir(parents=True)
    token, missing = distributed.broadcast_object((token, missing))
    if not _within(LAG_S, (root / token).exists):
        raise _not_shared(shards)
    return Claims(shards, missing, root / token, distributed.rank(), distributed.world_size())


def sealed_by_one(claims: Claims, seal: Callable[[], Manifest], doing: str) -> Manifest:
    """The manifest of a folder whose shards are all there: one rank seals it, and if that takes too long (it may have
    died), another one does it too, which is harmless.

    Raises:
        UserError: shards that other ranks wrote do not appear here.
    """
    folder, began = Path(claims.shards.folder), time.monotonic()
    while not (folder / MANIFEST).exists():
        turn = int((time.monotonic() - began) // PATIENCE_S)
        if claims.claim(f"seal-{turn}"):
            if not _within(LAG_S, lambda: not claims.shards.missing()):
                raise _not_shared(claims.shards)
            with contextlib.suppress(FileNotFoundError):  # the one before is alive after all, and has tidied up
                found = seal()
                shutil.rmtree(folder / CLAIMS, ignore_errors=True)
                return found
        heartbeat.report(f"{doing}: waiting for the rank that seals it", waiting=True)
        heartbeat.stop_if_asked()
        time.sleep(POLL_S)
    return open_sealed(folder)


def _within(seconds: float, true: Callable[[], bool]) -> bool:
    limit = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < limit:
        time.sleep(POLL_S)
    return found


def _not_shared(shards: ShardFolder) -> UserError:
    return UserError(
        f"{shards.folder}: what other ranks wrote is not here (rank {distributed.rank()}). --workdir must lie on a "
        "file system that all nodes share."
    )
