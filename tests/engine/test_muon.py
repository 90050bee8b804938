"""Muon at ZeRO 1 to 3, by one rank and by two, against Muon and AdamW in plain torch."""

import math

import pytest
import torch
from helpers.engines import (  # noqa: F401
    LENGTH,
    VOCABULARY,
    batch,
    means,
    new_engine,
    settings,
    step,
    weights,
    world,
)
from helpers.ranks import run_ranks
from pydantic import ValidationError

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.engine import checkpoints, optimizers
from ki_ds.engine import muon as muon_module
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.engine.config import EngineConfig
from ki_ds.engine.engine import Engine
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Model
from ki_ds.launch import distributed
from ki_ds.models import architectures, hugging_face
from ki_ds.models.language_model import LanguageModel
from ki_ds.stages.train import shaping

MUON = dict(optimizer="muon", gradient_clipping=0.0, muon_learning_rate=0.05, muon_momentum=0.9, weight_decay=0.1)
MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
RATES = (5e-3, 1e-2, 1e-2, 2e-3)


class Plain(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) of the named matrices, [in, out] as GPT-2 has them, and AdamW of the rest; in fp64."""

    overflow = False

    def __init__(self, model, train):
        super().__init__([{"params": [p], "name": name} for name, p in model.named_parameters()], {"lr": 0.0})
        self.train, self.steps = train, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            (p,), t = group["params"], self.train
            gradient, state = p.grad.double(), self.state[p]
            if group["name"].endswith(MATRICES):
                rate, decay = group["lr"] * t.muon_learning_rate / t.learning_rate, t.weight_decay
                mean = state.setdefault("m", torch.zeros_like(gradient))
                mean.lerp_(gradient, 1 - t.muon_momentum)
                change = orthogonal(gradient.lerp(mean, t.muon_momentum).T).T
            else:
                rate, decay = group["lr"], t.weight_decay if p.dim() > 1 else 0.0
                first = state.setdefault("m", torch.zeros_like(gradient)).lerp_(gradient, 1 - t.betas[0])
                second = state.setdefault("v", torch.zeros_like(gradient)).lerp_(gradient**2, 1 - t.betas[1])
                first, second = (x / (1 - beta**self.steps) for x, beta in zip((first, second), t.betas, strict=True))
                change = first / (second.sqrt() + t.epsilon)
            p.mul_(1 - rate * decay).sub_(rate * change)


def orthogonal(out_in):
    """Five quintic Newton-Schulz steps, and the factor for the aspect."""
    x = out_in / out_in.norm()
    x = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    rows, columns = out_in.shape
    return math.sqrt(max(1, rows / columns)) * (x if rows <= columns else x.T)


def student():
    """Three layers: the shares of two ranks cut a matrix of every kind."""
    config = architectures.configuration("gpt-tiny", "clm", tokenizers.expected(VOCABULARY, "clm"), LENGTH, "m")
    config.n_layer = 3
    architectures.set_dropout(config, 0.0)
    return LanguageModel(hugging_face.new_model(config, "clm", seed=1), VOCABULARY)


def muon(stage):
    """Two micro-batches a step on each of two ranks, four on one."""
    layout = BatchLayout(8, 2, distributed.rank(), distributed.world_size())
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return Engine(student(), settings(**MUON), layout, EngineConfig.read({"zero_optimization": zero}, "engine.json"))


def trained(one, begin=0, end=4):
    for number in range(begin, end):
        micros = [*batch(number), *batch(number + 100)][distributed.rank() :: distributed.world_size()]
        means(one, number, micros)
        assert one.step(RATES[number])[0]
    return weights(one)


@pytest.fixture(scope="module")
def plain(world):  # noqa: F811
    """What plain torch makes of it: by name where a weight began, and how it ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "new", lambda model, train, config: Plain(model, train))
        ended = trained(muon(0))
    begun = [(name, p.detach()) for name, p in student().named_parameters()]
    return {name: (one, other) for (name, one), other in zip(begun, ended, strict=True)}


def assert_as_plain(found, plain):
    """To 1e-4 of how far a weight has moved: Newton-Schulz steps in fp32 as they are on a CPU without fp16 (1.1e-5 was
    seen); 2^-4 where it knows fp16, and DeepSpeed takes them in that (1.7e-2)."""
    from deepspeed.runtime.zero.muon.original_muon import ns_compute_dtype

    near = 1e-4 if ns_compute_dtype("gram") == torch.float32 else 2**-4
    for mine, (name, (begun, ended)) in zip(found, plain.items(), strict=True):
        moved = (ended - begun).norm()
        assert moved > 0.01 and (mine - ended).norm() < near * moved, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_steps_the_hidden_matrices_and_adamw_the_rest(plain, stage):
    """Both rates follow the schedule; the factor for the aspect is that of [out, in], however a layer keeps it."""
    one = muon(stage)
    assert_as_plain(trained(one), plain)
    by_muon = {name for name, p in one.deepspeed.module.named_parameters() if p.use_muon}
    assert by_muon == {name for name in plain if name.endswith(MATRICES)}


