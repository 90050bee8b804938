"""Work directories of a report, written by hand, and what a report has made of them."""

import base64
import json
from html.parser import HTMLParser

import numpy as np

from helpers.folders import forge
from ki_ds.experiment.schema import Experiment

STEPS = 16
CURVES = {"small": 255.125, "large": 240.75, "student-v1.0": 183.25}


def make_experiment(compare=(("student-v1.0", "large"),), models=tuple(CURVES), taught=None, imported=None):
    """`taught`: how the student inherits; `imported`: a teacher of which there are only predictions."""
    train = {"on": {"docs": 1.0}, "steps": STEPS, "batch_size": 4, "learning_rate": 1e-3}
    inherit = {"from": {"docs": "small"}, **(taught or {})}
    return Experiment.model_validate(
        {
            "name": "demo",
            "objective": "mlm",
            "sequence_length": 128,
            "tokenizer": {"pretrained": "somewhere"},
            "corpora": {"docs": {"sources": [{"text": "docs.txt"}]}},
            "models": {
                **{name: {"architecture": "tiny", "train": train} for name in models},
                "given": {"pretrained": "elsewhere"},
                **({imported: {"targets": {"docs": "stored"}}} if imported else {}),
                **({"student-v1.0": {"architecture": "tiny", "train": train, "inherit": inherit}} if taught else {}),
            },
            "compare": [{"student": student, "baseline": baseline} for student, baseline in compare],
        }
    )


def write_model(workdir, name, last, teacher_steps=0, every=4, corpora=("docs",), teacher="small", alpha=None):
    folder = workdir / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": 0, "tokens": 0, "seconds": 0.0, "validation": dict.fromkeys(corpora, 2000.0)})]
    for step in range(1, STEPS + 1):
        a = alpha if alpha is not None else max(1 - (step - 1) / teacher_steps, 0.0) if teacher_steps else 0.0
        row = {"step": step, "tokens": step * 512, "seconds": 0.5, "loss": 5.0, "ce": 6 - step / 10, "alpha": a}
        row["kl"] = 1.5 if a else None
        if step % every == 0:
            row["validation"] = dict.fromkeys(corpora, last * 2 ** ((STEPS - step) / 4))
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    teachers = {corpora[0]: {"model": teacher, "flops_per_sequence": 10.0, "share": 1.0}} if teacher_steps else {}
    facts = {
        "parameters": 3_456_789,
        "steps": STEPS,
        "batch_size": 4,
        "sequence_length": 128,
        "flops_per_step": 1000.0,
        "teacher_steps": teacher_steps,
        "teachers": teachers,
        "more": 1,
    }
    record = {
        "stage": "train",
        "schema": 1,
        "config": {},
        "inputs": {},
        "facts": facts,
        "files": {},
    }
    (folder / "manifest.json").write_text(json.dumps({**record, "versions": {"torch": "2.9"}}))
    forge(folder)


def write_result(workdir, name, perplexity, corpus="docs", nats=None):
    folder = workdir / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    result = {"perplexity": perplexity, "nats": 5.0, "rows": 100, "sequences": 4}
    (folder / "perplexity.json").write_text(json.dumps({"model": name, "corpora": {corpus: result}}))
    if nats is not None:
        np.array(nats, "<f4").tofile(folder / f"nats-{corpus}.bin")


def read_summary(workdir):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads((workdir / "report" / "summary.json").read_text(), parse_constant=refuse)


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data

    def images(self):
        return [
            base64.b64decode(value.removeprefix("data:image/png;base64,"), validate=True)
            for name, value in self.attributes
            if name == "src"
        ]
