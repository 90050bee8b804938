"""What a step gave, and its record: a line of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ki_ds.launch import distributed
from ki_ds.metrics import Metrics
from ki_ds.training.loader import Loader
from ki_ds.training.run import TrainRun


@dataclass(frozen=True)
class StepResult:
    """What a step of a run gave; losses in nats, means over the rows of the global batch."""

    step: int  # 0 … T - 1
    alpha: float
    loss: float
    ce: float
    kl: float | None  # over the rows that inherit; None where there is none
    learning_rate: float
    gradient_norm: float  # before clipping
    applied: bool  # False: the gradient was not finite, the step is passed over
    loss_scale: float | None  # of fp16
    skipped: int  # tries in vain, at higher loss scales
    asked_to_stop: bool  # some rank was

    @property
    def done(self) -> int:
        """Steps of the run that are done with this one."""
        return self.step + 1


class Records:
    """The records of a run, written to metrics.jsonl and TensorBoard by rank 0; a resumed run's times go on."""

    def __init__(self, run: TrainRun, loader: Loader, folder: Path, done: int):
        """`done`: steps that a checkpoint holds; records of later ones are dropped."""
        self.run, self.loader = run, loader
        self.metrics = Metrics(folder, done) if distributed.rank() == 0 else None
        last = self.metrics.last if self.metrics else {}
        names = ("seconds", "reading_seconds", "waited_seconds")
        self.seconds, self.reading_s, self.waited_s = (last.get(name, 0.0) for name in names)
        self.step_s = 0.0

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.metrics:
            self.metrics.close()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around a step: what it takes is its time."""
        began = time.monotonic()
        yield
        self.step_s = time.monotonic() - began
        self.seconds += self.step_s

    def record(self, result: StepResult, perplexity: dict[str, float] | None) -> dict[str, Any]:
        """A step as a line of metrics.jsonl says it; `perplexity`: on each corpus, where it was validated."""
        tokens = self.run.tokens_per_step
        found = {
            "loss": result.loss, "ce": result.ce, "kl": result.kl, "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm, "applied": result.applied, "loss_scale": result.loss_scale,
            "skipped": result.skipped, "step": result.done, "tokens": result.done * tokens, "seconds": self.seconds,
            "alpha": result.alpha, "tokens_per_second": tokens / self.step_s,
            "reading_seconds": self.reading_s + self.loader.reading_s,
            "waited_seconds": self.waited_s + self.loader.waited_s,
        }  # fmt: skip
        return found if perplexity is None else found | {"validation": perplexity}

    def write(self, result: StepResult, perplexity: dict[str, float] | None) -> dict[str, Any]:
        """Make a step's record, and write it where this is rank 0."""
        record = self.record(result, perplexity)
        if self.metrics:
            self.metrics.write(record)
        return record

    def sync(self) -> None:
        """Bring what was written to disk."""
        if self.metrics:
            self.metrics.sync()


def skipped_facts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the records of a whole run say of steps that were not applied, as facts of its manifest."""
    return {
        "skipped_steps": sum(not line["applied"] for line in lines),  # passed over
        "skipped_tries": sum(line["skipped"] for line in lines),  # done again at a lower loss scale
        "loss_scale": lines[-1]["loss_scale"],  # of the last step
    }
