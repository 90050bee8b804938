"""What an engine JSON asks for beside ZeRO and precision: offload, activation checkpointing, monitors, the profiler."""

import csv
import shutil

import pytest
import torch
from helpers.engines import engine_of, step, weights, world  # noqa: F401

from ki_ds.engine import checkpoints, features
from ki_ds.errors import UserError

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed's CPUAdam is compiled with g++")


def zero(stage, **more):
    return {"zero_optimization": {"stage": stage, **more}}


def offloaded(stage, parameters=False):
    more = {"offload_param": {"device": "cpu"}} if parameters else {}
    return zero(stage, offload_optimizer={"device": "cpu"}, **more)


@compiled
@pytest.mark.slow
@pytest.mark.timeout(600)  # the first of them compiles CPUAdam: 40 s on a quiet machine
@pytest.mark.parametrize(("stage", "parameters"), [(1, False), (2, False), (3, False), (3, True)])
def test_offload_equals_none(stage, parameters):
    """Weights, norms and skipped steps, with clipping and a rate that changes; CPUAdam rounds in another order."""
    one, two = (engine_of(given, gradient_clipping=0.5) for given in (offloaded(stage, parameters), zero(stage)))
    for number in range(4):
        mine, theirs = (step(engine, number, poisoned=number == 1, rate=1e-2 / (number + 1)) for engine in (one, two))
        assert mine[1] == theirs[1] == (number != 1)
        if mine[1]:
            assert mine[2] == pytest.approx(theirs[2], rel=1e-5)
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


@compiled
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (zero(2), offloaded(2)),
        (zero(3), offloaded(3, True)),
        (offloaded(2), zero(2)),
        (offloaded(2), zero(1)),
        (offloaded(3, True), zero(1)),
        (zero(1), offloaded(3)),
        (offloaded(3), zero(0)),
    ],
)
def test_run_goes_on_with_offload_or_without(before, after, tmp_path):
    """The usual move after memory was short, and back; also to another stage."""
    one = engine_of(before)
    for number in range(3):
        step(one, number)
    checkpoints.save(one.deepspeed, tmp_path, 3, keep=1, state={})
    two = engine_of(after)
    assert checkpoints.resume(two.deepspeed, tmp_path, {}) == 3
    for number in (3, 4):
        mine, theirs = (step(engine, number)[0]["loss"] for engine in (one, two))
        assert theirs == pytest.approx(mine, rel=2e-6)
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_run_is_resumed(stage, tmp_path):
    """Not to the bit: CPUAdam multiplies β up step by step, but takes a power after resuming."""
    one = engine_of(offloaded(stage))
    for number in range(2):
        step(one, number)
    checkpoints.save(one.deepspeed, tmp_path, 2, keep=1, state={})
    two = engine_of(offloaded(stage))
    assert checkpoints.resume(two.deepspeed, tmp_path, {}) == 2
    for engine in (one, two):
        step(engine, 2)
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_activation_checkpointing_changes_no_gradient(stage):
    """With dropout on: the weights after two steps are the same to the bit, and layers were computed twice."""
    one = engine_of(zero(stage) | {"activation_checkpointing": {}}, dropout=0.3)
    two, three = engine_of(zero(stage), dropout=0.3), engine_of(zero(stage))
    calls = []
    layer = one.deepspeed.module.backbone.transformer.h[0].mlp.c_fc
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for number in range(2):
        for engine in (one, two, three):
            engine.deepspeed.train()
            step(engine, number)
    assert len(calls) == 2 * 2 * 2  # steps, micro-batches, forward and backward
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert any((mine != other).any() for mine, other in zip(weights(one), weights(three), strict=True))


@pytest.mark.parametrize("stage", [0, 3])
def test_csv_monitor_and_profiler_write(stage, tmp_path):
    one = engine_of(zero(stage) | {
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "run"},
        "tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "board"},
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(tmp_path / "flops.txt")},
    })  # fmt: skip
    for number in range(3):
        sums, _, norm = step(one, number, rate=1e-2 / (number + 1))
        one.record(sums | {"step": number + 1, "gradient_norm": norm, "validation": {"a": 20.5 - number}, "kl": None})

    def column(name):
        with (tmp_path / "run" / f"{name}.csv").open() as file:
            return [(int(samples), float(value)) for samples, value in [*csv.reader(file)][1:]]

    assert [samples for samples, _ in column("Train_Samples_lr")] == [4, 8, 12]
    assert [rate for _, rate in column("Train_Samples_lr")] == pytest.approx([1e-2, 5e-3, 1e-2 / 3])
    assert column("Train_perplexity_a") == [(4, 20.5), (8, 19.5), (12, 18.5)]
    assert [samples for samples, _ in column("Train_loss")] == [4, 8, 12]
    assert not (tmp_path / "run" / "Train_kl.csv").exists()
    assert [*(tmp_path / "board").glob("events*")]
    assert "fwd flops per GPU" in (tmp_path / "flops.txt").read_text()


def test_monitor_whose_package_is_missing(monkeypatch):
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb: the package wandb is missing; pip install wandb"):
        engine_of(zero(0) | {"wandb": {"enabled": True}})
    with pytest.raises(UserError, match="comet_ml"):
        engine_of(zero(0) | {"comet": {"enabled": True}})


def test_folder_to_swap_to_that_cannot_be_written(tmp_path):
    swap = {"device": "nvme", "nvme_path": str(tmp_path / "none")}
    with pytest.raises(UserError, match=r"offload_optimizer.nvme_path: .*none is not a folder that can be written"):
        engine_of(zero(3, offload_optimizer=swap))


def test_activation_checkpointing_of_a_model_that_cannot(monkeypatch):
    from transformers import GPT2LMHeadModel

    monkeypatch.setattr(GPT2LMHeadModel, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="a GPT2LMHeadModel does not support it"):
        engine_of(zero(0) | {"activation_checkpointing": {}})
