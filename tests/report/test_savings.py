"""Savings against numbers worked out by hand, their bounds, and the words that tell them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_ds.report import savings
from ki_ds.report.savings import Facts, Run, Step, ahead_from, difference, final, first_step_reaching, perplexity_at
from ki_ds.report.words import words

TEACHERS = {
    "docs": {"model": "small", "flops_per_sequence": 0.2, "share": 0.5},
    "code": {"model": "small", "flops_per_sequence": 0.4, "share": 0.25},
}


def make_run(name, curve, steps=None, flops_per_step=2.0, teacher_steps=0, teachers=None):
    facts = {
        "parameters": 10,
        "steps": steps or curve[-1][0],
        "batch_size": 4,
        "sequence_length": 8,
        "flops_per_step": flops_per_step,
        "teacher_steps": teacher_steps,
        "teachers": teachers or {},
    }
    history = tuple(Step(step=step, validation={"docs": value}) for step, value in curve)
    return Run(name, Facts.model_validate(facts), history)


def make_student(curve, **settings):
    return make_run("student", curve, **{"flops_per_step": 3.0, "teachers": TEACHERS, **settings})


def compare(student, baseline, teacher=None, apart=None):
    ends = (final(student.curve("docs")), final(baseline.curve("docs")))
    return savings.compare(student, baseline, "docs", ends, teacher, apart)


def break_away(student, baseline):
    return compare(student, baseline)["break_away"]


def end(student, baseline):
    return compare(student, baseline)["end"]


def told(student, baseline, teacher=None, apart=None):
    """The words on one comparison."""
    sizes = {"parameters": 10, "batch_size": 4, "sequence_length": 8, "diverged": {}, "perplexities": {}}
    models = {
        run.name: {**sizes, "steps": run.facts.steps, "teachers": {k: t.model for k, t in run.facts.teachers.items()}}
        for run in (student, baseline)
    }
    return words({"models": models, "comparisons": [compare(student, baseline, teacher, apart)]})


# ------------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(
    ("perplexity", "step"),
    [
        (400.0, 100.0),  # an evaluation itself
        (200.0, 150.0),  # halfway in the logarithm between 400 and 100
        (100.0, 200.0),
        (500.0, 100.0),  # there before the first evaluation
        (99.0, None),
        (math.nan, None),
        (-1.0, None),
    ],
)
def test_first_step_reaching(perplexity, step):
    assert first_step_reaching([(100, 400.0), (200, 100.0)], perplexity) == (step and pytest.approx(step))


def test_first_of_several_crossings():
    assert first_step_reaching([(10, 400.0), (20, 100.0), (30, 400.0), (40, 100.0)], 200.0) == pytest.approx(15)


def test_neighbouring_floats_do_not_divide_by_zero():
    below = math.nextafter(1e10, 0)
    assert first_step_reaching([(1, 1e10), (2, below)], below) == 2


def test_evaluations_that_are_not_finite_are_left_out():
    curve = [(50, math.inf), (100, 400.0), (150, math.nan), (200, 100.0)]
    assert first_step_reaching(curve, 200.0) == pytest.approx(150)
    assert perplexity_at(curve, 150) == pytest.approx(200)
    assert final([*curve, (250, math.nan)]) is None  # a run that ends badly has no final perplexity


def test_perplexity_at_is_exact_on_evaluations_and_unknown_outside():
    curve = [(100, 210.3), (200, 100.7)]
    assert (perplexity_at(curve, 100), perplexity_at(curve, 200)) == (210.3, 100.7)
    assert perplexity_at(curve, 99) is None
    assert perplexity_at(curve, 201) is None
    assert perplexity_at([], 1) is None


@pytest.mark.parametrize(
    ("student", "baseline", "step"),
    [
        ([(1, 5.0), (2, 3.0), (3, 2.0)], [(1, 4.0), (2, 4.0), (3, 4.0)], 2),
        ([(1, 3.0), (2, 5.0), (3, 2.0)], [(1, 4.0), (2, 4.0), (3, 4.0)], 3),
        ([(1, 3.0), (2, 3.0), (3, 4.0)], [(1, 4.0), (2, 4.0), (3, 4.0)], None),  # equal is not ahead
        ([(1, 3.0), (2, 3.0)], [(2, 4.0), (3, 4.0)], 2),  # common evaluations only
        ([(1, 3.0)], [(2, 4.0)], None),
        ([(1, 3.0), (2, math.nan)], [(1, 4.0), (2, 4.0)], None),
        ([(1, 3.0), (2, 3.0)], [(1, 4.0), (2, math.inf)], 1),
    ],
)
def test_ahead_from(student, baseline, step):
    assert ahead_from(student, baseline) == step


# -------------------------------------------------------------------------------------------------------- comparisons

BASELINE = [(40, 400.0), (80, 200.0), (160, 100.0)]
STUDENT = [(40, 200.0), (80, 100.0), (160, 50.0)]


def test_savings_by_hand():
    student, baseline = make_student(STUDENT, teacher_steps=80), make_run("large", BASELINE)
    found = break_away(student, baseline)
    assert (found["step"], found["student_perplexity"], found["baseline_step"]) == (80, 100.0, 160.0)
    assert found["steps_saved"] == pytest.approx(0.5)
    assert found["flops_saved"] == pytest.approx(1 - 80 * 3 / (160 * 2))
    # the teacher: 80 steps of 4 sequences at 0.5 * 0.2 + 0.25 * 0.4 FLOPs
    assert found["flops_saved_with_teacher"] == pytest.approx(1 - (80 * 3 + 80 * 4 * 0.2) / (160 * 2))
    assert not found["lower_bound"]
    assert not found["upper_bound"]
    at_end = end(student, baseline)
    assert (at_end["student_step"], at_end["baseline_steps"]) == (80.0, 160)
    assert at_end["steps_saved"] == pytest.approx(0.5)


def test_teacher_is_counted_only_while_it_teaches():
    student, baseline = make_student(STUDENT, teacher_steps=20), make_run("large", BASELINE)
    at_end = end(student, baseline)
    assert at_end["flops_saved_with_teacher"] == pytest.approx(1 - (80 * 3 + 20 * 4 * 0.2) / (160 * 2))


def test_break_away_between_evaluations_is_interpolated():
    student, baseline = make_student(STUDENT, teacher_steps=60), make_run("large", BASELINE)
    found = break_away(student, baseline)
    assert found["student_perplexity"] == pytest.approx(math.sqrt(200 * 100))
    assert found["baseline_step"] == pytest.approx(120)  # the same between 200 at step 80 and 100 at step 160
    assert found["steps_saved"] == pytest.approx(0.5)


def test_savings_of_a_worse_student_are_negative():
    student, baseline = make_student(BASELINE, teacher_steps=80), make_run("large", STUDENT)
    found = break_away(student, baseline)
    assert found["steps_saved"] == pytest.approx(1 - 80 / 40)
    assert found["upper_bound"]  # the baseline was there by its first evaluation, perhaps sooner
    assert end(student, baseline)["student_step"] is None
    assert end(student, baseline)["steps_saved"] is None


def test_lower_bound_where_the_baseline_never_gets_there():
    student = make_student([(40, 90.0), (160, 50.0)], teacher_steps=40)
    found = break_away(student, make_run("large", BASELINE))
    assert found["baseline_step"] is None
    assert found["lower_bound"]
    assert found["steps_saved"] == pytest.approx(1 - 40 / 160)
    assert found["flops_saved"] == pytest.approx(1 - 40 * 3 / (160 * 2))


def test_one_evaluation_gives_bounds_and_no_more():
    student, baseline = make_student([(160, 50.0)], teacher_steps=80), make_run("large", [(160, 100.0)])
    found = break_away(student, baseline)
    assert found["student_perplexity"] is None
    assert found["steps_saved"] is None
    assert not found["lower_bound"]
    at_end = end(student, baseline)
    assert (at_end["student_step"], at_end["steps_saved"], at_end["lower_bound"]) == (160.0, 0.0, True)


@pytest.mark.parametrize("teacher_steps", [0, 160, 500])
def test_no_break_away_without_a_step_where_alpha_reaches_zero(teacher_steps):
    student = make_student(STUDENT, teacher_steps=teacher_steps)
    assert break_away(student, make_run("large", BASELINE)) is None


def test_baseline_that_diverged_has_no_end_to_reach():
    baseline = make_run("large", [*BASELINE[:2], (160, None)])
    record = compare(make_student(STUDENT, teacher_steps=80), baseline)
    assert record["end"] is None
    assert record["final"] == {"student": 50.0, "baseline": None, "teacher": None}


values = st.lists(st.integers(2, 10_000), min_size=1, max_size=12)


@given(values, values, st.floats(0.01, 100), st.data())
def test_scaling_both_perplexities_leaves_the_savings(mine, theirs, factor, data):
    taught = 10 * data.draw(st.integers(1, len(mine)))

    def found(scale):
        student = make_student(
            [(10 * at, value * scale) for at, value in enumerate(mine, 1)],
            steps=10 * len(mine) + 1,
            teacher_steps=taught,
        )
        baseline = make_run("large", [(10 * at, value * scale) for at, value in enumerate(theirs, 1)])
        return compare(student, baseline)

    plain, scaled = found(1.0), found(factor)
    assert plain["ahead_from"] == scaled["ahead_from"]
    for part in ("break_away", "end"):
        for key in ("steps_saved", "flops_saved", "flops_saved_with_teacher", "lower_bound", "upper_bound"):
            was, now = plain[part][key], scaled[part][key]
            assert now is None if was is None else now == pytest.approx(was, abs=1e-9)


@given(values, st.integers(2, 10_000))
def test_the_step_found_has_the_perplexity_sought(curve, target):
    points = [(10 * at, float(value)) for at, value in enumerate(curve, 1)]
    step = first_step_reaching(points, target)
    assert (step is None) == (min(curve) > target)
    if step is not None:
        assert all(value > target for at, value in points if at < step - 1e-6)


# -------------------------------------------------------------------------------------------------------------- words


def test_words_of_a_better_student():
    student, baseline = make_student(STUDENT, teacher_steps=80), make_run("large", BASELINE)
    lines = told(student, baseline, {"model": "small", "perplexity": 255.13})
    assert lines == [
        "student (inherits from small) ends at perplexity 50.00 on docs; large (learns alone) at 100.0; its teacher "
        "small at 255.1. The student ends better, 50.0 % lower. From step 40 on it is ahead at every evaluation.",
        "At break-away (step 80, where alpha reaches zero) the student is at 100.0; large needs 160 steps for that: "
        "the student saves 50.0 % of the steps and 25.0 % of the FLOPs "
        "(saves 5.0 % of the FLOPs with the teacher's inference counted).",
        "The student reaches large's final perplexity at step 80, where the baseline takes 160: "
        "the student saves 50.0 % of the steps and 25.0 % of the FLOPs "
        "(saves 5.0 % of the FLOPs with the teacher's inference counted).",
        "The teacher small is worse than large is from step 66 on: what it has to give, it gives early. Let alpha "
        "reach zero by about then (inherit.teacher_steps), or take a better teacher.",
    ]


def test_words_of_a_worse_student():
    lines = told(make_student(BASELINE, teacher_steps=80), make_run("large", STUDENT))
    assert "The student ends worse, 100.0 % higher. From step 40 on it is behind at every evaluation." in lines[0]
    assert "large needs 40 steps for that at most, its first evaluation: the student takes at least 100.0 %" in lines[1]
    assert "100.0 % more steps and at least 200.0 % more FLOPs (takes at least 280.0 % more FLOPs with the" in lines[1]
    assert lines[2] == (
        "The student does not reach large's final perplexity within its 160 steps; large is as good as the student at "
        "its end by step 80."
    )


def test_words_of_a_student_that_diverged():
    lines = told(make_student([(40, 90.0), (160, 2.8e18)], teacher_steps=80), make_run("large", BASELINE))
    assert "The student ends worse, 2.8e+16 times as high." in lines[0]


def test_words_of_a_student_that_needs_fewer_steps_and_more_flops():
    student = make_student([(40, 300.0), (150, 100.0)], teacher_steps=40)
    line = told(student, make_run("large", BASELINE))[2]
    assert "step 150, where the baseline takes 160: the student saves 6.2 % of the steps and takes 40.6 % more" in line


def test_words_of_a_teacher_of_which_nothing_is_known():
    """Its predictions were made elsewhere: neither its perplexity nor what they cost is zero, or infinite."""
    teachers = {"docs": {"model": "small", "flops_per_sequence": None, "share": 1.0}}
    for cost in (None, 0.0):  # as manifests said it formerly
        teachers["docs"]["flops_per_sequence"] = cost
        student = make_student(STUDENT, teacher_steps=80, teachers=teachers)
        record, lines = (
            of(student, make_run("large", BASELINE), {"model": "small", "perplexity": None}) for of in (compare, told)
        )
        assert record["end"]["flops_saved_with_teacher"] is None and record["end"]["flops_saved"] == 0.25
        assert "its teacher small at unknown." in lines[0]
        assert "(unknown with the teacher's inference counted: what that took is unknown)" in lines[1]


def test_words_of_a_teacher_worse_than_the_baseline():
    student, baseline = make_student(STUDENT, teacher_steps=80), make_run("large", BASELINE)
    assert told(student, baseline, {"model": "small", "perplexity": 200.0})[-1].startswith(
        "The teacher small is worse than large is from step 80 on"
    )
    assert not any("worse than large" in line for line in told(student, baseline, {"model": "small", "perplexity": 90}))


def test_a_difference_is_taken_sequence_by_sequence():
    """What makes a sequence hard for both models tells nothing of their difference."""
    rng = np.random.default_rng(0)
    hard, noise = rng.normal(300, 100, 50), rng.normal(0, 1, 50)
    found = difference(hard - 2 + noise, hard, rows=50 * 10)
    assert found["nats"] == pytest.approx((noise.mean() - 2) / 10)
    assert found["standard_error"] == pytest.approx(noise.std(ddof=1) / 10 / math.sqrt(50))
    assert difference(hard[:1], hard[:1] + 1, rows=10) == {"nats": -0.1, "standard_error": None}


@pytest.mark.parametrize(
    ("nats", "error", "warned"), [(0.1, 0.04, 0), (-0.1, 0.06, 1), (0.1, None, 1), (None, None, 0)]
)
def test_words_warn_of_a_validation_part_that_is_too_small(nats, error, warned):
    apart = {"nats": nats, "standard_error": error}
    lines = told(make_student(STUDENT, teacher_steps=80), make_run("large", BASELINE), None, apart)
    assert sum("validation part of docs is too small to tell this difference" in line for line in lines) == warned


def test_words_of_a_lower_bound():
    lines = told(make_student([(40, 90.0), (160, 50.0)], teacher_steps=40), make_run("large", BASELINE))
    assert "large does not reach it within its 160 steps: the student saves at least 75.0 % of the steps" in lines[1]
    assert (
        "at step 40, its first evaluation, where the baseline takes 160: the student saves at least 75.0 %" in lines[2]
    )


def test_words_without_break_away_evaluations_or_finite_ends():
    constant = told(make_student(STUDENT, teacher_steps=160), make_run("large", [(160, None)]))
    assert constant[1].startswith("There is no break-away")
    assert "large (learns alone) at no finite value." in constant[0]
    assert constant[2] == "large's final perplexity is not finite."
    late = told(make_student([(160, 50.0)], teacher_steps=80), make_run("large", BASELINE))
    assert "the saving there is unknown" in late[1]


def test_words_warn_of_runs_of_different_size():
    lines = told(make_student(STUDENT, teacher_steps=80), make_run("large", BASELINE, steps=320))
    assert lines[-1] == "The two differ in steps, batch size or sequence length: compare FLOPs rather than steps."
