"""What a step gave, and its record: a line of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ki_ds.engine import checkpoints
from ki_ds.launch import distributed
from ki_ds.metrics import Metrics
from ki_ds.training.loader import Loader
from ki_ds.training.run import TrainRun


class CorpusMeans(NamedTuple):
    """Of the rows of one corpus in a step; None where there is none."""

    ce: float | None
    kl: float | None  # over the rows that inherit


@dataclass(frozen=True)
class StepResult:
    """What a step of a run gave; losses in nats, means over the rows of the global batch."""

    step: int  # 0 … T - 1
    alpha: float
    loss: float
    ce: float
    kl: float | None  # over the rows that inherit; None where there is none
    temperature: float  # τ
    corpora: dict[str, CorpusMeans]
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

    @property
    def words(self) -> str:
        """For the progress line: CE, and not the loss, which rises as α falls."""
        return f"CE {self.ce:.3f}" + (f", KL {self.kl:.3f}, alpha {self.alpha:.2f}" if self.kl is not None else "")


class Records:
    """The records of a run, written to metrics.jsonl and TensorBoard by rank 0; a resumed run's times go on."""

    def __init__(self, run: TrainRun, loader: Loader, folder: Path, done: int):
        """`done`: steps that a checkpoint holds; records of later ones are dropped.

        Raises:
            UserError: those up to it are not whole.
        """
        self.run, self.loader = run, loader
        self.metrics = Metrics(folder, done, partial(making_again, folder)) if distributed.rank() == 0 else None
        last = self.metrics.last if self.metrics else {}
        names = ("seconds", "reading_seconds", "waited_seconds")
        self.seconds, self.reading_s, self.waited_s = (last.get(name) or 0.0 for name in names)
        self.step_s = 0.0

    @property
    def first_perplexity(self) -> dict[str, float | None]:
        """By corpus, of the run's first validation; known to rank 0."""
        return self.metrics.first_perplexity if self.metrics else {}

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
        found: dict[str, Any] = {
            "loss": result.loss, "ce": result.ce, "kl": result.kl,
            "kl_tau2": None if result.kl is None else result.temperature**2 * result.kl,
            "corpora": {name: means._asdict() for name, means in result.corpora.items()},
            "learning_rate": result.learning_rate, "gradient_norm": result.gradient_norm, "applied": result.applied,
            "loss_scale": result.loss_scale, "skipped": result.skipped, "step": result.done,
            "tokens": result.done * tokens, "seconds": self.seconds, "alpha": result.alpha,
            "tokens_per_second": tokens / self.step_s, "reading_seconds": self.reading_s + self.loader.reading_s,
            "waited_seconds": self.waited_s + self.loader.waited_s,
        }  # fmt: skip
        return found if perplexity is None else found | {"validation": perplexity}

    def begin(self, perplexity: dict[str, float]) -> dict[str, Any]:
        """Make the record of the model before its first step, and write it where this is rank 0."""
        record = {"step": 0, "tokens": 0, "seconds": 0.0, "validation": perplexity}
        if self.metrics:
            self.metrics.write(record)
        return record

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


def making_again(folder: Path, done: int) -> str:
    """What to do where the metrics of a model that is not sealed are whole up to step `done` only: going on from a
    checkpoint that is no later makes the others again."""
    saved = checkpoints.saved(folder / "checkpoints")
    later = [str(here) for step, here in saved.items() if step > done]
    earlier = max((step for step in saved if step <= done), default=None)
    if earlier is None:
        return f"Remove {folder / 'checkpoints'}, and run the same command again: it trains from the first step."
    removed = f"Remove {' and '.join(later)}, and run" if later else "Run"
    return f"{removed} the same command again: it goes on from step {earlier} and makes the missing lines again."
