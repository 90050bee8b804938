"""What `ki-ds plan` says of memory."""

import json
import re

import pytest
from helpers.models import SMALL

from ki_ds.cli.main import main
from ki_ds.engine.config import EngineConfig, OptimizerOffload, ParameterOffload
from ki_ds.experiment.graph import load_experiment, trained_models
from ki_ds.planning import plan
from ki_ds.planning.plan import Need, in_order, offload, shipped_engines, verdict
from ki_ds.planning.room import GIB, PROCESS, Room
from ki_ds.workspace import Workspace

TEXT = "One sentence follows another, and both are short.\n\n" * 50


def experiment(**train):
    return {
        "name": "e",
        "objective": "clm",
        "sequence_length": 32,
        "tokenizer": {"train": {"vocabulary_size": 500, "on": ["a"]}},
        "corpora": {"a": {"sources": [{"text": "a.txt"}]}},
        "models": {
            "m": {
                "architecture": "gpt-tiny",
                "train": {"on": {"a": 1.0}, "steps": 4, "batch_size": 8, "learning_rate": 1e-3, **train},
            }
        },
        "engine": {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}},
    }


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    path = tmp_path / "e.json"
    path.write_text(json.dumps(experiment()))
    return path


@pytest.fixture
def needed(file, tmp_path):
    from ki_ds.stages import models
    from ki_ds.stages.tokenizer import expected

    space = Workspace(load_experiment(file, None, ()), file, tmp_path / "work")
    config = models.configuration(space, "m", expected(space))
    return Need(space.experiment, trained_models(space.experiment)["m"], config, ranks=1, gpu=True)


LARGE = EngineConfig(zero_stage=0)
ENGINES = {  # by need on a GPU: half < whole < LARGE
    "whole.json": EngineConfig(zero_stage=1, reduce_bucket_size=1000),
    "half.json": EngineConfig(precision="bf16", zero_stage=3, reduce_bucket_size=1000),
}


def test_one_of_the_shipped_engines_is_recommended(needed, monkeypatch):
    monkeypatch.setattr(plan, "shipped_engines", lambda: ENGINES)
    large = EngineConfig(zero_stage=1, reduce_bucket_size=10_000_000)
    there = Room(True, needed.at(ENGINES["whole.json"], 8).device / 0.9 + 1, None, "a GPU")
    said = verdict(needed, 8, large, there)
    assert re.search(
        r"^needs .* with micro_batch_size 8; DOES NOT FIT \(a GPU\); ds_configs/engine/whole.json would", said
    )
    assert "; fits (a GPU)" in verdict(needed, 8, ENGINES["whole.json"], there)
    there = Room(True, needed.at(ENGINES["half.json"], 8).device / 0.9 + 1, None, "a GPU")
    assert "engine/half.json would" in verdict(needed, 8, large, there)


def test_no_engine_is_recommended_that_the_optimizer_does_not_go_with(needed, monkeypatch):
    engines = {"zero0.json": EngineConfig(zero_stage=0), **ENGINES}
    monkeypatch.setattr(plan, "shipped_engines", lambda: engines)
    large = EngineConfig(zero_stage=1, reduce_bucket_size=10_000_000)
    there = Room(True, max(needed.at(one, 8).device for one in engines.values()) / 0.9 + 1, None, "a GPU")
    assert "engine/zero0.json would" in verdict(needed, 8, large, there)
    needed.train = needed.train.model_copy(update={"optimizer": "muon", "gradient_clipping": 0.0})
    assert "engine/whole.json would" in verdict(needed, 8, large, there)


def test_a_smaller_micro_batch_where_no_engine_does(needed, monkeypatch):
    monkeypatch.setattr(plan, "shipped_engines", lambda: ENGINES)
    there = Room(True, needed.at(ENGINES["half.json"], 2).device / 0.9 + 1, None, "a GPU")
    assert 'no engine JSON fits at this size; with "micro_batch_size": 2 ds_configs/engine/half.json' in verdict(
        needed, 8, LARGE, there
    )
    assert "not even with micro_batch_size 1" in verdict(needed, 8, LARGE, Room(True, 1000.0, None, "a GPU"))


