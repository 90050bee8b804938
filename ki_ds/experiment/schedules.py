"""Schedules: α and its length (section 3, and the schedules of section 4.1), and the learning rate."""

from __future__ import annotations

import math

from ki_ds.experiment.schema import Inherit, Train

CONSTANT_ALPHA = 0.5


def teacher_steps(inherit: Inherit | None, steps: int) -> int:
    """How many of the first steps have α > 0."""
    if inherit is None:
        return 0
    if inherit.teacher_steps is not None:
        return min(inherit.teacher_steps, steps)
    if inherit.alpha_T is None:
        return steps
    # α_t = 1 - alpha_T · t / T > 0 for t < T / alpha_T; the rounding guards against 3 / 0.3 = 10.000000000000002
    # and alpha_0 is 1 whatever alpha_T is
    return max(math.ceil(round(min(steps / inherit.alpha_T, steps), 9)), 1)


def alpha(inherit: Inherit | None, step: int, steps: int) -> float:
    """α of step t = 0 … T - 1.

    linear: max(1 - α_T · t / T, 0), with α_T = T / teacher_steps where the latter is given; heaviside: 1 as long as
    linear is above 0; constant: one value, to the end or for teacher_steps.
    """
    if inherit is None or step >= teacher_steps(inherit, steps):
        return 0.0
    if inherit.schedule == "heaviside":
        return 1.0
    if inherit.schedule == "constant":
        return CONSTANT_ALPHA if inherit.alpha is None else inherit.alpha
    if inherit.teacher_steps is not None:
        return 1 - step / inherit.teacher_steps
    assert inherit.alpha_T is not None  # Inherit checks it
    return max(1 - inherit.alpha_T * step / steps, 0.0)


def learning_rate(train: Train, step: int) -> float:
    """Of step 0 … T - 1: linear from lr / warm-up steps to lr, then lr, then linear from lr to lr / decay steps, never
    zero; the decay is all that follows the warm-up, or nothing, or `decay_steps`."""
    warmup = round(train.warmup * train.steps) if train.warmup_steps is None else train.warmup_steps
    decay = train.steps - warmup if train.schedule == "linear" else train.decay_steps or 0
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if step < train.steps - decay:
        return train.learning_rate
    return train.learning_rate * (train.steps - step) / decay


def shared_steps(train: Train, inherit: Inherit | None) -> int:
    """How many of its first steps a run has in common with every longer one that is otherwise the same: where its
    learning rate or its α goes by T, none."""
    if train.schedule == "linear" or (inherit is not None and inherit.alpha_T is not None):
        return 0
    return train.steps - (train.decay_steps or 0)
