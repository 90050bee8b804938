"""A summary in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from ki_ds.report.savings import Record
from ki_ds.training.divergence import warning

SURE = 2  # standard errors that a difference must have to be told


def words(summary: Record) -> list[str]:
    """What a summary says, a sentence or two a line: warnings, then the comparisons."""
    return [*warnings(summary), *comparisons(summary["comparisons"], summary["models"])]


def warnings(summary: Record) -> list[str]:
    """A line for each model that has diverged."""
    return [warning(name, model["diverged"]) for name, model in summary["models"].items() if model["diverged"]]


def comparisons(records: Sequence[Record], models: Record) -> list[str]:
    """The sentences on some comparisons."""
    return [line for record in records for line in _describe(record, models)]


def number(value: float | None) -> str:
    """A perplexity for people."""
    if value is None:
        return "no finite value"
    return f"{value:.3g}" if value >= 1e6 else f"{value:,.1f}" if value >= 100 else f"{value:.2f}"


def of_teacher(teacher: Record, corpus: str, models: Record) -> str:
    """A teacher's perplexity for people: of predictions made elsewhere none is known."""
    measured = corpus in models.get(teacher["model"], {}).get("perplexities", {})
    return "unknown" if teacher["perplexity"] is None and not measured else number(teacher["perplexity"])


def _share(record: Record, key: str, unit: str) -> tuple[str, str]:
    """A verb and its object, the student being who acts: `saves`, `at least 26.7 % of the steps`."""
    value = record[key]
    bounded = record["lower_bound"] or record["upper_bound"]
    bound = ("at least " if record["lower_bound"] == (value >= 0) else "at most ") if bounded else ""
    amount = f"{bound}{abs(value) * 100:.1f} %"
    return ("saves", f"{amount} of the {unit}") if value >= 0 else ("takes", f"{amount} more {unit}")


def _shares(record: Record) -> str:
    """`the student saves 50.0 % of the steps and takes 5.0 % more FLOPs (takes 9.0 % more …)`."""
    if record["steps_saved"] is None:
        return "what that saves is unknown."
    (verb, steps), (also, flops) = _share(record, "steps_saved", "steps"), _share(record, "flops_saved", "FLOPs")
    line = f"the student {verb} {steps} and {'' if verb == also else also + ' '}{flops}"
    if record["flops_saved_with_teacher"] is None:
        return f"{line} (unknown with the teacher's inference counted: what that took is unknown)."
    taught = " ".join(_share(record, "flops_saved_with_teacher", "FLOPs"))
    return f"{line} ({taught} with the teacher's inference counted)."


def _finals(record: Record, models: Record) -> str:
    def model(role: str) -> str:
        teachers = " and ".join(dict.fromkeys(models[record[role]]["teachers"].values()))
        return f"{record[role]} ({f'inherits from {teachers}' if teachers else 'learns alone'})"

    mine, theirs, teacher = record["final"]["student"], record["final"]["baseline"], record["final"]["teacher"]
    line = f"{model('student')} ends at perplexity {number(mine)} on {record['corpus']}"
    line += f"; {model('baseline')} at {number(theirs)}"
    line += f"; its teacher {teacher['model']} at {of_teacher(teacher, record['corpus'], models)}." if teacher else "."
    if not mine or not theirs:
        return line
    change = f"{abs(mine / theirs - 1) * 100:.1f} %"
    higher = f"{change} higher" if mine < 10 * theirs else f"{mine / theirs:.3g} times as high"
    verdict = "as well" if mine == theirs else f"better, {change} lower" if mine < theirs else f"worse, {higher}"
    return f"{line} The student ends {verdict}."


def _course(record: Record) -> str:
    if record["ahead_from"] is not None:
        return f"From step {record['ahead_from']:,} on it is ahead at every evaluation."
    if record["behind_from"] is not None:
        return f"From step {record['behind_from']:,} on it is behind at every evaluation."
    return "Neither stays ahead."


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
    found, baseline = record["end"], record["baseline"]
    target = f"{baseline}'s final perplexity"
    if found is None:
        return f"{target} is not finite."
    if found["student_step"] is None:
        line = f"The student does not reach {target} within its {models[record['student']]['steps']:,} steps"
        since = found["baseline_step"]
        return line + (
            "." if since is None else f"; {baseline} is as good as the student at its end by step {since:,.0f}."
        )
    first = ", its first evaluation" if found["lower_bound"] else ""
    place = f"{found['student_step']:,.0f}{first}, where the baseline takes {found['baseline_steps']:,}"
    return f"The student reaches {target} at step {place}: {_shares(found)}"


def _hints(record: Record, models: Record) -> list[str]:
    lines, apart, teacher = [], record["difference"], record["final"]["teacher"]
    if apart and apart["nats"] is not None:
        error = apart["standard_error"]
        if error is None or abs(apart["nats"]) < SURE * error:
            range_ = "" if error is None else f" ± {SURE * error:.2g} ({SURE} standard errors)"
            lines.append(
                f"WARNING: the validation part of {record['corpus']} is too small to tell this difference: "
                f"{apart['nats']:.2g}{range_} nats a row."
            )
    if record["teacher_passed"] is not None:
        lines.append(
            f"The teacher {teacher['model']} is worse than {record['baseline']} is from step "
            f"{record['teacher_passed']:,.0f} on: what it has to give, it gives early. Let alpha reach zero by about "
            "then (inherit.teacher_steps), or take a better teacher."
        )
    keys = ("steps", "batch_size", "sequence_length")
    if any(models[record["student"]][key] != models[record["baseline"]][key] for key in keys):
        lines.append("The two differ in steps, batch size or sequence length: compare FLOPs rather than steps.")
    return lines


def _describe(record: Record, models: Record) -> list[str]:
    lines = [f"{_finals(record, models)} {_course(record)}", _at_break_away(record, models), _at_end(record, models)]
    return [*lines, *_hints(record, models)]
