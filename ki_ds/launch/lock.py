"""One run at a time makes a folder: whoever makes it holds it, and others are told who that is.

A hold is a file that only one process can make (O_EXCL), as claims are: it says who holds, and counts up a beat while
that process lives. Holds of a folder are numbered; the highest counts. Who finds it ended, or its process dead, makes
the next one, which again only one can: nothing is ever taken from somebody by removing a file.

Whether a process lives is asked of the system where it runs on this machine; of another machine's only the beat is
seen, and one that stands still for LAPSE_S is that of a dead process. Clocks of machines are not compared. The ranks
that a dead process had started may write for a while yet, on its machine or on others: they are told to stop, and
waited for.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError
from ki_ds.files import remedy
from ki_ds.launch.monitor import WORD_FILE
from ki_ds.launch.processes import is_alive, is_here, this_process
from ki_ds.launch.records import read_record, write_record
from ki_ds.progress import duration, say

LOCKS = ".locks"  # in the work directory: a folder of holds for each folder of it that was ever made
PERIOD_S = 2.0
LAPSE_S = 20.0


class Hold:
    """This process's hold of a folder of a work directory; its ranks give signs of life below `control`."""

    def __init__(self, root: Path, folder: str, control: Path | None = None):
        """Take a folder that nobody holds.

        Raises:
            UserError: somebody does, or the work directory cannot be written.
        """
        self.root, self.folder, self.holds, self.beats = root, root / folder, root / LOCKS / folder, 0
        self.record: dict[str, Any] = {
            **this_process(), "token": secrets.token_hex(8), "since": datetime.now().isoformat(" ", "seconds"),
            "control": control and os.path.relpath(control, root), "ended": False,
        }  # fmt: skip
        try:
            self.path = self._take()
        except OSError as error:
            raise UserError(f"{self.holds}: cannot be written: {error.strerror}. {remedy(error)}") from None

    def _take(self) -> Path:
        self.holds.mkdir(parents=True, exist_ok=True)
        while True:
            number, record = _newest(self.holds)
            if record is not None:
                if record and not record.get("ended") and not is_here(record):
                    say(f"{self.folder}: held by {words(record)}; looking for {duration(LAPSE_S)} whether it lives")
                if lives(record, _file(self.holds, number)):
                    raise UserError(
                        f"{self.folder}: is being made by another run: {words(record)}. Wait for it, or stop it."
                    )
                self._outlast_ranks(record)
            path = _file(self.holds, number + 1)
            try:
                path.open("x").close()
            except FileExistsError:
                continue
            write_record(path, self.record)
            if _newest(self.holds)[0] == number + 1:  # else this process slept while others came and went
                for earlier in _numbers(self.holds):
                    if earlier <= number:
                        _file(self.holds, earlier).unlink(missing_ok=True)
                return path
            path.unlink(missing_ok=True)

    def _outlast_ranks(self, record: dict[str, Any]) -> None:
        """Wait for the end of the ranks of a hold whose process has ended.

        Raises:
            UserError: one does not end.
        """
        control, limit = record.get("control"), time.monotonic() + LAPSE_S
        if not isinstance(control, str) or control == self.record["control"]:  # what is there now are this run's own
            return
        ranks = [*(self.root / control).rglob("rank-*.json")]
        for rank in ranks:
            write_record(rank.with_name(WORD_FILE), {"say": "stop", "by": self.record["token"]})
        for rank in ranks:
            while (found := read_record(rank)) is not None and lives(found, rank):
                if time.monotonic() > limit:
                    raise UserError(
                        f"{self.folder}: was being made by {words(record)}, which is gone, but a rank of it is not: "
                        f"host {found.get('host')}, process {found.get('process')}. End it, then run again."
                    )
                time.sleep(PERIOD_S / 20)

    def beat(self) -> None:
        """Say that this process lives; end it where another one has taken it for dead."""
        mine = int(self.path.stem)
        with contextlib.suppress(OSError):  # a file system that is away for a while
            number, found = _newest(self.holds)
            if number > mine or (found and found.get("token") != self.record["token"]):
                print(f"error: {self.folder}: was taken over by {words(found or {})}, which saw no sign of life of "
                      "this process", file=sys.stderr, flush=True)  # fmt: skip
                os.kill(os.getpid(), signal.SIGTERM)
            self.holds.mkdir(parents=True, exist_ok=True)  # somebody has removed it
        self.beats += 1
        write_record(self.path, self.record | {"beat": self.beats})

    def end(self) -> None:
        """Let go; the file stays, so that its number is not used again."""
        write_record(self.path, self.record | {"ended": True})


@contextlib.contextmanager
def held(root: Path, folders: Sequence[str], control: Path | None = None) -> Iterator[None]:
    """Hold folders of a work directory that are being made, until the end of whatever kind; by ranks whose signs of
    life lie below `control`, where there are any.

    Raises:
        UserError: naming who holds one of them.
    """
    holds: list[Hold] = []
    over = threading.Event()

    def beat() -> None:
        while not over.wait(PERIOD_S):
            for hold in holds:
                hold.beat()

    thread = threading.Thread(target=beat, daemon=True, name="lock")
    try:
        for folder in folders:
            holds.append(Hold(root, folder, control))
        if holds:
            thread.start()
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()
        for hold in holds:
            hold.end()


def holder(root: Path, folder: str) -> str:
    """Who holds a folder of a work directory, in words; empty where nobody is known to."""
    _, record = _newest(root / LOCKS / folder)
    return words(record) if record and not record.get("ended") and (not is_here(record) or is_alive(record)) else ""


def words(record: dict[str, Any]) -> str:
    """Who that is."""
    return f"host {record.get('host')}, process {record.get('process')}, since {record.get('since')}"


def lives(record: dict[str, Any], path: Path) -> bool:
    """Whether the process that made a hold, or a rank's sign of life, is there; for one of another machine this waits
    for its next beat."""
    if record.get("ended"):
        return False
    if is_here(record):
        return is_alive(record)
    limit, beat = time.monotonic() + LAPSE_S, record.get("beat")
    while time.monotonic() < limit:
        time.sleep(PERIOD_S / 10)
        found = read_record(path) or {}
        if found.get("ended") or not path.exists():  # another one has the next number
            return False
        if is_here(found):  # it was being written
            return is_alive(found)
        if found.get("beat") != beat:
            return True
    return False


def _newest(holds: Path) -> tuple[int, dict[str, Any] | None]:
    """The number and the record of the hold that counts; -1 and None where there never was one."""
    number = max(_numbers(holds), default=-1)
    return number, None if number < 0 else read_record(_file(holds, number)) or {}


def _numbers(holds: Path) -> list[int]:
    try:
        names = [name.removesuffix(".json") for name in os.listdir(holds)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(name) for name in names if name.isdecimal()]


def _file(holds: Path, number: int) -> Path:
    return holds / f"{number}.json"
