"""What a report tells beside the savings: how models were made, and what to be wary of."""

import os

import numpy as np
import pytest
from helpers.folders import forge
from helpers.reports import CURVES, STEPS, Page, make_experiment, read_summary, write_model, write_result

from ki_ds.report.page import report
from ki_ds.report.words import words
from ki_ds.sealed import read_manifest


def test_ends_are_those_of_the_results(workdir):
    """The last validation in training is the same but for rounding, or of an older validation part."""
    write_result(workdir, "student-v1.0", 150.5)
    path = report(make_experiment(), workdir)
    assert read_summary(workdir)["comparisons"][0]["final"]["student"] == 150.5
    assert "ends at perplexity 150.5 on docs" in Page(path).text


@pytest.mark.parametrize(("theirs", "warned"), [([500, 510, 490, 505], False), ([500, 400, 600, 495], True)])
def test_validation_part_too_small_for_the_difference_is_warned_of(workdir, theirs, warned):
    write_result(workdir, "student-v1.0", 183.25, nats=[490, 498, 481, 494])
    write_result(workdir, "large", 240.75, nats=theirs)
    path = report(make_experiment(), workdir)
    found = read_summary(workdir)["comparisons"][0]["difference"]
    assert found["nats"] == pytest.approx(np.mean(np.subtract([490, 498, 481, 494], theirs)) / 25)
    assert ("is too small to tell this difference" in Page(path).text) == warned
    assert read_summary(workdir)["validation"] == {"docs": {"sequences": 4, "rows": 100}}


def test_page_says_how_models_were_made(workdir):
    path = report(make_experiment(), workdir)
    text, record = Page(path).text, read_summary(workdir)["models"]["student-v1.0"]
    assert record["initial_perplexities"] == {"docs": 2000.0}
    assert record["training"]["tokens"] == STEPS * 4 * 128
    assert record["training"]["tokens_per_second"] == STEPS * 4 * 128 / 0.5
    assert record["training"]["versions"] == {"torch": "2.9"}
    for shown in ("adamw, 0.001", "4 × 128 tokens", "8,192", "16,384", "torch 2.9", "4 sequences, 100 rows"):
        assert shown in text


def test_page_says_how_a_student_inherited(workdir):
    experiment = make_experiment(taught={"teacher_steps": 8, "temperature": 3.0, "targets": {"k": 17}})
    text, record = Page(report(experiment, workdir)).text, read_summary(workdir)["models"]["student-v1.0"]["inherit"]
    assert record == {
        "schedule": "linear", "teacher_steps": 8, "temperature": 3.0, "select": "top_k", "k": 17, "p": None,
        "draws": None,
    }  # fmt: skip
    assert "3.0" in text and "top_k, k 17" in text and "linear, 8" in text


def test_students_of_one_baseline_share_a_figure(workdir):
    write_model(workdir, "other", 200.0, teacher_steps=4)
    experiment = make_experiment([("student-v1.0", "large"), ("other", "large")], (*CURVES, "other"))
    path = report(experiment, workdir)
    names = {name for name in os.listdir(path.parent) if name.startswith("perplexity")}
    assert names == {"perplexity-large-docs.png"}
    assert "student-v1.0, other against large" in Page(path).text
    assert {record["student"] for record in read_summary(workdir)["comparisons"]} == {"student-v1.0", "other"}


def test_a_diverged_model_is_warned_of(workdir):
    folder = workdir / "models" / "large"
    forge(folder, facts=read_manifest(folder)["facts"] | {"diverged": {"docs": {"first": 2000.0, "now": 2.8e18}}})
    path = report(make_experiment(), workdir)
    said = "WARNING: large has diverged: validation perplexity on docs 2.8e+18, at first 2000."
    assert said in Page(path).text and words(read_summary(workdir))[0].startswith(said)


def test_an_imported_teacher_is_unknown_and_not_free(workdir):
    for cost in (0.0, None):
        folder = workdir / "models" / "student-v1.0"
        forge(
            folder,
            facts=read_manifest(folder)["facts"]
            | {"teachers": {"docs": {"model": "theirs", "flops_per_sequence": cost, "share": 1.0}}},
        )
        path = report(make_experiment(imported="theirs"), workdir)
        text = Page(path).text
        assert "its teacher theirs at unknown." in text and "no finite value" not in text
        assert "what that took is unknown" in text
        (compared,) = read_summary(workdir)["comparisons"]
        assert compared["end"]["flops_saved_with_teacher"] is None
        assert "theirs" in read_summary(workdir)["models"]
        assert text.count("unknown") > len(words(read_summary(workdir)))
