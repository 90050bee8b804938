"""Optimizers by name: LAMB against float64, the guard, apex (stand-ins for it), and what each does not go with."""

import sys
import textwrap

import pytest
import torch
from helpers.engines import batch, engine_of, new_student, settings, step, weights, world  # noqa: F401

from ki_ds.engine import checkpoints, optimizers
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Model
from ki_ds.stages import identities

BARE = {"zero_optimization": {"stage": 0}}


def reference_lamb(parameters, gradients, states, t, lr, betas, eps, decays, adapted):
    """Algorithm 2 of You et al. 2020, layer by layer in float64; `parameters` and `states` are changed."""
    for p, g, (m, v), decay, adapt in zip(parameters, gradients, states, decays, adapted, strict=True):
        m.mul_(betas[0]).add_((1 - betas[0]) * g)
        v.mul_(betas[1]).add_((1 - betas[1]) * g**2)
        r = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps) + decay * p
        x, u = p.pow(2).sum().sqrt().item(), r.pow(2).sum().sqrt().item()
        p.sub_(lr * (x / u if adapt and x > 0 and u > 0 else 1.0) * r)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_lamb_equals_its_definition_in_float64(dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 4), (4, 4), (7,)]  # the second begins at zero: its trust ratio is 1
    parameters = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    parameters[1].zero_()
    mine = [p.clone().to(dtype).requires_grad_() for p in parameters]
    states = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    optimizer = optimizers.Lamb(
        [{"params": mine[:3], "weight_decay": 0.1}, {"params": mine[3:], "adapt": False}],
        lr=1.0, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    for t in range(1, 7):
        gradients = [torch.randn(shape, generator=g, dtype=torch.float64) * 10.0**-t for shape in shapes]
        gradients[2].zero_()
        for p, gradient in zip(mine, gradients, strict=True):
            p.grad = gradient.to(dtype)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / t
        optimizer.step()
        reference_lamb(
            parameters, gradients, states, t, 0.1 / t, (0.9, 0.98), 1e-6, [0.1] * 3 + [0.0], [True] * 3 + [False]
        )
    for p, expected in zip(mine, parameters, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("half", [False, True])
def test_lamb_in_the_engine_equals_plain_torch(half):
    """Clipped, accumulated, with and without bf16 autocast."""
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if half else {}
    one = engine_of(BARE | autocast, optimizer="lamb", gradient_clipping=0.5)
    plain = new_student()
    parameters = list(plain.parameters())
    states = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    matrix = [p.dim() > 1 for p in parameters]
    for number in range(3):
        assert step(one, number, rate=1e-2)[1]
        plain.zero_grad()
        micros = batch(number)
        total = sum(len(micro.labels_N) for micro in micros)
        for micro in micros:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = plain(*micro.to(torch.device("cpu")), 1.0).loss
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        with torch.no_grad():
            gradients, decays = [p.grad for p in parameters], [0.01 * m for m in matrix]
            reference_lamb(parameters, gradients, states, number + 1, 1e-2, (0.9, 0.98), 1e-6, decays, matrix)
    for mine, theirs in zip(weights(one), parameters, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-3 if half else 2e-5)


def test_lamb_skips_a_step_that_is_not_finite():
    clean, hurt = (engine_of(BARE, optimizer="lamb") for _ in range(2))
    assert not step(hurt, 7, poisoned=True)[1]
    for one in (clean, hurt):
        assert step(one, 0)[1]
    for mine, theirs in zip(weights(clean), weights(hurt), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"optimizer": "lamb"}, {"zero_optimization": {"stage": 1}}, r'"lamb" with ZeRO stage 1.*slices.*"stage": 0'),
        ({"optimizer": "lamb"}, {"optimizer": {"type": "AdamW"}}, '"lamb", but e.json.*type "AdamW".*of "adamw"'),
        ({}, {"optimizer": {"type": "ApexLamb"}}, r'models.m.train.optimizer: "adamw".*type "ApexLamb"'),
        ({"optimizer": "lamb", "weight_decay": 0.0}, {"optimizer": {"type": "ApexLamb"}}, "weight_decay: found 0"),
    ],
)
def test_optimizer_that_the_engine_cannot_run(changes, config, message):
    with pytest.raises(UserError, match=message):
        optimizers.check_fit(settings(**changes), config, "models.m", "e.json")
    optimizers.check_fit(settings(), {"zero_optimization": {"stage": 3}}, "models.m", "e.json")


def test_identity_names_the_optimizer_only_where_it_is_not_the_default():
    def shaping(**changes):
        return identities.shaping(Model(architecture="gpt-tiny", train=settings(**changes)))["train"]

    assert "optimizer" not in shaping()
    assert shaping(optimizer="lamb") == {**shaping(), "optimizer": "lamb"}


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
        (BARE, "GuardedAdamW"),
    ):
        assert type(optimizers.new(student, settings(), config)).__name__ == name
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
    one = engine_of(BARE | {"optimizer": {"type": "ApexLamb"}}, optimizer="lamb")
    assert one.optimizer.max_grad_norm == float("inf")
    assert one.optimizer.clip == 1.0


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
