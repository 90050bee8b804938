"""The DeepSpeed engine in this process, as the one rank of a world of its own: skipped steps, checkpoints, export."""

import copy

import pytest
import torch

from ki_ds import distributed, engine, models, train
from ki_ds.batches import MicroBatch, Plan
from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.engine import Engine
from ki_ds.errors import UserError
from ki_ds.experiment import Inherit, Train
from ki_ds.language_model import LanguageModel

VOCABULARY, LENGTH = 300, 16
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def world():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        distributed.initialise()
        yield
        torch.distributed.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)


def settings(**changes):
    return Train(on={"a": 1.0}, steps=20, batch_size=4, micro_batch_size=2, learning_rate=1e-2, dropout=0.0, **changes)


def new_engine(stage, half=False, **changes):
    """Two micro-batches a step; `half` for bf16."""
    config = models.configuration("gpt-tiny", "clm", tokenizers.expected(VOCABULARY, "clm"), LENGTH, "m")
    models.set_dropout(config, 0.0)
    student = LanguageModel(models.new_model(config, "clm", seed=1), VOCABULARY)
    plan = Plan(batch_size=4, micro_batch_size=2, rank=0, world_size=1)
    given = {"zero_optimization": {"stage": stage}} | ({"bf16": {"enabled": True}} if half else {})
    return Engine(student, settings(**changes), plan, given)


def batch(step, size=2):
    """Two micro-batches with different numbers of targets."""
    g = torch.Generator().manual_seed(step)
    found = []
    for count in (5, 11):
        ids = torch.randint(0, VOCABULARY, (size, LENGTH), generator=g)
        rows = torch.randperm(size * LENGTH, generator=g)[:count]
        found.append(MicroBatch(ids, rows, torch.randint(0, VOCABULARY, (count,), generator=g), None, None))
    return found


def course(**changes):
    return train.Course(settings(**changes), None, 1, LENGTH, {})


def weights(one):
    import deepspeed

    parameters = list(one.deepspeed.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.stage(one.deepspeed.config) == 3):
        return [p.detach().clone() for p in parameters]


def step(one, number, poisoned=False, rate=1e-2):
    micros = batch(number)
    if poisoned:
        hook = one.deepspeed.module.head.register_forward_pre_hook(lambda _m, a: (a[0] * float("nan"), *a[1:]))
        one_sums = train.accumulate(one, micros, course(), number, torch.device("cpu"))
        hook.remove()
    else:
        one_sums = train.accumulate(one, micros, course(), number, torch.device("cpu"))
    return one_sums, *one.step(rate)


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


class Loader:
    plan = Plan(4, 2, 0, 1)
    reading_s = waited_s = 0.0

    def __call__(self, number, alpha, next_alpha):
        return batch(number)

    def close(self):
        pass


def test_dropout_is_on_from_the_first_step_of_a_loaded_model(tmp_path):
    """A model that comes in evaluation mode, as loaded ones do, is trained with its dropout."""
    one = new_engine(0)
    one.deepspeed.module.eval()
    modes = []
    one.deepspeed.module.backbone.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train.run(one, Loader(), course(evaluate_every=5), tmp_path, {}, torch.device("cpu"))
    assert len(modes) == 40
    assert all(modes)


def test_validation_computes_no_gradient():
    from ki_ds.kernels import chunked

    seen = []
    original = chunked.eager_chunk_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "eager_chunk_loss", lambda *given: seen.append(given[-1]) or original(*given))
        one = new_engine(0)
        with torch.no_grad():
            one.deepspeed(*batch(0)[0].to(torch.device("cpu")), 1.0)
        one.deepspeed(*batch(0)[0].to(torch.device("cpu")), 1.0)
    assert seen == [False, True]


def test_a_run_of_bad_steps_stops_and_names_the_positions(tmp_path):
    one = new_engine(1)
    one.deepspeed.module.head.register_forward_pre_hook(lambda _m, a: (a[0] * float("inf"), *a[1:]))

    with pytest.raises(UserError, match=r"11 steps in a row.*step 10, stream positions 0 to 44.*learning_rate"):
        train.run(one, Loader(), course(), tmp_path, {"fingerprint": "x"}, torch.device("cpu"))


