"""What inheritance saves: two runs compared by the steps and the FLOPs that they need for the same perplexity.

A curve is the list of a run's evaluations, (step, perplexity); between two of them the logarithm of the perplexity is
taken as linear. Evaluations without a finite, positive perplexity are left out of every interpolation. A saving is
`1 - student / baseline`, of steps or of FLOPs, and negative where the student needs more. Where the evaluations only
bound it, the record says so: `lower_bound` (at least this much) or `upper_bound` (at most).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field

from ki_ds.experiment.strict import Strict

Curve = Sequence[tuple[int, float]]
Record = dict[str, Any]  # a JSON object of summary.json


class Recorded(Strict):
    """A part of a file that another stage wrote: further keys are not for this one, and a run may have diverged."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)


class TeacherCost(Recorded):
    """A teacher's part in a student's step."""

    model: str
    flops_per_sequence: float | None = Field(
        ge=0, allow_inf_nan=False, description="one forward pass; null, formerly 0: predictions made elsewhere"
    )
    share: float = Field(ge=0, le=1, description="of the sequences of a step, those of this corpus")


class Facts(Recorded):
    """Sizes and costs of a training run, from its manifest."""

    parameters: int
    steps: int = Field(gt=0)
    batch_size: int
    sequence_length: int
    flops_per_step: float = Field(gt=0, allow_inf_nan=False, description="forward and backward")
    teacher_steps: int = Field(0, ge=0, description="steps with alpha > 0")
    teachers: dict[str, TeacherCost] = Field({}, description="by corpus")
    precision: str | None = None
    ranks: int | None = None
    device: str | None = None
    diverged: dict[str, dict[str, float | None]] = Field({}, description="by corpus, as training/divergence.py says")

    @property
    def break_away(self) -> int | None:
        """The step at which alpha reaches zero, if it does so before the end."""
        return self.teacher_steps if 0 < self.teacher_steps < self.steps else None


@dataclass(frozen=True)
class Step:
    """What is read of a line of metrics.jsonl; a value that was not finite may be None or NaN."""

    step: int
    ce: float | None = None
    kl: float | None = None
    alpha: float | None = None
    validation: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    name: str
    facts: Facts
    history: tuple[Step, ...]  # from step 1 on
    initial: dict[str, float | None] = field(default_factory=dict)  # perplexities before the first step
    seconds: float | None = None  # in its steps

    def corpora(self) -> list[str]:
        """The corpora it was evaluated on, in the order of their first appearance."""
        return list(dict.fromkeys(corpus for row in self.history for corpus in row.validation))

    def curve(self, corpus: str) -> Curve:
        """Its evaluations on a corpus, NaN where the perplexity was not recorded."""
        rows = ((row.step, row.validation[corpus]) for row in self.history if corpus in row.validation)
        return [(step, math.nan if value is None else value) for step, value in rows]

    def flops(self, steps: float) -> float:
        """FLOPs of its first steps."""
        return steps * self.facts.flops_per_step

    def teacher_flops(self, steps: float) -> float | None:
        """FLOPs of its teachers' inference in its first steps, while alpha is above zero; None: one's are unknown."""
        sequence = 0.0
        for teacher in self.facts.teachers.values():
            if not teacher.flops_per_sequence:
                return None
            sequence += teacher.share * teacher.flops_per_sequence
        return min(steps, self.facts.teacher_steps) * self.facts.batch_size * sequence


# ------------------------------------------------------------------------------------------------------------- curves


def usable(perplexity: float) -> bool:
    """Whether it has a logarithm."""
    return math.isfinite(perplexity) and perplexity > 0


def finite(value: float | None) -> float | None:
    """The value as JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None


def final(curve: Curve) -> float | None:
    """The last evaluation's perplexity; None where it is not finite or there is none."""
    return finite(curve[-1][1]) if curve else None


