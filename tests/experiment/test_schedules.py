"""The schedules of α, how long a teacher guides, and those of the learning rate."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ki_ds.experiment.schedules import CONSTANT_ALPHA, alpha, learning_rate, shared_steps, teacher_steps
from ki_ds.experiment.schema import Inherit, Train

calm = settings(deadline=None)


def inherit(**keys):
    return Inherit(teachers={"wb": "t"}, **keys)


lengths = st.floats(1e-3, 1e3) | st.sampled_from([0.1, 0.3, 0.7, 1.1, 1 / 3, 3.0, 3.125, 1e9, 5e-324])
inherits = st.one_of(
    st.builds(inherit, schedule=st.sampled_from(["linear", "heaviside"]), alpha_T=lengths),
    st.builds(
        inherit, schedule=st.sampled_from(["linear", "heaviside", "constant"]), teacher_steps=st.integers(1, 600)
    ),
    st.builds(inherit, schedule=st.just("constant"), alpha=st.floats(0.01, 1)),
)


def test_linear_falls_by_alpha_T_over_the_whole_run():
    """α_t = max(1 - α_T · t / T, 0), by hand for α_T = 2, T = 8."""
    one = inherit(alpha_T=2.0)
    assert [alpha(one, t, 8) for t in range(8)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert teacher_steps(one, 8) == 4


def test_linear_that_does_not_reach_zero():
    one = inherit(alpha_T=0.5)
    assert [alpha(one, t, 4) for t in range(4)] == [1.0, 0.875, 0.75, 0.625] and teacher_steps(one, 4) == 4


def test_linear_of_a_length_that_is_no_divisor():
    one = inherit(alpha_T=3.0)
    assert [alpha(one, t, 8) for t in range(8)] == [1.0, 0.625, 0.25, 0, 0, 0, 0, 0] and teacher_steps(one, 8) == 3


def test_heaviside_is_one_as_long_as_linear_is_above_zero():
    assert [alpha(inherit(schedule="heaviside", alpha_T=2.0), t, 6) for t in range(6)] == [1, 1, 1, 0, 0, 0]
    assert [alpha(inherit(schedule="heaviside", teacher_steps=2), t, 4) for t in range(4)] == [1, 1, 0, 0]


def test_constant_to_the_end_or_for_a_while():
    assert [alpha(inherit(schedule="constant"), t, 3) for t in range(3)] == [CONSTANT_ALPHA] * 3
    assert [alpha(inherit(schedule="constant", alpha=0.3), t, 3) for t in range(3)] == [0.3] * 3
    assert [alpha(inherit(schedule="constant", alpha=0.3, teacher_steps=2), t, 3) for t in range(3)] == [0.3, 0.3, 0]


def test_without_inheritance_alpha_is_zero():
    assert teacher_steps(None, 10) == 0 and alpha(None, 0, 10) == 0.0


def test_the_paper_s_numbers():
    assert teacher_steps(inherit(alpha_T=3.125), 125_000) == 40_000
    assert teacher_steps(inherit(alpha_T=125_000 / 55_000), 125_000) == 55_000


@pytest.mark.parametrize("alpha_T", [1e-320, 5e-324, 1e9])
def test_extreme_alpha_T(alpha_T):
    """The quotient overflows, or is small; α_0 is 1 all the same."""
    steps = teacher_steps(inherit(alpha_T=alpha_T), 100)
    assert steps == (100 if alpha_T < 1 else 1)
    assert alpha(inherit(alpha_T=alpha_T), 0, 100) == 1.0


@calm
@given(inherits, st.integers(1, 500))
@example(inherit(alpha_T=0.3), 3)
@example(inherit(alpha_T=1.1), 110)
@example(inherit(alpha_T=0.7), 7)
def test_teacher_steps_counts_the_steps_with_alpha_above_zero_and_they_come_first(one, steps):
    values = [alpha(one, t, steps) for t in range(steps)]
    taught = teacher_steps(one, steps)
    assert all(0 < a <= 1 for a in values[:taught]) and not any(values[taught:])
    assert 1 <= taught <= steps
    assert values == sorted(values, reverse=True)


@calm
@given(st.integers(1, 2000), st.data())
def test_alpha_T_and_teacher_steps_say_the_same(steps, data):
    taught = data.draw(st.integers(1, steps))
    for schedule in ("linear", "heaviside"):
        by_length = inherit(schedule=schedule, teacher_steps=taught)
        by_slope = inherit(schedule=schedule, alpha_T=steps / taught)
        assert teacher_steps(by_slope, steps) == teacher_steps(by_length, steps) == taught
        for t in {0, 1, taught // 2, taught - 1, min(taught, steps - 1), steps - 1}:
            assert alpha(by_slope, t, steps) == pytest.approx(alpha(by_length, t, steps), abs=1e-12)


@calm
@given(st.integers(1, 10**6), st.integers(1, 9999), st.integers(1, 999))
def test_decimal_alpha_T_is_not_a_step_off(steps, numerator, denominator):
    """T / α_T is a whole number more often than its floating-point quotient is."""
    slope = Fraction(numerator, denominator)
    exact = Fraction(steps) / slope
    assume(abs(exact - round(exact)) > 1e-6 or exact == round(exact))
    assert teacher_steps(inherit(alpha_T=float(slope)), steps) == min(math.ceil(exact), steps)


# ------------------------------------------------------------------------------------------------ the learning rate


def train(steps, **keys):
    return Train(on={"wb": 1.0}, steps=steps, batch_size=1, learning_rate=3e-4, **keys)


@st.composite
def trains(draw):
    steps, schedule = draw(st.integers(1, 300)), draw(st.sampled_from(["linear", "constant", "wsd"]))
    if schedule == "linear":
        return train(steps, warmup=draw(st.floats(0, 1)))
    decay = draw(st.integers(1, steps)) if schedule == "wsd" else 0
    keys = {"decay_steps": decay} if decay else {}
    return train(steps, schedule=schedule, warmup_steps=draw(st.integers(0, steps - decay)), **keys)


def exact(one, step):
    """The learning rate of a step as a fraction of the highest."""
    warmup = round(one.warmup * one.steps) if one.schedule == "linear" else one.warmup_steps
    falls = {"linear": one.steps - warmup, "constant": None, "wsd": one.decay_steps}[one.schedule]
    rises = Fraction(step + 1, warmup) if warmup else 1
    return min(rises, 1, Fraction(one.steps - step, falls) if falls and step >= warmup else 1)


@calm
@given(trains())
def test_learning_rate_is_the_reference_s_at_every_step_never_zero_and_without_a_jump(one):
    rates = [learning_rate(one, step) for step in range(one.steps)]
    assert rates == [pytest.approx(one.learning_rate * float(exact(one, step)), rel=1e-15) for step in range(one.steps)]
    assert min(rates) > 0
    warmup = round(one.warmup * one.steps) if one.schedule == "linear" else one.warmup_steps
    fall = one.decay_steps or (one.steps - warmup if one.schedule == "linear" else 0)
    steepest = max(1 / max(warmup, 1) if warmup else 0, 1 / fall if fall else 0)
    jumps = [abs(later - earlier) / one.learning_rate for earlier, later in pairwise(rates)]
    assert max(jumps, default=0) <= steepest + 1e-12


def test_warm_up_stable_decay_by_hand():
    one = train(8, schedule="wsd", warmup_steps=2, decay_steps=4)
    assert [learning_rate(one, t) / 3e-4 for t in range(8)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    one = train(4, schedule="constant", warmup_steps=2)
    assert [learning_rate(one, t) / 3e-4 for t in range(4)] == [0.5, 1, 1, 1]


@calm
@given(trains(), st.none() | inherits, st.integers(1, 300))
def test_shared_steps_are_those_of_every_longer_run(one, taught, more):
    shared, longer = shared_steps(one, taught), one.model_copy(update={"steps": one.steps + more})
    assert 0 <= shared <= one.steps and shared <= shared_steps(longer, taught)
    assert (shared == 0) >= (one.schedule == "linear")

    def course(run):
        return [(learning_rate(run, step), alpha(taught, step, run.steps)) for step in range(shared)]

    assert course(one) == course(longer)
    if one.schedule == "constant" and (taught is None or taught.alpha_T is None):
        assert shared == one.steps


def test_alpha_that_goes_by_the_number_of_steps_shares_none():
    one = train(8, schedule="constant", warmup_steps=0)
    assert shared_steps(one, inherit(alpha_T=2.0)) == shared_steps(train(8), None) == 0
    assert shared_steps(one, inherit(teacher_steps=4)) == shared_steps(one, inherit(schedule="constant")) == 8
    assert shared_steps(train(8, schedule="wsd", warmup_steps=0, decay_steps=3), inherit(teacher_steps=4)) == 5
