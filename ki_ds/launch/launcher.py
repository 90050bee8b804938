"""Starts engine stages under the deepspeed launcher, watches their ranks, and stops everything that it started.

The launcher's exit code alone proves nothing: it is 0 when its own child was killed. What counts is the ranks' signs of
life (`heartbeat`), the process group, which is this module's own, and in the end the sealed folders.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import Literal

from ki_ds.launch import signals
from ki_ds.launch.command import Launch, command_line, launcher_environment
from ki_ds.launch.monitor import Monitor
from ki_ds.launch.process_group import end_group
from ki_ds.launch.signals import REQUEUE
from ki_ds.progress import say, show_cursor

LOOK_S = 0.5
GRACE_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    code: int
    how: Literal["ended", "silent", "stopped"]  # by itself; because ranks fell silent; after saving, as asked
    stop_requested: bool  # whether a signal wanted it to end


class StopSignals:
    """What to do on a signal while ranks run: save and end; on the same one again, end at once."""

    def __init__(self) -> None:
        self.received = 0  # the first one
        self.leaving = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        again = signals.note(number)
        self.received = self.received or number
        if again and not self.leaving:  # whatever comes then must not disturb the end
            self.leaving = True
            raise SystemExit(signals.code_of(number))


def launched(launch: Launch, stages: Sequence[str]) -> Outcome:
    """Run engine stages ("train:student") in ranks of their own, to the end.

    Raises:
        UserError: this machine has not the devices that were asked for.
    """
    launch.control.mkdir(parents=True, exist_ok=True)
    control = Path(mkdtemp(dir=launch.control))  # its own: what an earlier launch was told is not for these ranks
    monitor = Monitor(control, launch.processes, launch.timeout_s)
    process: subprocess.Popen[bytes] | None = None
    heard = StopSignals()
    with signals.listening(heard):
        try:
            # Ranks of this machine inherit the other end of the pipe as their standard input: it ends when this process
            # does, however that comes about.
            process = subprocess.Popen(
                command_line(launch, stages, control), env=launcher_environment(launch), start_new_session=True,
                stdin=subprocess.DEVNULL if launch.hostfile else subprocess.PIPE,
            )  # fmt: skip
            silent = _watch(process, monitor, heard)
        finally:
            if process is not None:
                _stop(process, monitor, on_nodes=launch.hostfile is not None)
            show_cursor()  # a rank that was killed has not
            ended = monitor.ended()
            if not (launch.hostfile and monitor.living()):  # who comes back from a network that was away finds "stop"
                shutil.rmtree(control, ignore_errors=True)
                with contextlib.suppress(OSError):
                    launch.control.rmdir()
    if silent:
        say(f"error: {silent}; everything is stopped")
        return Outcome(1, "silent", bool(heard.received))
    code = process.returncode
    # ranks that a launcher ends because another has failed may call it a stop, too
    saved = heard.received and "stopped" in ended and "failed" not in ended and code not in (0, 2)
    return Outcome(code, "stopped" if code == REQUEUE or saved else "ended", bool(heard.received))


def _watch(process: subprocess.Popen[bytes], monitor: Monitor, heard: StopSignals) -> str:
    """Wait until the launcher ends, or ranks fall silent; which ones, in words."""
    silent, word, told = "", "run", False
    while process.poll() is None and not silent:
        if heard.received and not told:
            line = "\n" if sys.stdout.isatty() else ""  # a bar of the ranks stands in this one
            say(f"{line}asked to stop ({signal.Signals(heard.received).name}): saving; the same again ends at once")
            told = True
        word = "save" if heard.received or monitor.stop_requested else word
        monitor.say(word)
        silent = monitor.look()
        time.sleep(LOOK_S)
    return silent


def _stop(process: subprocess.Popen[bytes], monitor: Monitor, on_nodes: bool) -> None:
    """Ranks must not outlive this: those on other nodes are told, what runs here is killed."""
    monitor.say("stop")
    limit = time.monotonic() + GRACE_S
    while on_nodes and monitor.living() and time.monotonic() < limit:
        time.sleep(LOOK_S)
    end_group(process, GRACE_S)