@pytest.mark.parametrize(("stage", "half"), [*((stage, False) for stage in STAGES), (1, True), (2, True), (3, True)])
def test_checkpoints_are_kept_resumed_and_named_last(stage, half, tmp_path):
    one = new_engine(stage, half)
    for number in range(4):
        step(one, number)
        one.save(tmp_path, number + 1, keep=2, state={"step": number + 1, "state": {"fingerprint": "x"}})
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004"
    two = new_engine(stage, half)
    assert two.resume(tmp_path, {"fingerprint": "x"}) == 4
    for this in (one, two):
        step(this, 9)
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    with pytest.raises(UserError, match="belongs to another run"):
        new_engine(stage, half).resume(tmp_path, {"fingerprint": "y"})


def test_truncated_checkpoint_names_the_one_before(tmp_path):
    one = new_engine(1)
    for number in range(2):
        step(one, number)
        one.save(tmp_path, number + 1, keep=3, state={"step": number + 1, "state": {}})
    for file in (tmp_path / "step-00000002").glob("*.pt"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"step-00000002.*write step-00000001 into"):
        new_engine(1).resume(tmp_path, {})


def test_checkpoint_of_another_world_size_is_refused(tmp_path):
    one = new_engine(1)
    step(one, 0)
    one.save(tmp_path, 1, keep=1, state={"step": 1, "state": {}})
    shard = next((tmp_path / "step-00000001").glob("*zero_pp_rank_0*"))
    (shard.parent / shard.name.replace("rank_0", "rank_1")).write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match=r"written by 2 processes.*--processes 2"):
        new_engine(1).resume(tmp_path, {})


def test_learning_rate_rises_and_falls_linearly():
    settings_ = settings(warmup=0.25)
    rates = [train.learning_rate(settings_, t) / settings_.learning_rate for t in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([1 - n / 15 for n in range(15)])
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size: the experiment owns"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: the experiment owns"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        ({"bf16": {"enabled": True}}, "ZeRO stage 0"),
        ({"zero_optimisation": {"stage": 3}}, 'unknown key.*did you mean "zero_optimization"'),
        ({"fp16": True}, "fp16: found true; expected an object"),
        ({"bf16": {"enable": True}}, '"enabled" is missing'),
        ({"zero_optimization": {"stage": 7}}, "stage: found 7; allowed: 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload is not supported"),
    ],
)
def test_engine_json_that_cannot_be_meant_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        engine.check(config, "engine.json")
    engine.check({"train_batch_size": "auto", "zero_optimization": {"stage": 2}}, "engine.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_fp16_without_a_gpu_names_what_works():
    with pytest.raises(UserError, match=r"fp16 needs a GPU.*fp32 or bf16"):
        engine.check({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "engine.json")


def test_batch_that_the_ranks_do_not_divide():
    with pytest.raises(UserError, match=r"models.m.train.batch_size: 4 cannot be divided among 3 processes"):
        engine.micro_batch_size(settings(), 3, "models.m")
    with pytest.raises(UserError, match="micro_batch_size: 2 does not divide"):
        engine.micro_batch_size(settings(), 4, "models.m")
    wide = Train(on={"a": 1.0}, steps=1, batch_size=96, learning_rate=1e-3)
    assert [engine.micro_batch_size(wide, n, "m") for n in (1, 2, 3, 32)] == [32, 24, 32, 3]


def test_no_shard_and_no_kl_beyond_the_last_teacher_step(monkeypatch):
    """Past the teacher, the loss is called without targets: the KL path does not run."""
    from ki_ds.kernels import chunked

    inherit = Inherit.model_validate({"from": {"a": "t"}, "teacher_steps": 3})
    assert [train.alpha(inherit, t, 20) > 0 for t in range(5)] == [True] * 3 + [False] * 2
    seen = []
    original = chunked.eager_chunk_loss

    def watch(product, rows, *rest):
        seen.append(rows.targets)
        return original(product, rows, *rest)

    monkeypatch.setattr(chunked, "eager_chunk_loss", watch)
    step(new_engine(0), 0)
    assert seen == [None, None]
