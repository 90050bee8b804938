"""What a command says while it runs: lines of its own, and progress, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import time
from types import TracebackType
from typing import Any

LINE_EVERY_S = 10.0


def say(*words: object) -> None:
    """A line of the program's own."""
    print(*words, flush=True)


class _Outlasting(io.FileIO):
    """A terminal that takes what is written even after it has gone: a run that saves then must not fail for words."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


def outlast_terminal() -> None:
    """Have standard output and error take all that is written to them: letters that they do not know, in another form,
    and what comes after the terminal has gone."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # replaced by a program that runs this one
            continue
        stream.reconfigure(errors=errors)
        if stream.isatty() and not isinstance(getattr(stream.buffer, "raw", None), _Outlasting):
            stream.flush()
            there = io.BufferedWriter(_Outlasting(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(there, stream.encoding, errors, line_buffering=True))


def show_cursor() -> None:
    """Give a terminal its cursor back, which a bar hides; also from a signal's handler, and for killed ranks."""
    if os.isatty(1):
        with contextlib.suppress(OSError):
            os.write(1, b"\x1b[?25h")


def duration(seconds: float) -> str:
    """42s, 3m 20s, 5h 10m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m {whole % 60:02}s" if whole < 3600 else f"{whole // 3600}h {whole % 3600 // 60:02}m"


class Progress:
    """Counts of a long piece of work, with rate and time left."""

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0, shown: bool = True):
        self.label, self.total, self.unit, self.done, self.shown = label, total, unit, done, shown
        self.first, self.began, self.said = done, time.monotonic(), time.monotonic()
        self.note = ""
        self.lined: int | None = None  # what the last line said
        self.bar: Any = None
        if shown and sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("[bold]{task.description}", BarColumn(), "{task.fields[text]}", TimeRemainingColumn())
            self.bar = Bar(*(TextColumn(c) if isinstance(c, str) else c for c in columns))
            self.task = self.bar.add_task(label, total=total, completed=done, text="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        elif self.shown and kind is None and self.lined != self.done:
            self._line()

    def text(self) -> str:
        """`120/160 steps, 4.1 steps/s, 9s left, CE 5.31`."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        rate = (self.done - self.first) / elapsed
        parts = [f"{self.done:,}" + (f"/{self.total:,}" if self.total is not None else "") + f" {self.unit}"]
        if rate > 0:
            parts.append(
                f"{rate:,.1f} {self.unit}/s" if rate >= 0.1 else f"{1 / rate:,.0f} s a {self.unit.rstrip('s')}"
            )
        if rate > 0 and self.total is not None and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, self.note] if self.note else parts)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count work as done; `note` is shown behind the numbers."""
        self.done += count
        self.note = self.note if note is None else note
        if self.bar:
            self.bar.update(self.task, completed=self.done, text=self.text())
        elif self.shown and time.monotonic() - self.said > LINE_EVERY_S:
            self._line()

    def reach(self, done: int) -> None:
        """Count up to `done` of the total as done."""
        self.done = max(self.done, done)

    def _line(self) -> None:
        self.said, self.lined = time.monotonic(), self.done
        say(f"  {self.label}: {self.text()}")
