"""What killed runs leave in a work directory's control folder, found and removed by a later one."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

STILL_S = 30.0  # who lives changes a file of its folder every second


class Leftovers:
    """The folders below `.control` in which nobody lives.

    Whoever lives there writes beats, on whatever host: what is as it was half a minute before is nobody's. Neither
    the clocks nor the processes of other machines are asked. One that lives, but was held up for so long, loses
    nothing: it makes its folder again with the next beat.
    """

    def __init__(self, control: Path):
        self.control, self.seen, self.began = control, self._look(control), time.monotonic()

    @staticmethod
    def _look(control: Path) -> dict[Path, dict[str, bytes]]:
        """The files of every folder that holds some, or nothing."""
        found = {}
        for folder in control.rglob("*"):
            with contextlib.suppress(OSError):  # removed meanwhile
                if folder.is_dir():
                    inside = [*folder.iterdir()]
                    if not any(one.is_dir() for one in inside):
                        found[folder] = {one.name: one.read_bytes() for one in inside}
        return found

    def clear(self) -> None:
        """Remove what has not changed, where enough time has passed to tell."""
        if not self.seen or time.monotonic() - self.began < STILL_S:
            return
        now = self._look(self.control)
        for folder, files in self.seen.items():
            if now.get(folder) == files:
                shutil.rmtree(folder, ignore_errors=True)
                if folder.parent != self.control:
                    with contextlib.suppress(OSError):
                        folder.parent.rmdir()
