"""A model is sealed with every step in its metrics, and what it says of itself then."""

import json

import pytest
from helpers.pipelines import put_model

from ki_ds.errors import UserError
from ki_ds.experiment.graph import trained_models
from ki_ds.sealed import Identity
from ki_ds.stages.train import Train


def write_metrics(space, steps, last):
    lines = [{"step": step, "validation": {"a": 300.0 if step < 8 else last}} for step in steps]
    (space.root / "models" / "t" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_only_whole_metrics_are_sealed(space, capsys):
    stage, student, identity = Train("t"), trained_models(space.experiment)["t"], Identity("train", {}, {})
    folder = space.root / "models" / "t"
    put_model(space, 1, sealed=False)
    for step in (4, 8):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    for steps, said in (([0, 1, 2, 3, 4, 5, 7, 8], r"jsonl:7: found step 7, expected 6"), ([1, 2, 3, 4, 5], "line 5")):
        write_metrics(space, steps, 200.0)
        with pytest.raises(UserError, match=said + r".* Remove .*step-00000008, and run .* goes on from step 4 and"):
            stage.seal(space, identity, student)
        assert not (folder / "manifest.json").exists()
    write_metrics(space, range(9), 2.8e18)
    assert stage.progress(space) == "8 of 8 steps"
    stage.seal(space, identity, student)
    facts = json.loads((folder / "manifest.json").read_text())["facts"]
    assert facts["diverged"] == {"a": {"first": 300.0, "now": 2.8e18}}
    assert (facts["precision"], facts["ranks"]) == ("fp32", 1) and facts["device"]
    assert "WARNING: train t has diverged: validation perplexity on a 2.8e+18, at first 300." in capsys.readouterr().out