def test_without_knowing_what_there_is_no_verdict(needed):
    said = verdict(needed, 8, LARGE, Room(True))
    assert "not known from here (ask with --memory GIB)" in said
    assert "fit" not in said.lower().replace("micro_batch", "")


def test_host_memory_counts_too(needed):
    offloaded = EngineConfig(zero_stage=2, offload_optimizer=OptimizerOffload("cpu"), reduce_bucket_size=1000)
    found = needed.at(offloaded, 1)
    assert found.host > 0
    assert Room(True, GIB, 2 * (found.host + PROCESS)).holds(found)
    assert not Room(True, GIB, found.host + PROCESS).holds(found)
    assert not Room(False, found.device + found.host + PROCESS).holds(found)
    assert Room(False, 2 * (found.device + found.host + PROCESS)).holds(found)


def test_two_sizes_tell_of_all(needed):
    from ki_ds.planning.activations import Pass, kept

    for engine in ENGINES.values():
        how = Pass.of(5, 32, engine, gpu=True)
        assert needed.kept(engine, 5) == pytest.approx(kept(needed.config, "clm", how), abs=2)


def test_engines_are_tried_without_offload_then_in_the_same_precision_then_by_stage():
    shipped = shipped_engines()
    assert {"zero0_fp32.json", "zero3_bf16.json"} <= shipped.keys()
    plain = {name: config for name, config in shipped.items() if name.count("_") == 1}
    bf16 = [name for name, config in in_order(plain, shipped["zero1_bf16.json"]) if not offload(config)]
    assert bf16[:4] == ["zero1_bf16.json", "zero2_bf16.json", "zero3_bf16.json", "zero0_fp32.json"]
    fp32 = [name for name, _ in in_order(shipped, LARGE)]
    assert fp32[:4] == [f"zero{stage}_fp32.json" for stage in range(4)]
    given = {"near": LARGE, "far": EngineConfig(zero_stage=3, offload_parameters=ParameterOffload("nvme"))}
    assert [name for name, _ in in_order(given, LARGE)] == ["near", "far"]


def test_the_command_gives_a_verdict_for_each_model(file, tmp_path, capsys):
    def asked(*more):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(file), "--workdir", str(tmp_path / "work"), *more])
        assert ended.value.code in (0, None)
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("m: "))

    assert "fits (1 GiB a rank, as given)" in asked("--memory", "1")
    assert "with micro_batch_size 4; fits" in asked("--memory", "1", "--processes", "2")
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\n")
    assert "not known from here" in asked("--hostfile", str(hosts))
    assert "with micro_batch_size 4" in asked("--hostfile", str(hosts))


@pytest.mark.parametrize(
    ("objective", "architecture", "said"),
    [
        ("mlm", {"model_type": "modernbert", **SMALL}, "activations take, which are not estimated.*; fits"),
        ("clm", {"model_type": "gpt2", "n_embd": 16, "n_layer": 0, "n_head": 2}, "; fits"),
    ],
)
def test_models_without_a_trace_and_without_layers_are_planned(objective, architecture, said, tmp_path, capsys):
    """As students and as teachers."""
    given = experiment() | {"objective": objective}
    given["models"]["m"]["architecture"] = architecture
    student = {"from": {"a": "m"}, "alpha_T": 1.0, "targets": {"k": 10}}
    given["models"]["s"] = {**given["models"]["m"], "inherit": student}
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "e.json").write_text(json.dumps(given))
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path / "e.json"), "--workdir", str(tmp_path / "work"), "--memory", "1"])
    out = capsys.readouterr().out
    assert ended.value.code in (0, None) and re.search(f"^s: needs .*{said}", out, re.MULTILINE)
    assert ("m@a: memory is without the teacher's activations" in out) == (objective == "mlm")
