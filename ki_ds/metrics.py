"""The numbers of a training run: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ki_ds.files import write_atomically


class Metrics:
    """`metrics.jsonl` and TensorBoard of one run; opened at a step, later lines of an earlier try are cut off."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = self.path.open("a", encoding="utf-8")
        self.last: dict[str, Any] = kept[-1] if kept else {}  # the last line that was kept
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
