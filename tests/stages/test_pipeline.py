"""A whole graph of models, under the real launcher."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import documented
from helpers.commands import here, metrics
from helpers.pipelines import (
    GRAPH,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]


def test_every_model_is_finished_and_evaluated(graph):
    _, work, _ = graph
    for name, model in GRAPH["models"].items():
        lines = metrics(work / "models" / name)
        assert [line["step"] for line in lines] == list(range(1, model["train"]["steps"] + 1))
        assert lines[-1]["validation"].keys() == model["train"]["on"].keys()
        found = json.loads((work / "results" / name / "perplexity.json").read_text())["corpora"]
        assert found.keys() == {"a", "b"}
        for corpus, perplexity in lines[-1]["validation"].items():
            assert found[corpus]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_training_lowers_the_loss(graph):
    _, work, _ = graph
    lines = metrics(work / "models" / "small-batch")
    assert lines[-1]["ce"] < lines[0]["ce"] - 0.3


def test_alpha_and_kl_follow_the_schedules(graph):
    _, work, _ = graph

    def column(name, key):
        return [line[key] for line in metrics(work / "models" / name)]

    assert column("g2", "alpha") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0])
    assert column("g3", "alpha") == [1.0] * 4 + [0.0] * 6
    assert column("adapted", "alpha") == [0.25] * 6 + [0.0] * 4
    assert column("g1", "alpha") == [0.0] * 10
    for name, taught in (("g1", 0), ("g2", 5), ("g3", 4), ("adapted", 6), ("half", 5)):
        assert [value is not None and value > 0 for value in column(name, "kl")] == [True] * taught + [False] * (
            10 - taught
        )


def test_targets_are_computed_once_for_two_students(graph):
    _, work, _ = graph
    assert sorted(path.name for path in (work / "targets").iterdir()) == ["g1@a", "g2@a", "on-b@b"]
    # g2 and mixed and half and small-batch read g1@a: 5 · 8 = 40 samples, 20 of a mix, 7 · 4 = 28; K is the largest
    facts = json.loads((work / "targets" / "g1@a" / "manifest.json").read_text())["facts"]
    assert (facts["samples"], facts["header"]["selection"]["k"]) == (40, 24)
    assert len(list((work / "targets" / "g1@a").glob("*.kit"))) == 3


def test_adaptation_begins_where_its_origin_ended(graph):
    """The perplexity on b of g2 is what the first step of `adapted` has: far below that of a new model."""
    _, work, _ = graph
    first = metrics(work / "models" / "adapted")[0]["ce"]
    origin = json.loads((work / "results" / "g2" / "perplexity.json").read_text())["corpora"]["b"]["nats"]
    assert first == pytest.approx(origin, abs=0.35)
    assert metrics(work / "models" / "on-b")[0]["ce"] > first + 0.3


def test_corpus_without_teacher_learns_by_cross_entropy_alone(graph):
    """In `half`, at α = 1, the loss is τ² KL on rows of a and CE on rows of b."""
    _, work, _ = graph
    first = metrics(work / "models" / "half")[0]
    only_a = metrics(work / "models" / "g2")[0]
    assert first["loss"] > 0.25 * first["ce"]
    assert first["loss"] != pytest.approx(only_a["loss"], rel=0.05)


def test_model_folders_are_hugging_face_folders(graph):
    _, work, _ = graph
    folder = work / "models" / "g2" / "model"
    assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    tokens = np.fromfile(work / "corpora" / "a" / "validation.bin", "<u2").reshape(-1, 32).astype(np.int64)
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    found = json.loads((work / "results" / "g2" / "perplexity.json").read_text())["corpora"]["a"]["nats"]
    assert loss == pytest.approx(found, rel=1e-5)  # perplexity as Hugging Face's own loss gives it
    assert tokenizer.model_max_length == 32 == model.config.max_position_embeddings
    assert tokenizer.decode(tokenizer("import asyncio")["input_ids"]) == "import asyncio"


def test_report_is_written_and_told(graph):
    _, work, output = graph
    assert (work / "report" / "report.html").exists()
    summary = json.loads((work / "report" / "summary.json").read_text())
    assert json.dumps(summary).count('"g2"')
    assert str(work / "report" / "report.html") in output.splitlines()[-1]
    assert "g2" in output.split("all done")[1]


def test_every_number_of_a_run_is_documented(graph):
    _, work, _ = graph
    for name in GRAPH["models"]:
        lines = [json.loads(line) for line in (work / "models" / name / "metrics.jsonl").read_text().splitlines()]
        assert not documented.compare("models/", lines)[0]
        assert [line["step"] for line in lines] == list(range(GRAPH["models"][name]["train"]["steps"] + 1))
        for line in lines[1:]:
            rates = line["corpora"].values()
            assert min(one["ce"] for one in rates) <= line["ce"] <= max(one["ce"] for one in rates)
    assert not documented.compare("report/", [json.loads((work / "report" / "summary.json").read_text())])[0]


def test_nothing_is_done_twice(graph):
    file, work, _ = graph
    before = {
        path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and "report" not in path.parts
    }
    output = here("run", file, "--workdir", work)
    assert output.count("done before") == len(GRAPH["models"]) * 2 + 3 + 3
    after = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and "report" not in path.parts}
    assert before == after


def test_no_pickle_travels(graph):
    """Only DeepSpeed's own checkpoints are pickles."""
    _, work, _ = graph
    allowed = {".json", ".jsonl", ".bin", ".kit", ".safetensors", ".png", ".html", ".jinja", ".txt"}
    for path in work.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts and "tensorboard" not in path.parts:
            assert path.suffix in allowed, path


def test_report_of_another_experiment_is_refused(graph):
    file, work, _ = graph
    said = here("report", file, "--workdir", work, "--set", "models.g2.train.learning_rate=0.5", code=2)
    assert "models/g2: made from another experiment" in said
    assert "learning_rate: found 0.005, expected 0.5" in said


def test_finished_models_do_without_their_checkpoints(graph, tmp_path):
    file, work, _ = graph
    shutil.copytree(work, tmp_path / "work")
    for folder in (tmp_path / "work" / "models").iterdir():
        shutil.rmtree(folder / "checkpoints")
        shutil.rmtree(folder / "tensorboard")
    assert "done before" in here("run", file, "--workdir", tmp_path / "work")


def test_status_and_plan(graph):
    file, work, _ = graph
    output = here("status", file, "--workdir", work)
    assert all(line.startswith("sealed") for line in output.splitlines())
    assert "train mixed (10 of 10 steps)" in output
    assert "DOES NOT FIT" not in here("plan", file, "--workdir", work, "--processes", 3)  # what is done divides nothing
    output = here("plan", file, "--workdir", work)
    assert "teach g1@a" in output
    line = next(line for line in output.splitlines() if "train g1 " in line)
    assert "2.56k" in line  # 10 steps · 8 sequences · 32 tokens
