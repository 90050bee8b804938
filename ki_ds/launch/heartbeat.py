"""Signs of life of a distributed run, so that a rank that dies or hangs stops the run instead of holding it for ever.

Every rank keeps a small file in the *control folder* that all of them see: what it is doing, how often that has changed
(`progress`), and a `beat` that a thread counts up while the process lives. One *monitor* reads them: the `ki-ds run`
that started the ranks, or rank 0 where a launcher was called directly. Its own file holds a beat too, and its word:
"run", "save" (write a checkpoint and end) or "stop". Beats are counters: the clocks of machines are not compared.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ki_ds import files
from ki_ds.launch import signals
from ki_ds.launch.monitor import WORD_FILE, Monitor, rank_file
from ki_ds.launch.processes import this_process
from ki_ds.launch.records import read_record, write_record
from ki_ds.launch.signals import Stopped
from ki_ds.progress import duration, show_cursor

PERIOD_S = 1.0
PATIENCE = 6  # a long piece of work may take so many times the limit
EXPLAINED_S = 3.0  # within which a SIGTERM that is to save is followed by the monitor's word


class Heartbeat:
    """A rank's sign of life."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.rank, self.count, self.progress = 0, 0, 0
        self.doing, self.waiting, self.ended = "starting", False, ""
        self.stop_requested = threading.Event()  # to save and end
        self.watched = False  # by the process that started the ranks
        self.terminated: float | None = None  # since when SIGTERM waits for an explanation
        self.patience = 1  # how many times the usual limit this may take
        self.lock = threading.Lock()
        self.timeout_s = 600.0

    def write(self) -> None:
        """Say how this rank is."""
        with self.lock:
            self.count += 1
            if self.file is not None:
                write_record(self.file, {
                    **this_process(), "rank": self.rank, "beat": self.count,
                    "progress": self.progress, "doing": self.doing, "waiting": self.waiting, "ended": self.ended,
                    "stop_requested": self.stop_requested.is_set(), "patience": self.patience,
                })  # fmt: skip


THIS_RANK = Heartbeat()  # a process is one rank


def report(doing: str, waiting: bool = False) -> None:
    """Say what this rank is about to do; called again and again, this is what shows that it gets on. `waiting`: for
    other ranks, which are the ones to be watched then."""
    THIS_RANK.progress += 1
    THIS_RANK.doing, THIS_RANK.waiting = doing, waiting


def count() -> None:
    """Say that this rank gets on with what it reported last."""
    THIS_RANK.progress += 1


@contextlib.contextmanager
def lengthy(doing: str) -> Any:
    """Around one long piece of work of a library, which cannot say that it gets on."""
    report(doing)
    THIS_RANK.patience = PATIENCE
    try:
        yield
    finally:
        THIS_RANK.patience = 1


@contextlib.contextmanager
def waiting_for_others() -> Any:
    """Around a collective operation."""
    before = THIS_RANK.doing
    report(f"{before}: waiting for other ranks", waiting=True)
    try:
        yield
    finally:
        report(before)


def asked_to_stop() -> bool:
    """Whether a signal, or the monitor, has asked to save and end."""
    return THIS_RANK.stop_requested.is_set() or (bool(signals.asked) and not THIS_RANK.watched)


def exit_code() -> int:
    """The exit code of a rank that has stopped; what the run ends with then says the process that watches it."""
    return signals.REQUEUE if THIS_RANK.watched else signals.exit_code()


def stop_if_asked() -> None:
    """For work that needs no saving.

    Raises:
        Stopped: it was asked for.
    """
    if asked_to_stop():
        raise Stopped


def start(folder: Path, rank: int, world_size: int, timeout_s: float, watched: bool) -> None:
    """Begin to give signs of life, and to listen for the monitor's word; `watched`: by the process that started the
    ranks, else rank 0 watches. The signals of `signals` from now on ask for saving and ending; the same one again ends
    at once.

    To ranks that are watched, SIGTERM alone says nothing: it comes with a preemption, of which the monitor hears too,
    and from a launcher that ends the ranks because one of them has died. Without the monitor's word they end.
    """
    THIS_RANK.rank, THIS_RANK.file, THIS_RANK.timeout_s = rank, folder / rank_file(rank), timeout_s
    THIS_RANK.watched = watched
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    watching = rank == 0 and not watched
    for left in folder.glob("rank-*.json") if watching else ():  # of an earlier run; who lives writes again
        left.unlink(missing_ok=True)
    THIS_RANK.write()
    files.on_piece[:] = [count]
    signals.listen(_on_signal)
    monitor = Monitor(folder, world_size, timeout_s) if watching else None
    threading.Thread(target=_live, args=(folder, timeout_s, monitor), daemon=True, name="heartbeat").start()


def end(how: str) -> None:
    """The last sign of life: "done", "stopped" or "failed"."""
    THIS_RANK.ended = how
    THIS_RANK.write()


def _on_signal(number: int, _frame: Any) -> None:
    again = signals.note(number)
    if THIS_RANK.watched and number == signal.SIGTERM:
        THIS_RANK.terminated = THIS_RANK.terminated or time.monotonic()
        return
    if again:
        show_cursor()
        os._exit(signals.code_of(number))
    THIS_RANK.stop_requested.set()


def _live(folder: Path, timeout_s: float, monitor: Monitor | None) -> None:
    """Write beats and do as the monitor says, until the process ends; with a `monitor`, be the one that watches."""
    # what stands there before rank 0 watches is of an earlier run
    earlier = None if THIS_RANK.watched else read_record(folder / WORD_FILE)
    word, heard = earlier, time.monotonic()
    while True:
        THIS_RANK.write()
        if monitor is not None:
            _watch(monitor)
        found = read_record(folder / WORD_FILE)
        if found != word:
            word, heard = found, time.monotonic()
        said = (word or {}).get("say") if word != earlier else None
        if said == "stop":
            _leave(None if THIS_RANK.watched else f"rank {THIS_RANK.rank}: stops, as rank 0 says")
        if said == "save":
            THIS_RANK.stop_requested.set()
        _leave_if_unexplained()
        if time.monotonic() - heard > timeout_s + 10 * PERIOD_S:
            _leave(
                f"rank {THIS_RANK.rank}: nothing heard for {duration(timeout_s)} from the process that watches this run"
            )
        time.sleep(PERIOD_S)


def _watch(monitor: Monitor) -> None:
    silent = monitor.look()
    monitor.say("stop" if silent else "save" if monitor.stop_requested else "run")
    if silent:
        _leave(f"{silent}; this run stops")


def _leave_if_unexplained() -> None:
    """End where a SIGTERM was not followed by the monitor's word to save."""
    since = THIS_RANK.terminated
    if since and not THIS_RANK.stop_requested.is_set() and time.monotonic() - since > EXPLAINED_S:
        _leave(None)


def _leave(why: str | None) -> None:
    """End this process, whatever its main thread hangs in."""
    end("failed")
    show_cursor()
    if why:
        print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(1)
