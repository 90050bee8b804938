"""What inheritance saves: two runs compared by the steps and the FLOPs that they need for the same perplexity.

A curve is the list of a run's evaluations, (step, perplexity); between two of them the logarithm of the perplexity is
taken as linear. Evaluations without a finite, positive perplexity are left out of every interpolation. A saving is
`1 - student / baseline`, of steps or of FLOPs, and negative where the student needs more. Where the evaluations only
bound it, the record says so: `lower_bound` (at least this much) or `upper_bound` (at most).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    flops_per_sequence: float = Field(ge=0, allow_inf_nan=False, description="one forward pass")
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

    @property
    def break_away(self) -> int | None:
        """The step at which alpha reaches zero, if it does so before the end."""
        return self.teacher_steps if 0 < self.teacher_steps < self.steps else None


class Step(Recorded):
    """A line of metrics.jsonl; a value that was not finite may be null or NaN."""

    step: int = Field(gt=0)
    ce: float | None = None
    kl: float | None = None
    alpha: float | None = None
    validation: dict[str, float | None] = Field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    name: str
    facts: Facts
    history: tuple[Step, ...]

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

    def teacher_flops(self, steps: float) -> float:
        """FLOPs of its teachers' inference in its first steps, while alpha is above zero."""
        sequence = sum(teacher.share * teacher.flops_per_sequence for teacher in self.facts.teachers.values())
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
    own, reference = student.flops(step), baseline.flops(needed)
    spent = (step / needed, own / reference, (own + student.teacher_flops(step)) / reference)
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

    A lower bound where the student was there by its first evaluation.
    """
    target = final(baseline.curve(corpus))
    if target is None:
        return None
    curve, total = student.curve(corpus), baseline.facts.steps
    reached = first_step_reaching(curve, target)
    return {
        "student_step": reached,
        "baseline_steps": total,
        **_saving(student, reached, baseline, total),
        "lower_bound": _from_the_start(curve, reached),
        "upper_bound": False,
    }


def compare(student: Run, baseline: Run, corpus: str, teacher: Record | None) -> Record:
    """The record of a comparison on one corpus; `teacher` is the student's there: {"model", "perplexity"}."""
    mine, theirs = student.curve(corpus), baseline.curve(corpus)
    return {
        "student": student.name,
        "baseline": baseline.name,
        "corpus": corpus,
        "final": {"student": final(mine), "baseline": final(theirs), "teacher": teacher},
        "break_away": break_away(student, baseline, corpus),
        "end": end(student, baseline, corpus),
        "ahead_from": ahead_from(mine, theirs),
    }


def number(value: float | None) -> str:
    """A perplexity for people."""
    if value is None:
        return "no finite value"
    return f"{value:.3g}" if value >= 1e6 else f"{value:,.1f}" if value >= 100 else f"{value:.2f}"


def _share(record: Record, key: str, unit: str) -> str:
    """`26.7 % of its steps saved`, or `at least 5.0 % more steps`."""
    value = record[key]
    if value is None:
        return f"an unknown share of its {unit}"
    bounded = record["lower_bound"] or record["upper_bound"]
    bound = ("at least " if record["lower_bound"] == (value >= 0) else "at most ") if bounded else ""
    return f"{bound}{abs(value) * 100:.1f} % {f'of its {unit} saved' if value >= 0 else f'more {unit}'}"


def _shares(record: Record) -> str:
    steps, flops = _share(record, "steps_saved", "steps"), _share(record, "flops_saved", "FLOPs")
    taught = _share(record, "flops_saved_with_teacher", "FLOPs")
    return f"{steps}, {flops} ({taught} with the teacher's inference counted)."


def _finals(record: Record, models: Record) -> str:
    def model(role: str) -> str:
        teachers = " and ".join(dict.fromkeys(models[record[role]]["teachers"].values()))
        return f"{record[role]} ({f'inherits from {teachers}' if teachers else 'learns alone'})"

    mine, theirs, teacher = record["final"]["student"], record["final"]["baseline"], record["final"]["teacher"]
    line = f"{model('student')} ends at perplexity {number(mine)} on {record['corpus']}"
    line += f"; {model('baseline')} at {number(theirs)}"
    line += f"; its teacher {teacher['model']} at {number(teacher['perplexity'])}." if teacher else "."
    if not mine or not theirs:
        return line
    change = f"{abs(mine / theirs - 1) * 100:.1f} %"
    verdict = "as well" if mine == theirs else f"better, {change} lower" if mine < theirs else f"worse, {change} higher"
    return f"{line} The student ends {verdict}."


def _at_break_away(record: Record, models: Record) -> str:
    found, baseline = record["break_away"], record["baseline"]
    if found is None:
        return "There is no break-away: alpha does not fall from above zero to zero within the student's run."
    place = f"At break-away (step {found['step']:,}, where alpha reaches zero) the student"
    if found["student_perplexity"] is None:
        return f"{place} has no evaluation on both sides, so the saving there is unknown."
    place += f" is at {number(found['student_perplexity'])}; {baseline}"
    if found["lower_bound"]:
        return f"{place} does not reach it within its {models[baseline]['steps']:,} steps: {_shares(found)}"
    first = " at most, its first evaluation" if found["upper_bound"] else ""
    return f"{place} needs {found['baseline_step']:,.0f} steps for that{first}: {_shares(found)}"


def _at_end(record: Record, models: Record) -> str:
    found, target = record["end"], f"{record['baseline']}'s final perplexity"
    if found is None:
        return f"{target} is not finite."
    if found["student_step"] is None:
        return f"The student does not reach {target} within its {models[record['student']]['steps']:,} steps."
    first = ", its first evaluation" if found["lower_bound"] else ""
    place = f"{found['student_step']:,.0f}{first}, where the baseline takes {found['baseline_steps']:,}"
    return f"The student reaches {target} at step {place}: {_shares(found)}"


def _describe(record: Record, models: Record) -> list[str]:
    since = record["ahead_from"]
    ahead = f"From step {since:,} on it is ahead at every evaluation." if since else "It does not stay ahead."
    lines = [f"{_finals(record, models)} {ahead}", _at_break_away(record, models), _at_end(record, models)]
    keys = ("steps", "batch_size", "sequence_length")
    if any(models[record["student"]][key] != models[record["baseline"]][key] for key in keys):
        lines.append("The two differ in steps, batch size or sequence length: compare FLOPs rather than steps.")
    return lines


def words(summary: Record) -> list[str]:
    """The comparisons of a summary in plain words, a sentence or two a line."""
    return [line for record in summary["comparisons"] for line in _describe(record, summary["models"])]
