"""The signals that ask a process to save and end, and the exit code that answers them.

It imports nothing heavy: a process listens before it has loaded its libraries.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
REQUEUE = 75  # the exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h

asked: list[int] = []  # the signals that this process has heard, in order


class Stopped(BaseException):
    """The run was asked to stop, and has: what was worth saving is saved.

    No `Exception`: whatever handles the failures of an input or of a library must not take this for one.
    """


def code_of(number: int) -> int:
    """130 for Ctrl-C and 129 for a lost terminal, as shells have it; 75, for schedulers, for the others."""
    return 128 + number if number in (signal.SIGINT, signal.SIGHUP) else REQUEUE


def exit_code() -> int:
    """The exit code of a process that has stopped: that of the first signal; 75 where it was told by other means."""
    return code_of(asked[0] if asked else signal.SIGTERM)


def note(number: int) -> bool:
    """Note a signal; whether it is the second of its kind, which ends the process at once.

    A terminal that goes away sends SIGHUP more than once, and launchers follow Ctrl-C with a SIGTERM of their own.
    """
    again = number in asked and number != signal.SIGHUP
    asked.append(number)
    return again


def listen(handler: Callable[[int, FrameType | None], Any]) -> dict[signal.Signals, Any]:
    """Have a handler for the signals but those that are ignored (as SIGHUP is by nohup); returns those before."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


@contextlib.contextmanager
def listening(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """`listen`, until this is left."""
    before = listen(handler)
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled or signal.SIG_DFL)
