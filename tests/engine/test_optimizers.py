"""Optimizers by name: the implementations, apex (stand-ins for it), and what each does not go with."""

import sys
import textwrap

import pytest
import torch
from helpers.engines import engine_of, settings, step, weights, world  # noqa: F401

from ki_ds.engine import checkpoints, optimizers
from ki_ds.engine.config import EngineConfig
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Model
from ki_ds.stages.train import shaping

BARE = {"zero_optimization": {"stage": 0}}


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"optimizer": "lamb"}, {"zero_optimization": {"stage": 1}}, r'"lamb" with ZeRO stage 1.*slices.*"stage": 0'),
        ({"optimizer": "lamb"}, {"optimizer": {"type": "AdamW"}}, '"lamb", but e.json.*type "AdamW".*of "adamw"'),
        (
            {"optimizer": "lamb"},
            BARE,
            r'"lamb", but e.json names no implementation.*"ApexLamb".*apex.*or "adamw"',
        ),
        ({}, {"optimizer": {"type": "ApexLamb"}}, r'models.m.train.optimizer: "adamw".*type "ApexLamb"'),
        ({"optimizer": "lamb", "weight_decay": 0.0}, {"optimizer": {"type": "ApexLamb"}}, "weight_decay: found 0"),
    ],
)
def test_optimizer_that_the_engine_cannot_run(changes, config, message):
    with pytest.raises(UserError, match=message):
        optimizers.check_fit(settings(**changes), EngineConfig.read(config, "e.json"), "models.m")
    optimizers.check_fit(settings(), EngineConfig(zero_stage=3), "models.m")
    optimizers.check_fit(settings(optimizer="lamb"), EngineConfig.read(LAMB, "e.json"), "models.m")


def test_identity_names_the_optimizer():
    def shaped(**changes):
        return shaping(Model(architecture="gpt-tiny", train=settings(**changes)))["train"]

    assert shaped(optimizer="lamb") == {**shaped(), "optimizer": "lamb"} != shaped()


def test_offload_and_the_types_choose_the_implementation(monkeypatch):
    import deepspeed.ops.adam

    asked = []
    monkeypatch.setattr(optimizers.ops, "load", lambda name, _: asked.append(name))
    monkeypatch.setattr(deepspeed.ops.adam, "FusedAdam", torch.optim.AdamW)
    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", torch.optim.NAdam)
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    student, adamw = torch.nn.Linear(2, 2), {"optimizer": {"type": "AdamW"}}
    for config, name in (
        ({"zero_optimization": {"stage": 2}}, "AdamW"),
        (adamw | {"zero_optimization": {"stage": 2}}, "AdamW"),
        ({"zero_optimization": offload}, "NAdam"),
        (adamw | {"zero_optimization": offload}, "NAdam"),
        (BARE, "ClippedAdamW"),
    ):
        assert type(optimizers.new(student, settings(), EngineConfig.read(config, "e.json"))).__name__ == name
    assert asked == ["FusedAdamBuilder", "CPUAdamBuilder", "CPUAdamBuilder"]


# ------------------------------------------------------------------------------------------------------- apex

FAKE = {
    "__init__": "",
    "optimizers/__init__": """
        import torch
        class FusedAdam(torch.optim.AdamW):
            pass
        class FusedLAMB(torch.optim.AdamW):
            def __init__(self, groups, max_grad_norm=1.0, **rest):
                super().__init__(groups, **rest)
                self.max_grad_norm = max_grad_norm
    """,
    "normalization/__init__": """
        import torch
        class FusedLayerNorm(torch.nn.LayerNorm):
            calls = 0
            def forward(self, x):
                FusedLayerNorm.calls += 1
                return super().forward(x)
    """,
}
UNBUILT = FAKE | {
    "optimizers/__init__": """
        import torch
        class FusedAdam(torch.optim.Optimizer):
            def __init__(self, *a, **k):
                raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")
    """,
    "normalization/__init__": """
        class FusedLayerNorm:
            def __init__(self, *a, **k):
                import fused_layer_norm_cuda
    """,
}
PYRAMID = {"__init__": "from pyramid.session import UnencryptedCookieSessionFactoryConfig", "lib/__init__": ""}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package called apex on the path."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]

    def put(files):
        for name, text in files.items():
            file = tmp_path / "apex" / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield put
    forget()


NORM = BARE | {"ki_ds": {"layer_norm": "apex"}}
ADAM = BARE | {"optimizer": {"type": "ApexAdam"}}
LAMB = BARE | {"optimizer": {"type": "ApexLamb"}}


@pytest.mark.parametrize("config", [NORM, ADAM])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"not installed; build it from.*github.com/NVIDIA/apex"),
        (PYRAMID, r"unrelated one, a toolkit for Pyramid; remove it \(pip uninstall apex\)"),
        (UNBUILT, "without its CUDA extensions"),
    ],
)
def test_apex_that_is_missing_unrelated_or_not_built(install, config, files, message):
    install(files)
    with pytest.raises(UserError, match=message):
        engine_of(config)


@pytest.mark.parametrize("stage", [0, 1])
def test_apex_adam_takes_the_experiments_numbers(install, stage, monkeypatch):
    from deepspeed.runtime.zero import utils

    install(FAKE)
    import apex.optimizers

    monkeypatch.setattr(utils, "ZERO_SUPPORTED_OPTIMIZERS", [apex.optimizers.FusedAdam, torch.optim.AdamW])
    zero = {"zero_optimization": {"stage": stage}}
    one, two = engine_of(zero | {"optimizer": {"type": "ApexAdam"}}), engine_of(zero)
    assert isinstance(one.optimizer, apex.optimizers.FusedAdam)
    for number in range(2):
        assert step(one, number)[1:] == pytest.approx(step(two, number)[1:])
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_apex_lamb_does_not_clip_again(install):
    install(FAKE)
    one = engine_of(LAMB, optimizer="lamb")
    assert one.optimizer.max_grad_norm == float("inf")
    assert one.optimizer.clip == 1.0


def test_lamb_skips_a_step_that_is_not_finite(install):
    install(FAKE)
    clean, hurt = (engine_of(LAMB, optimizer="lamb") for _ in range(2))
    assert not step(hurt, 7, poisoned=True)[1]
    for one in (clean, hurt):
        assert step(one, 0)[1]
    for mine, theirs in zip(weights(clean), weights(hurt), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [0, 3])
def test_apex_layer_norm_computes_the_same_and_exports_the_same(install, stage, tmp_path):
    from transformers import AutoModelForCausalLM

    install(FAKE)
    import apex.normalization

    zero = {"zero_optimization": {"stage": stage}}
    one, two = engine_of(zero | {"ki_ds": {"layer_norm": "apex"}}), engine_of(zero | {"ki_ds": {"layer_norm": "torch"}})
    for number in range(2):
        step(one, number), step(two, number)
    assert apex.normalization.FusedLayerNorm.calls == 2 * 2 * 5  # steps, micro-batches, norms of a gpt-tiny
    found = []
    for name, engine in (("one", one), ("two", two)):
        checkpoints.export(engine.deepspeed, tmp_path / name)
        found.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=0)


def test_apex_layer_norm_for_a_model_without_one(install):
    install(FAKE)
    from ki_ds.engine import apex

    with pytest.raises(UserError, match=r"no torch\.nn\.LayerNorm with weight and bias"):
        apex.swap_layer_norms(torch.nn.Sequential(torch.nn.RMSNorm(4), torch.nn.LayerNorm(4, bias=False)))