@pytest.mark.parametrize("wrong", ["backbone.transformer.wte.weight", "backbone.transformer.h.1.mlp.c_fc.weight"])
def test_a_matrix_of_the_wrong_kind_would_be_seen(plain, wrong, monkeypatch):
    def mark(model, right=muon_module.mark):
        right(model)
        for name, p in model.named_parameters():
            if name == wrong:
                p.use_muon, p.muon_ratio = not p.use_muon, float(not p.use_muon)

    monkeypatch.setattr(muon_module, "mark", mark)
    with pytest.raises(AssertionError):
        assert_as_plain(trained(muon(1)), plain)


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_matrices_of_another_architecture(tied):
    config = architectures.configuration("roberta-tiny", "mlm", tokenizers.expected(300, "mlm"), 16, "m")
    config.tie_word_embeddings = tied
    model = LanguageModel(hugging_face.new_model(config, "mlm", seed=1), 300)
    muon_module.mark(model)
    ratios = {name: p.muon_ratio for name, p in model.named_parameters() if p.use_muon}
    assert {*ratios.values()} == {1.0}  # torch.nn.Linear keeps [out, in]
    assert {*ratios} == {
        name
        for name, p in model.named_parameters()
        if p.dim() == 2 and "embeddings" not in name and name != "head.weight"
    }


def by_two(folder):
    """By stage the weights of a run, and of one that goes on from its middle; and why one goes on at no other stage."""
    found = {stage: interrupted(stage, folder / str(stage)) for stage in (1, 2, 3)}
    with pytest.raises(UserError) as other:
        checkpoints.resume(muon(2).deepspeed, folder / "1", {})
    return found, str(other.value)


def interrupted(stage, folder):
    one, other = muon(stage), muon(stage)
    trained(one, 0, 2)
    checkpoints.save(one.deepspeed, folder, 2, keep=1, state={})
    assert checkpoints.resume(other.deepspeed, folder, {}) == 2
    return trained(one, 2), trained(other, 2)


@pytest.mark.launch
@pytest.mark.slow
def test_two_ranks_do_the_same_and_go_on_to_the_last_bit(plain, tmp_path):
    found, other_stage = run_ranks(by_two, 2, tmp_path)[0]
    for whole, in_two in found.values():
        assert_as_plain(whole, plain)
        assert all(map(torch.equal, whole, in_two))
    assert "2 ranks at ZeRO 1" in other_stage and "--processes" in other_stage
    with pytest.raises(UserError, match=r"made by 2 ranks at ZeRO 3\. DeepSpeed keeps Muon's momentum"):
        checkpoints.resume(muon(3).deepspeed, tmp_path / "3", {})
    assert not [*tmp_path.rglob("universal-*")]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_goes_on_to_the_last_bit(stage, tmp_path):
    whole, in_two = interrupted(stage, tmp_path)
    assert all(map(torch.equal, whole, in_two))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_leaves_the_momentum_alone(stage):
    clean, hurt = (new_engine(stage, **MUON) for _ in range(2))
    for one in (clean, hurt):
        assert step(one, 0)[1]
    assert not step(hurt, 7, poisoned=True)[1]
    for one in (clean, hurt):
        assert step(one, 1)[1]
    assert all(map(torch.equal, weights(clean), weights(hurt)))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_learns(stage):
    one = new_engine(stage, half=True, **MUON)
    losses = []
    for _ in range(12):
        found, applied, norm = step(one, 0)  # the same sequences again and again
        assert applied and math.isnan(norm)
        losses.append(found["loss"])
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, {}, r'"muon" with ZeRO stage 0 \(e\.json\).*stages 1 to 3'),
        ({"fp16": {"enabled": True}}, {}, r"with fp16.*different loss scales"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}, "with offload_optimizer"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, {}, "with data_types"),
        ({"communication_data_type": "bf16"}, {}, "with communication_data_type"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, {}, "zero_quantized_gradients"),
        ({"zero_optimization": {"stage": 3, "reduce_scatter": True}}, {}, r"zero_optimization\.reduce_scatter"),
        ({"optimizer": {"type": "AdamW"}}, {}, '"muon", but e.json has the optimizer type "AdamW"'),
        ({}, {"gradient_clipping": 1.0}, r'gradient_clipping: found 1 with "muon".*expected 0'),
    ],
)
def test_what_muon_does_not_go_with(config, changes, message):
    given = {"zero_optimization": {"stage": 1}} | config
    with pytest.raises(UserError, match=message):
        optimizers.check_fit(settings(**MUON | changes), EngineConfig.read(given, "e.json"), "models.m")
    fitting = {"zero_optimization": {"stage": 1, "reduce_scatter": True}, "bf16": {"enabled": True}}
    for kind in ({}, {"optimizer": {"type": "Muon"}}):
        optimizers.check_fit(settings(**MUON), EngineConfig.read(fitting | kind, "e.json"), "models.m")


def test_its_numbers_are_its_own():
    with pytest.raises(ValidationError, match='"muon_momentum" belongs to "optimizer": "muon"; it is "adamw"'):
        settings(muon_momentum=0.9)

    def shaped(**changes):
        return shaping(Model(architecture="gpt-tiny", train=settings(**changes)))["train"]

    assert not [key for key in shaped() if "muon" in key]  # the identities of other models stay
    assert shaped(optimizer="muon") == {
        **shaped(), "optimizer": "muon", "muon_learning_rate": 0.02, "muon_momentum": 0.95,
    }  # fmt: skip
