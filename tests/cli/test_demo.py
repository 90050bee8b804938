"""`ki-ds demo`, with a few steps a model: it brings its own text and experiment file, and keeps them."""

import json

import pytest
from helpers.commands import ki_ds

FEW = [part for name in ("small", "alone", "student") for part in ("--set", f"models.{name}.train.steps=2")]
TEXT = [f"Entry {n}: twice {n} is {2 * n}, its square is {n * n}, and a few more words follow." for n in range(3000)]

pytestmark = [pytest.mark.slow, pytest.mark.launch, pytest.mark.timeout(900)]


def test_the_demo_writes_its_text_and_runs(tmp_path):
    said = ki_ds("demo", "--workdir", tmp_path, *FEW)
    assert "demo: all done" in said and (tmp_path / "report" / "report.html").exists()
    with (tmp_path / "documentation.jsonl").open() as lines:
        assert sum(len(json.loads(line)["text"]) >= 200 for line in lines) > 10_000
    # what it wrote is an experiment like any other
    assert "to do" not in ki_ds("status", tmp_path / "demo.json", "--workdir", tmp_path, *FEW)


def test_the_masked_demo_runs_on_the_text_that_is_there(tmp_path):
    text = "".join(json.dumps({"text": one}) + "\n" for one in TEXT)
    (tmp_path / "documentation.jsonl").write_text(text)
    said = ki_ds("demo", "--masked", "--workdir", tmp_path, *FEW, "--set", "corpora.docs.validation=0.1")
    assert "demo-mlm: all done" in said
    assert (tmp_path / "documentation.jsonl").read_text() == text
    facts = json.loads((tmp_path / "corpora" / "docs" / "manifest.json").read_text())["facts"]
    assert facts["documents"] == len(TEXT)
