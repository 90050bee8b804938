"""Savings against numbers worked out by hand, their bounds, and the words that tell them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_ds.report.savings import Facts, Run, Step, ahead_from, compare, final, first_step_reaching, perplexity_at, words

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


def break_away(student, baseline):
    return compare(student, baseline, "docs", None)["break_away"]


def end(student, baseline):
    return compare(student, baseline, "docs", None)["end"]


def told(student, baseline, teacher=None):
    """The words on one comparison."""
    sizes = {"parameters": 10, "batch_size": 4, "sequence_length": 8}
    models = {
        run.name: {**sizes, "steps": run.facts.steps, "teachers": {k: t.model for k, t in run.facts.teachers.items()}}
        for run in (student, baseline)
    }
    return words({"models": models, "comparisons": [compare(student, baseline, "docs", teacher)]})


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
    record = compare(make_student(STUDENT, teacher_steps=80), baseline, "docs", None)
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
        return compare(student, baseline, "docs", None)

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
        "50.0 % of its steps saved, 25.0 % of its FLOPs saved "
        "(5.0 % of its FLOPs saved with the teacher's inference counted).",
        "The student reaches large's final perplexity at step 80, where the baseline takes 160: "
        "50.0 % of its steps saved, 25.0 % of its FLOPs saved "
        "(5.0 % of its FLOPs saved with the teacher's inference counted).",
    ]


def test_words_of_a_worse_student():
    lines = told(make_student(BASELINE, teacher_steps=80), make_run("large", STUDENT))
    assert "The student ends worse, 100.0 % higher. It does not stay ahead." in lines[0]
    assert "large needs 40 steps for that at most, its first evaluation: at least 100.0 % more steps" in lines[1]
    assert lines[2] == "The student does not reach large's final perplexity within its 160 steps."


def test_words_of_a_lower_bound():
    lines = told(make_student([(40, 90.0), (160, 50.0)], teacher_steps=40), make_run("large", BASELINE))
    assert "large does not reach it within its 160 steps: at least 75.0 % of its steps saved" in lines[1]
    assert "at step 40, its first evaluation, where the baseline takes 160: at least 75.0 % of its steps" in lines[2]


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