def first_step_reaching(curve: Curve, perplexity: float) -> float | None:
    """The first step at which the curve is at or below a perplexity, no sooner than its first evaluation, or None."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if not usable(value):
            continue
        if value <= perplexity:
            if before is None:
                return float(step)
            fall = math.log(before[1]) - math.log(value)
            part = (math.log(before[1]) - math.log(perplexity)) / fall if fall > 0 else 1.0
            return before[0] + part * (step - before[0])
        before = (step, value)
    return None


def perplexity_at(curve: Curve, step: int) -> float | None:
    """The perplexity at a step; None before the first evaluation and after the last."""
    points = {at: value for at, value in curve if usable(value)}
    if step in points or not min(points, default=step) < step < max(points, default=step):
        return points.get(step)
    return math.exp(np.interp(step, [*points], np.log([*points.values()])))


def ahead_from(student: Curve, baseline: Curve) -> int | None:
    """The first common evaluation from which on the student is better at every one; None if it is not at the last."""
    other = dict(baseline)
    since: int | None = None
    for step, mine in student:
        if step in other:
            ahead = usable(mine) and not other[step] <= mine  # also ahead of one that is not a number
            since = (since or step) if ahead else None
    return since


# -------------------------------------------------------------------------------------------------------- comparisons


def _saving(student: Run, step: float | None, baseline: Run, needed: float) -> Record:
    """What the student's `step` saves of the baseline's `needed` steps; null where the student's is unknown."""
    keys = ("steps_saved", "flops_saved", "flops_saved_with_teacher")
    if step is None:
        return dict.fromkeys(keys)
    own, reference, taught = student.flops(step), baseline.flops(needed), student.teacher_flops(step)
    spent = (step / needed, own / reference, math.nan if taught is None else (own + taught) / reference)
    return {key: finite(1 - part) for key, part in zip(keys, spent, strict=True)}


def _from_the_start(curve: Curve, step: float | None) -> bool:
    """Whether a step that was found is the first evaluation, so that the true one may be earlier."""
    return step is not None and step == next((at for at, value in curve if usable(value)), None)


def break_away(student: Run, baseline: Run, corpus: str) -> Record | None:
    """What is saved where alpha reaches zero; None if it does not within the run.

    A lower bound where the baseline never gets as far; an upper bound where it was there by its first evaluation.
    """
    step = student.facts.break_away
    if step is None:
        return None
    curve = baseline.curve(corpus)
    perplexity = perplexity_at(student.curve(corpus), step)
    reached = None if perplexity is None else first_step_reaching(curve, perplexity)
    needed = baseline.facts.steps if reached is None else reached
    return {
        "step": step,
        "student_perplexity": perplexity,
        "baseline_step": reached,
        **_saving(student, None if perplexity is None else step, baseline, needed),
        "lower_bound": perplexity is not None and reached is None,
        "upper_bound": _from_the_start(curve, reached),
    }


def end(student: Run, baseline: Run, corpus: str) -> Record | None:
    """What is saved when the student is as good as the baseline at its end; None if that end is not finite.

    A lower bound where the student was there by its first evaluation. Where it never is, `baseline_step` is where
    the baseline was as good as the student at its end.
    """
    target = final(baseline.curve(corpus))
    if target is None:
        return None
    curve, total = student.curve(corpus), baseline.facts.steps
    reached = first_step_reaching(curve, target)
    return {
        "student_step": reached,
        "baseline_steps": total,
        "baseline_step": first_step_reaching(baseline.curve(corpus), curve[-1][1]) if reached is None else None,
        **_saving(student, reached, baseline, total),
        "lower_bound": _from_the_start(curve, reached),
        "upper_bound": False,
    }


def teacher_passed(baseline: Run, corpus: str, teacher: Record | None) -> float | None:
    """Where the baseline becomes as good as a teacher that is worse than the baseline at its end; else None."""
    curve, known = baseline.curve(corpus), teacher["perplexity"] if teacher else None
    at_end = final(curve)
    return first_step_reaching(curve, known) if known and at_end and at_end < known else None


def difference(student_T: np.ndarray, baseline_T: np.ndarray, rows: int) -> Record:
    """What two models differ by on one validation part, in nats a row, student − baseline, and how sure that is.

    Sequences are taken as independent, and compared pair by pair: what is hard for both does not count.

    Args:
        student_T, baseline_T: the cross-entropy of each sequence, a sum over its rows.
        rows: of all sequences.
    """
    sequences, apart_T = len(student_T), (student_T - baseline_T) * len(student_T) / rows
    error = float(apart_T.std(ddof=1)) / math.sqrt(sequences) if sequences > 1 else None
    return {"nats": finite(float(apart_T.mean())), "standard_error": finite(error)}


def compare(
    student: Run,
    baseline: Run,
    corpus: str,
    ends: tuple[float | None, float | None],
    teacher: Record | None,
    apart: Record | None,
) -> Record:
    """The record of a comparison on one corpus.

    Args:
        ends: the perplexities of student and baseline in the end.
        teacher: the student's there, {"model", "perplexity"}.
        apart: `difference`, where it is known.
    """
    mine, theirs = student.curve(corpus), baseline.curve(corpus)
    return {
        "student": student.name,
        "baseline": baseline.name,
        "corpus": corpus,
        "final": {"student": ends[0], "baseline": ends[1], "teacher": teacher},
        "difference": apart,
        "break_away": break_away(student, baseline, corpus),
        "end": end(student, baseline, corpus),
        "ahead_from": ahead_from(mine, theirs),
        "behind_from": ahead_from(theirs, mine),
        "teacher_passed": teacher_passed(baseline, corpus, teacher),
    }
