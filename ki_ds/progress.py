"""Progress on rank 0: a bar on a terminal, plain lines elsewhere; and the metrics of a run."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ki_ds.sealed import write_atomically

LINE_EVERY_S = 10.0


def say(*words: object) -> None:
    """A line of the program's own."""
    print(*words, flush=True)


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
        """`120/160 steps, 4.1 steps/s, 9s left, loss 5.31`."""
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


class Metrics:
    """`metrics.jsonl` and TensorBoard of one run; opened at a step, later lines of an earlier try are cut off."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = self.path.open("a", encoding="utf-8")
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """One step's record; null for what is not finite."""
        clean = {key: finite(value) for key, value in record.items()}
        self.file.write(json.dumps(clean, allow_nan=False) + "\n")
        self.file.flush()
        for key, value in clean.items():
            for name, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, (int, float)) and key != "step":
                    self.tensorboard.add_scalar(f"{key}/{name}" if name else key, number, record["step"])

    def sync(self) -> None:
        """Bring what was written to disk: a checkpoint must not know of steps that the metrics do not."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush and close both."""
        self.file.close()
        self.tensorboard.close()


def finite(value: Any) -> Any:
    """The value, with None for each float that JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line that was cut off in writing is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records
