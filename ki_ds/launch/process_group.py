"""Ends a process with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import time


def end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the process group that a process leads: SIGTERM, and SIGKILL for what is left `grace_s` seconds later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        limit = time.monotonic() + grace_s
        while time.monotonic() < limit:
            process.poll()  # reap the leader, so that the group can end
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
