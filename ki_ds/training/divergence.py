"""Steps that are not finite: passed over one by one, until there are too many of them."""

from __future__ import annotations

from ki_ds.errors import UserError
from ki_ds.training.records import StepResult
from ki_ds.training.run import TrainRun

MOST_SKIPPED = 10  # steps in a row


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
