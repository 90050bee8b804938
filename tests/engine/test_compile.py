"""torch.compile of the layers: the same numbers to rounding, and one graph however many rows a micro-batch has."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers.engines import VOCABULARY, batch, engine_of, means, step, weights, world  # noqa: F401

from ki_ds.engine import features
from ki_ds.engine.config import EngineConfig
from ki_ds.errors import UserError
from ki_ds.kernels import PackedTargets

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")


def engine(compiled, stage=1, **more):
    return engine_of({"zero_optimization": {"stage": stage}, "ki_ds": {"compile": compiled}, **more})


def taught(micro):
    """The same micro-batch with a target for every row."""
    rows = len(micro.labels_N)
    ids = torch.arange(4, dtype=torch.int16).repeat(rows, 1) * 7
    values = torch.arange(4, dtype=torch.uint8).repeat(rows, 1)
    targets = PackedTargets(ids, None, values, torch.full((rows,), 4, dtype=torch.int32), 1 / 16)
    return replace(micro, targets=targets, alpha_N=torch.full((rows,), 0.5))


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("stage", "more"), [(0, {}), (1, {}), (2, {}), (1, {"activation_checkpointing": {}})], ids=str
)  # fmt: skip
def test_compiled_layers_compute_the_same_in_one_graph(stage, more):
    """Rows with targets and without in turns, 5 and 11 of them; then a validation pass without gradients."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    one, two = engine(True, stage, **more), engine(False, stage, **more)
    for number in range(4):
        micros = batch(number)
        micros = [taught(micro) for micro in micros] if number % 2 else micros
        mine, theirs = (means(each, number, micros) for each in (one, two))
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        norms = [each.step(1e-3)[1] for each in (one, two)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_model_is_exported_as_any_other(tmp_path):
    from transformers import AutoModelForCausalLM

    one = engine(True)
    step(one, 0)
    kept = weights(one)
    one.export(tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert found.get_output_embeddings().weight.shape[0] == VOCABULARY
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in kept)
    assert torch.equal(found.get_output_embeddings().weight, next(p for p in kept if len(p) == VOCABULARY))


def test_it_changes_rounding_and_so_the_identity():
    plain, compiled = (
        EngineConfig.read({"zero_optimization": {"stage": 1}, "ki_ds": {"compile": on}}, "e") for on in (False, True)
    )
    assert plain.precision_record == {} and compiled.precision_record == {"compile": True}


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setattr(features.shutil, "which", lambda name: None)
    config = EngineConfig.read({"zero_optimization": {"stage": 1}, "ki_ds": {"compile": True}}, "e")
    (check,) = [one for one in features.requirements(config) if one is features._check_compiler]
    with pytest.raises(UserError, match=r"ki_ds.compile: torch.compile needs a C\+\+ compiler .*or leave compile out"):
        check()


def test_a_model_that_cannot_be_compiled_is_said_in_words(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    one = engine_of({"zero_optimization": {"stage": 1}})
    one.compile_errors = features.compile_errors(EngineConfig(compiled=True))
    broken = TorchDynamoException("no graph")
    monkeypatch.setattr(one, "deepspeed", lambda *given: (_ for _ in ()).throw(broken))
    with pytest.raises(UserError, match=r"engine\.json: ki_ds\.compile: .* cannot compile this model .*leave it out"):
        one()
