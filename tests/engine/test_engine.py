"""The DeepSpeed engine: accumulation, clipping, skipped steps, the training loop."""

import copy

import pytest
import torch
from helpers.engines import STAGES, Loader, batch, new_engine, settings, step, tiny_run, weights, world  # noqa: F401

from ki_ds.errors import UserError
from ki_ds.experiment.schedules import alpha, learning_rate
from ki_ds.experiment.schema import Inherit
from ki_ds.training.loop import train


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_leaves_no_trace(stage):
    """Weights and moments after steps 0, NaN, 1 are those after 0, 1; also what the first micro-batch accumulated."""
    clean, hurt = new_engine(stage), new_engine(stage)
    for one in (clean, hurt):
        assert step(one, 0)[1]
    sums, applied, _ = step(hurt, 7, poisoned=True)
    assert not applied
    assert sums["loss"] != sums["loss"]
    for one in (clean, hurt):
        for number in (1, 2):
            assert step(one, number)[1]
    for mine, theirs in zip(weights(clean), weights(hurt), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulated_micro_batches_equal_plain_torch(stage):
    """Adam, clipping and the mean over all targets of the step, against a few lines of plain torch."""
    one = new_engine(stage, gradient_clipping=0.5)
    plain = copy.deepcopy(new_engine(0).deepspeed.module)
    matrices = [p for p in plain.parameters() if p.dim() > 1]
    rest = [p for p in plain.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    for number in range(3):
        sums, applied, norm = step(one, number)
        optimizer.zero_grad()
        micros = batch(number)
        total = sum(len(micro.labels_N) for micro in micros)
        loss = sum(plain(*micro.to(torch.device("cpu")), 1.0).loss for micro in micros) / total
        loss.backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        assert applied
        assert sums["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert norm == pytest.approx(expected.item(), rel=1e-4)
    for mine, theirs in zip(weights(one), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=2e-5)


def test_bf16_trains_at_stage_one():
    one = new_engine(1, half=True)
    losses = [step(one, 0)[0]["loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5


def test_dropout_is_on_from_the_first_step_of_a_loaded_model(tmp_path):
    """A model that comes in evaluation mode, as loaded ones do, is trained with its dropout."""
    one = new_engine(0)
    one.deepspeed.module.eval()
    modes = []
    one.deepspeed.module.backbone.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train(one, Loader(), tiny_run(evaluate_every=5), tmp_path, {})
    assert len(modes) == 40
    assert all(modes)


def test_validation_computes_no_gradient():
    from ki_ds.kernels.loss import chunked

    seen = []
    original = chunked.eager_chunk_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "eager_chunk_loss", lambda *given: seen.append(given[-1]) or original(*given))
        one = new_engine(0)
        with torch.no_grad():
            one.deepspeed(*batch(0)[0].to(torch.device("cpu")), 1.0)
        one.deepspeed(*batch(0)[0].to(torch.device("cpu")), 1.0)
    assert seen == [False, True]


def test_a_run_of_bad_steps_stops_and_names_the_samples(tmp_path):
    one = new_engine(1)
    one.deepspeed.module.head.register_forward_pre_hook(lambda _m, a: (a[0] * float("inf"), *a[1:]))

    with pytest.raises(UserError, match=r"11 steps in a row.*step 10, samples 0 to 44.*learning_rate"):
        train(one, Loader(), tiny_run(), tmp_path, {"fingerprint": "x"})


def test_learning_rate_rises_and_falls_linearly():
    settings_ = settings(warmup=0.25)
    rates = [learning_rate(settings_, t) / settings_.learning_rate for t in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([1 - n / 15 for n in range(15)])
    assert min(rates) > 0


def test_no_shard_and_no_kl_beyond_the_last_teacher_step(monkeypatch):
    """Past the teacher, the loss is called without targets: the KL path does not run."""
    from ki_ds.kernels.loss import chunked

    inherit = Inherit.model_validate({"from": {"a": "t"}, "teacher_steps": 3})
    assert [alpha(inherit, t, 20) > 0 for t in range(5)] == [True] * 3 + [False] * 2
    seen = []
    original = chunked.eager_chunk_loss

    def watch(product, rows, *rest):
        seen.append(rows.targets)
        return original(product, rows, *rest)

    monkeypatch.setattr(chunked, "eager_chunk_loss", watch)
    step(new_engine(0), 0)
    assert seen == [None, None]
