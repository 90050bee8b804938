"""One run at a time makes a folder: whoever makes it holds it, and others are told who that is.

A hold is a file that only one process can make (O_EXCL), as claims are: it says who holds, and counts up a beat while
that process lives. Holds of a folder are numbered; the highest counts. Who finds it ended, or its process dead, makes
the next one, which again only one can: nothing is ever taken from somebody by removing a file.

Whether a process lives is asked of the system where it runs on this machine; of another machine's only the beat is
seen, and one that stands still for LAPSE_S is that of a dead process. Clocks of machines are not compared.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError
from ki_ds.files import remedy
from ki_ds.launch.records import read_record, write_record
from ki_ds.progress import duration, say

LOCKS = ".locks"  # in the work directory: a folder of holds for each folder of it that was ever made
PERIOD_S = 2.0
LAPSE_S = 20.0


class Hold:
    """This process's hold of a folder of a work directory."""

    def __init__(self, root: Path, folder: str):
        """Take a folder that nobody holds.

        Raises:
            UserError: somebody does, or the work directory cannot be written.
        """
        self.folder, self.holds, self.beats = root / folder, root / LOCKS / folder, 0
        self.record: dict[str, Any] = {
            "token": secrets.token_hex(8), "host": socket.gethostname(), "process": os.getpid(), "machine": _machine(),
            "began": _began(os.getpid()), "since": datetime.now().isoformat(" ", "seconds"), "ended": False,
        }  # fmt: skip
        try:
            self.path = self._take()
        except OSError as error:
            raise UserError(f"{self.holds}: cannot be written: {error.strerror}. {remedy(error)}") from None

    def _take(self) -> Path:
        self.holds.mkdir(parents=True, exist_ok=True)
        while True:
            number, record = _newest(self.holds)
            if record is not None and lives(record, _file(self.holds, number)):
                raise UserError(
                    f"{self.folder}: is being made by another run: {words(record)}. Wait for it, or stop it."
                )
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

    def beat(self) -> None:
        """Say that this process lives; end it where another one has taken it for dead."""
        found = _newest(self.holds)[1]
        if found is not None and found.get("token") != self.record["token"]:
            print(f"error: {self.folder}: was taken over by {words(found)}, which saw no sign of life of this process",
                  file=sys.stderr, flush=True)  # fmt: skip
            os.kill(os.getpid(), signal.SIGTERM)
        self.beats += 1
        write_record(self.path, self.record | {"beat": self.beats})

    def end(self) -> None:
        """Let go; the file stays, so that its number is not used again."""
        write_record(self.path, self.record | {"ended": True})


@contextlib.contextmanager
def held(root: Path, folders: Sequence[str]) -> Iterator[None]:
    """Hold folders of a work directory that are being made, until the end of whatever kind.

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
            holds.append(Hold(root, folder))
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
    here = record is not None and record.get("machine") == _machine()
    return words(record) if record and not record.get("ended") and (not here or _alive(record)) else ""


def words(record: dict[str, Any]) -> str:
    """Who that is."""
    return f"host {record.get('host')}, process {record.get('process')}, since {record.get('since')}"


def lives(record: dict[str, Any], path: Path) -> bool:
    """Whether the process that made a hold is there; for one of another machine this waits for its next beat."""
    if record.get("ended"):
        return False
    if record.get("machine") == _machine():
        return _alive(record)
    limit, beat = time.monotonic() + LAPSE_S, record.get("beat")
    if record:
        say(f"{path.parent.name}: held by {words(record)}; looking for {duration(LAPSE_S)} whether it lives")
    while time.monotonic() < limit:
        time.sleep(PERIOD_S / 10)
        found = read_record(path) or {}
        if found.get("ended") or not path.exists():  # another one has the next number
            return False
        if found.get("machine") == _machine():  # it was being written
            return _alive(found)
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
    except FileNotFoundError:
        return []
    return [int(name) for name in names if name.isdecimal()]


def _file(holds: Path, number: int) -> Path:
    return holds / f"{number}.json"


def _alive(record: dict[str, Any]) -> bool:
    process = record.get("process")
    return type(process) is int and process > 0 and _began(process) == record.get("began") is not None


def _began(process: int) -> str | None:
    """When a process of this machine began, in the kernel's count, so that a number that is used again is not taken for
    it; None where it is gone, though its parent may not have asked for its end yet."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _answers(process)
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _answers(process: int) -> str | None:
    """The same for systems without /proc, which tell only whether there is one."""
    try:
        os.kill(process, 0)
    except PermissionError:
        pass
    except OSError:
        return None
    return "unknown"


def _machine() -> str:
    """Names this machine's numbering of processes: two containers of one host number theirs differently."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)
