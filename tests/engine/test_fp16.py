"""fp16: DeepSpeed's loss scale in the training loop. On a CPU DeepSpeed refuses fp16; here it is told that it can."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.commands import metrics
from helpers.engines import (  # noqa: F401
    Interrupted,
    Watched,
    new_engine,
    settings,
    step,
    tiny_run,
    weights,
    world,
)

from ki_ds.errors import UserError
from ki_ds.experiment.schedules import alpha, learning_rate
from ki_ds.experiment.schema import Inherit
from ki_ds.training.divergence import MOST_SKIPPED, run_facts
from ki_ds.training.loop import train

THREE = pytest.param(3, marks=pytest.mark.slow)  # a CPU computes in fp16 slowly, and gathers at every layer
STAGES = (1, 2, THREE)  # fp16 at stage 0 is refused
OPTIMIZERS = (2, THREE)  # stage 1 has the code of 2
INHERIT = Inherit.model_validate({"from": {"a": "t"}, "teacher_steps": 8})
TIMES = ("seconds", "tokens_per_second", "reading_seconds", "waited_seconds")


@pytest.fixture(autouse=True)
def able(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def watched(until=None):
    """A loader whose α falls."""
    return Watched(until, alpha=partial(alpha, INHERIT, steps=20))


def engine(stage, dropout=0.1, **fp16):
    one = new_engine(stage, fp16=fp16)
    for module in one.deepspeed.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return one


def train_on(one, folder, loader=None, **changes):
    """The records of a run with a falling α, without its times."""
    run = replace(tiny_run(folder.name, **changes), inherit=INHERIT)
    folder.mkdir(exist_ok=True)
    train(one, loader or watched(), run, folder, {"fingerprint": "x"})
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(folder)]


def multiply_hidden_states(one, factor, tries=()):
    """At the first micro-batch of some tries, counted over the run; at every one where none is named."""
    count = -1

    def hook(_module, given):
        nonlocal count
        count += torch.is_grad_enabled()
        return (given[0] * factor, *given[1:]) if not tries or count in [2 * number for number in tries] else None

    one.deepspeed.module.head.register_forward_pre_hook(hook)


def assert_same(mine, theirs):
    for a, b in zip(weights(mine), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_follow_fp32(stage):
    """Losses, and the norm of the gradients as they are without the loss scale."""
    half, whole = new_engine(stage, fp16={"initial_scale_power": 12}), new_engine(stage)
    for number in range(20):
        (sums, applied, norm), (wanted, _, wanted_norm) = (step(one, number, rate=1e-3) for one in (half, whole))
        assert applied
        # fp16 rounds weights, activations and gradients to 2^-11 each
        assert sums["loss"] == pytest.approx(wanted["loss"], rel=2e-3)
        assert norm == pytest.approx(wanted_norm, rel=1e-2)


@pytest.mark.parametrize("stage", OPTIMIZERS)
def test_overflows_at_the_start_stand_still_until_the_scale_fits(stage, tmp_path):
    """More than ten tries of step 0, and then all is as in a run that began at the scale they ended at."""
    loader = watched()
    one = engine(stage, initial_scale_power=34)
    found = train_on(one, tmp_path / "high", loader)
    scale, skipped = found[0]["loss_scale"], found[0]["skipped"]
    assert skipped > MOST_SKIPPED
    assert skipped == 34 - math.log2(scale) + 1  # of DeepSpeed's hysteresis, 2, the first costs a try and no scale
    other = engine(stage, initial_scale_power=int(math.log2(scale)), hysteresis=1)
    wanted = train_on(other, tmp_path / "low")
    assert [found[0] | {"skipped": 0}, *found[1:]] == wanted
    assert_same(one, other)
    assert loader.asked == list(range(20))
    assert [line["alpha"] for line in found[:9]] == [1 - n / 8 for n in range(9)]
    assert [line["learning_rate"] for line in found] == [learning_rate(settings(), n) for n in range(20)]


@pytest.mark.parametrize("stage", OPTIMIZERS)
def test_an_overflow_is_forgotten(stage, tmp_path):
    """One within the hysteresis leaves no trace but the count; the next one halves the scale, clean steps double it."""
    clean, hurt = (engine(stage, initial_scale_power=10, loss_scale_window=window) for window in (1000, 5))
    multiply_hidden_states(hurt, 1e4, tries=[3, 9])  # the second try of step 8
    wanted, found = train_on(clean, tmp_path / "clean"), train_on(hurt, tmp_path / "hurt")
    assert [line["skipped"] for line in found] == [0] * 3 + [1] + [0] * 4 + [1] + [0] * 11
    assert all(line["applied"] for line in found)
    assert [line | {"skipped": 0} for line in found[:8]] == wanted[:8]
    assert [line["loss_scale"] for line in found] == [1024] * 8 + [512] * 6 + [1024] * 5 + [2048]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    assert run_facts(found) == {"skipped_steps": 0, "skipped_tries": 2, "loss_scale": 2048, "diverged": {}}


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_that_raises_the_scale_takes_its_gradients_whole(stage):
    """DeepSpeed alone would divide them by the raised scale."""
    grows, stays = (new_engine(stage, fp16={"initial_scale_power": 8, "loss_scale_window": n}) for n in (2, 1000))
    for number in range(3):
        assert step(grows, number) == step(stays, number)
    assert (grows.loss_scale.value, stays.loss_scale.value) == (512, 256)
    assert_same(grows, stays)


def test_a_loss_scale_that_cannot_fall_further_ends_the_run(tmp_path):
    one = engine(1)
    multiply_hidden_states(one, math.inf)
    with pytest.raises(
        UserError,
        match=r"models.first: step 0, samples 0 to 4: the loss itself is not finite in fp16, also at the "
        r"lowest loss scale, 1 \(18 tries, the first at 65536\)\. Use an engine JSON with bf16 or fp32, lower",
    ):
        train_on(one, tmp_path / "first")
    high = engine(2, initial_scale_power=34, min_loss_scale=2**30)
    with pytest.raises(UserError, match=r"gradient overflows.*scale, 1.07374e\+09 \(6 tries.*Lower fp16.min"):
        train_on(high, tmp_path / "second")


def test_a_fixed_loss_scale_passes_over_a_step_and_ends_after_eleven(tmp_path):
    """Trying again would give the same."""
    one = engine(1, loss_scale=128)
    multiply_hidden_states(one, math.inf, tries=[1])
    found = train_on(one, tmp_path / "once")
    assert [line["applied"] for line in found] == [True, False] + [True] * 18
    assert run_facts(found) == {"skipped_steps": 1, "skipped_tries": 0, "loss_scale": 128, "diverged": {}}
    bad = engine(3, loss_scale=128)
    multiply_hidden_states(bad, math.inf)
    with pytest.raises(UserError, match=r"11 steps.*samples 0 to 44\. Leave fp16.loss_scale \(now 128\) out"):
        train_on(bad, tmp_path / "always")


@pytest.mark.parametrize("stage", OPTIMIZERS)
def test_a_resumed_run_continues_with_its_loss_scale(stage, tmp_path):
    """Interrupted in step 11; resumed from step 10, between two steps that raise the scale."""
    how = dict(initial_scale_power=22, loss_scale_window=4)
    whole = engine(stage, **how)
    wanted = train_on(whole, tmp_path / "whole", checkpoint_every=5)
    assert len({line["loss_scale"] for line in wanted}) > 2
    with pytest.raises(Interrupted):
        train_on(engine(stage, **how), tmp_path / "two", watched(until=11), checkpoint_every=5)
    again, loader = engine(stage, **how), watched()
    found = train_on(again, tmp_path / "two", loader, checkpoint_every=5)
    assert loader.asked[0] == 10
    assert found == wanted
    assert_same(again, whole)


def test_tensorboard_shows_the_loss_scale(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_on(engine(1, initial_scale_power=8, loss_scale_window=15), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss_scale")] == [256] * 16 + [512] * 4
    assert [event.value for event in events.Scalars("skipped")] == [0] * 20
