"""Runs that go wrong: steps that are not finite, passed over until there are too many of them, and a validation
perplexity that rises far above the first one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ki_ds.errors import UserError
from ki_ds.metrics import finite
from ki_ds.progress import say
from ki_ds.training.records import StepResult
from ki_ds.training.run import TrainRun

MOST_SKIPPED = 10  # steps in a row
FAR_ABOVE = 2.0  # times the first validation perplexity

Perplexities = dict[str, float | None]  # by corpus; None: not finite


class SkippedSteps:
    """Counts the steps in a row that were not applied."""

    def __init__(self, run: TrainRun):
        self.run, self.in_a_row = run, 0

    def count(self, result: StepResult) -> None:
        """Count a step.

        Raises:
            UserError: it is one too many.
        """
        self.in_a_row = 0 if result.applied else self.in_a_row + 1
        if self.in_a_row > MOST_SKIPPED:
            raise not_finite(self.run, result)


def not_finite(run: TrainRun, result: StepResult) -> UserError:
    """The error of a run that diverged, with its last step; with a fixed loss scale of fp16, perhaps."""
    size, step, scale = run.train.batch_size, result.step, result.loss_scale
    fixed = "" if scale is None else f"Leave fp16.loss_scale (now {scale:g}) out of the engine JSON: it adapts then. "
    return UserError(
        f"models.{run.name}: loss or gradient was not finite in {MOST_SKIPPED + 1} steps in a row, the last being step "
        f"{step}, samples {(step - MOST_SKIPPED) * size} to {(step + 1) * size}. {fixed}Lower "
        f"train.learning_rate (now {run.train.learning_rate:g}), or look at these sequences; the last checkpoint is "
        "from before."
    )


def overflow(run: TrainRun, step: int, tried: list[float], finite_loss: bool) -> UserError:
    """The error of a step that overflows fp16 at every loss scale; those that were tried."""
    size, last = run.train.batch_size, tried[-1]
    what = "the gradient overflows" if finite_loss else "the loss itself is not finite"
    least = "Lower fp16.min_loss_scale in the engine JSON. " if last > 1 and finite_loss else ""
    return UserError(
        f"models.{run.name}: step {step}, samples {step * size} to {(step + 1) * size}: {what} in fp16, also at "
        f"the lowest loss scale, {last:g} ({len(tried)} tries, the first at {tried[0]:g}). {least}Use an engine JSON "
        f"with bf16 or fp32, lower train.learning_rate (now {run.train.learning_rate:g}), or look at these "
        "sequences; the last checkpoint is from before."
    )


# ------------------------------------------------------------------------------------------------- validation


def diverged(first: Perplexities, now: Perplexities) -> dict[str, dict[str, float | None]]:
    """The corpora on which a perplexity is far above the first one, or no longer finite, with both."""
    return {
        corpus: {"first": before, "now": now[corpus]}
        for corpus, before in first.items()
        if before is not None and corpus in now and not (now[corpus] or math.inf) <= FAR_ABOVE * before
    }


def warning(name: str, found: dict[str, dict[str, float | None]]) -> str:
    """The words of a run that has diverged."""
    values = "; ".join(
        f"on {corpus} {'not finite' if one['now'] is None else format(one['now'], '.4g')}, at first {one['first']:.4g}"
        for corpus, one in found.items()
    )
    return f"WARNING: {name} has diverged: validation perplexity {values}. Lower train.learning_rate."


class DivergenceWatch:
    """Says once that a run diverges."""

    def __init__(self, run: TrainRun, first: Perplexities):
        """`first`: of the run's first validation; empty where this rank is not to speak."""
        self.run, self.first, self.said = run, first, False

    def __call__(self, result: StepResult, perplexity: dict[str, float] | None) -> None:
        found = diverged(self.first, finite(perplexity or {}))
        if found and not self.said:
            say(f"  step {result.done}: {warning(f'train {self.run.name}', found)}")
            self.said = True


# ------------------------------------------------------------------------------------------- of the whole run


def run_facts(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the records of a whole run say of steps that were not applied and of how it ended, for its manifest."""
    steps = tries = 0
    scale: float | None = None
    first: Perplexities = {}
    last: Perplexities = {}
    for line in lines:
        steps += not line.get("applied", True)  # passed over
        tries += line.get("skipped", 0)  # done again at a lower loss scale
        scale = line.get("loss_scale")  # of the last step
        last = last | line.get("validation", {})
        first = line.get("validation", {}) | first
    return {"skipped_steps": steps, "skipped_tries": tries, "loss_scale": scale, "diverged": diverged(first, last)}
