"""Every field of metrics.jsonl and of summary.json stands in docs/metrics.md, and no other."""

import dataclasses
import json

import numpy as np
from helpers import documented
from helpers.engines import Loader, new_engine, tiny_run, world  # noqa: F401
from helpers.folders import forge
from helpers.reports import make_experiment, read_summary, write_model, write_result

from ki_ds.corpus.masking import Viewer
from ki_ds.metrics import FIELDS
from ki_ds.report.page import report
from ki_ds.sealed import read_manifest
from ki_ds.training.loop import train


def test_fields_of_metrics_are_documented(tmp_path):
    part = np.full((2, 16), 7, np.uint16), Viewer("clm", 1, "a", 300, [0, 1, 2, 3, 4], None, 0.15)
    train(new_engine(0), Loader(), dataclasses.replace(tiny_run(), validation={"a": part}), tmp_path, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert documented.compare("models/", lines) == (set(), set())
    assert {name for name, *_ in documented.fields("models/")} == FIELDS.keys() == {key for x in lines for key in x}


def test_fields_of_a_summary_are_documented(workdir):
    for name, nats in (("student-v1.0", [1, 2, 3, 4]), ("large", [2, 3, 4, 6])):
        write_result(workdir, name, 100.0, nats=nats)
    folder = workdir / "models" / "large"
    forge(folder, facts=read_manifest(folder)["facts"] | {"diverged": {"docs": {"first": 2000.0, "now": 1e9}}})
    report(make_experiment(taught={"teacher_steps": 8}), workdir)
    found = [read_summary(workdir)]
    write_model(workdir, "student-v1.0", 400.0)  # learns alone, and never gets there
    report(make_experiment(), workdir)
    found.append(read_summary(workdir))
    assert found[1]["comparisons"][0]["break_away"] is None
    assert documented.compare("report/", found) == (set(), set())
