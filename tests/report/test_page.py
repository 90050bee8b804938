"""The report of a work directory: what is written, and what is refused."""

import math
import os
import re

import matplotlib.image
import pytest
from helpers.reports import CURVES, STEPS, Page, make_experiment, read_summary, write_model, write_result

from ki_ds.errors import UserError
from ki_ds.report.page import report
from ki_ds.report.words import words


def test_files_of_a_comparison(workdir):
    path = report(make_experiment(), workdir)
    assert path == workdir / "report" / "report.html"
    figures = {"perplexity-large-docs.png", "alpha-student-v1.0.png", "losses-student-v1.0.png"}
    assert set(os.listdir(path.parent)) == {"report.html", "summary.json", *figures}
    files = [(path.parent / figure).read_bytes() for figure in figures]
    assert sorted(Page(path).images()) == sorted(files)
    for figure in figures:
        pixels = matplotlib.image.imread(path.parent / figure)
        assert pixels.shape[0] > 400
        assert pixels.std() > 0.01


def test_summary_by_hand(workdir):
    report(make_experiment(), workdir)
    summary = read_summary(workdir)
    assert list(summary["models"]) == ["small", "large", "student-v1.0"]  # "given" has no files
    assert summary["models"]["large"]["perplexities"] == {"docs": 240.75}
    (record,) = summary["comparisons"]
    assert record["final"] == {
        "student": 183.25,
        "baseline": 240.75,
        "teacher": {"model": "small", "perplexity": 255.125},
    }
    assert record["ahead_from"] == 4
    # both curves halve every 4 steps: at step 8 the student is 4 log2(240.75 / 183.25) steps ahead
    needed = 8 + 4 * math.log2(240.75 / 183.25)
    found = record["break_away"]
    assert (found["step"], found["student_perplexity"]) == (8, 183.25 * 4)
    assert found["baseline_step"] == pytest.approx(needed)
    assert found["steps_saved"] == pytest.approx(1 - 8 / needed)
    assert found["flops_saved_with_teacher"] == pytest.approx(1 - 8 * 1040 / (needed * 1000))
    assert record["end"]["student_step"] == pytest.approx(16 - (needed - 8))


def test_page_is_self_contained_and_tells_the_numbers(workdir):
    path = report(make_experiment(), workdir)
    source, page = path.read_text(encoding="utf-8"), Page(path)
    assert not re.search(r"https?://|url\(|@import|<script|<link", source)
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for line in words(read_summary(workdir)):
        assert line in page.text
    for shown in ("3,456,789", "183.2", "240.8", "255.1", "student-v1.0 against large"):
        assert shown in page.text


def test_hostile_names_are_escaped_and_stay_in_the_folder(workdir):
    corpus = '../../<script>alert("x")</script>$\\frac{_^$'
    for name, last in CURVES.items():
        taught = 8 if name == "student-v1.0" else 0
        write_model(workdir, name, last, taught, corpora=(corpus,), teacher="<img src=x onerror=y>$x$")
    write_result(workdir, "large", 5.0, corpus="<b>bold</b>" * 50)
    experiment = make_experiment().model_copy(update={"name": "</title><script>z</script>"})
    before = {path for path in workdir.rglob("*") if "report" not in path.parts}
    path = report(experiment, workdir)
    page = Page(path)
    assert not {"script", "b"} & set(page.tags)
    assert page.tags.count("img") == 3
    assert "onerror" not in dict(page.attributes)
    assert corpus in page.text
    assert {path for path in workdir.rglob("*") if "report" not in path.parts} == before


def test_figures_of_the_same_name_do_not_overwrite_each_other(workdir):
    for name, corpus in (("large", "a-docs"), ("large-a", "docs")):
        write_model(workdir, name, 240.75, corpora=("docs", corpus))
    write_model(workdir, "student-v1.0", 183.25, 8, corpora=("docs", "a-docs"))
    write_model(workdir, "small", 183.25, 8)
    experiment = make_experiment([("student-v1.0", "large"), ("small", "large-a")], (*CURVES, "large-a"))
    path = report(experiment, workdir)
    names = sorted(name for name in os.listdir(path.parent) if name.startswith("perplexity-large-a"))
    assert names == ["perplexity-large-a-docs-2.png", "perplexity-large-a-docs.png"]
    assert len(read_summary(workdir)["comparisons"]) == 3


def test_without_comparisons_all_models_share_a_figure(workdir):
    write_result(workdir, "given", 99.5)
    path = report(make_experiment(compare=()), workdir)
    assert {name for name in os.listdir(path.parent) if name.endswith(".png")} == {"perplexity-docs.png"}
    summary = read_summary(workdir)
    assert summary["comparisons"] == []
    assert summary["models"]["given"] == {
        "parameters": None,
        "steps": None,
        "batch_size": None,
        "sequence_length": None,
        "teachers": {},
        "perplexities": {"docs": 99.5},
        "initial_perplexities": {},
        "diverged": {},
        "training": None,
        "inherit": None,
    }
    assert "99.50" in Page(path).text


def test_only_models_with_files_are_shown(workdir):
    report(make_experiment(models=(*CURVES, "later")), workdir)
    assert "later" not in read_summary(workdir)["models"]


def test_last_validation_stands_in_for_a_missing_evaluation(workdir):
    (workdir / "results" / "small" / "perplexity.json").unlink()
    report(make_experiment(), workdir)
    assert read_summary(workdir)["comparisons"][0]["final"]["teacher"]["perplexity"] == 255.125


@pytest.mark.filterwarnings("error")
def test_one_evaluation(workdir):
    for name, last in CURVES.items():
        write_model(workdir, name, last, teacher_steps=8 if name == "student-v1.0" else 0, every=STEPS)
    report(make_experiment(), workdir)
    (record,) = read_summary(workdir)["comparisons"]
    assert record["break_away"]["student_perplexity"] is None
    assert record["end"]["lower_bound"]


@pytest.mark.filterwarnings("error")
def test_alpha_that_never_reaches_zero(workdir):
    write_model(workdir, "student-v1.0", 183.25, teacher_steps=STEPS, alpha=0.3)
    path = report(make_experiment(), workdir)
    assert read_summary(workdir)["comparisons"][0]["break_away"] is None
    assert "There is no break-away" in Page(path).text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", ["NaN", "Infinity", "null"])
@pytest.mark.parametrize("whole", [False, True])
def test_perplexities_that_are_not_finite(workdir, value, whole):
    metrics = workdir / "models" / "large" / "metrics.jsonl"
    pattern = r'"docs": [\d.]+(?=}})' if whole else r'"docs": 240.75'
    metrics.write_text(re.sub(pattern, f'"docs": {value}', metrics.read_text()))
    write_result(workdir, "large", float("inf"))
    path = report(make_experiment(), workdir)
    (record,) = read_summary(workdir)["comparisons"]
    assert record["final"]["baseline"] is None
    assert record["end"] is None
    assert record["ahead_from"] == 4
    assert "large (learns alone) at no finite value" in Page(path).text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines[:10], *lines[8:]], r"metrics\.jsonl:11: found step 8, expected 10"),
        (lambda lines: [*lines[:10], *lines[11:]], r"metrics\.jsonl:11: found step 11, expected 10"),
        (
            lambda lines: lines[:-3],
            r"metrics\.jsonl: ends after line 14 with step 13; expected every step from 1 to 16",
        ),
    ],
)
def test_metrics_with_steps_missing_or_twice_are_not_shown(workdir, change, said):
    metrics = workdir / "models" / "large" / "metrics.jsonl"
    metrics.write_text("".join(change(metrics.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=said + r".*remove .*models/large and run `ki-ds run`: it trains it again"):
        report(make_experiment(), workdir)


def test_a_second_report_replaces_the_first(workdir):
    first = report(make_experiment(), workdir).read_bytes()
    assert report(make_experiment(), workdir).read_bytes() == first  # and is the same, byte for byte
    write_result(workdir, "large", 77.75)
    assert b"77.75" in report(make_experiment(), workdir).read_bytes()
    assert not [name for name in os.listdir(workdir / "report") if "tmp" in name]


@pytest.mark.parametrize("file", ["metrics.jsonl", "manifest.json"])
@pytest.mark.parametrize(("role", "name"), [("student", "student-v1.0"), ("baseline", "large")])
def test_compared_model_without_files(workdir, file, role, name):
    missing = workdir / "models" / name / file
    missing.unlink()
    with pytest.raises(UserError) as caught:
        report(make_experiment(), workdir)
    assert str(missing) in str(caught.value)
    assert f'compare.0.{role} is "{name}"' in str(caught.value)
    assert "`ki-ds run`" in str(caught.value)
    assert not (workdir / "report").exists()


def test_compared_models_without_a_common_corpus(workdir):
    write_model(workdir, "large", 240.75, corpora=("code",))
    with pytest.raises(UserError, match=r"no validation on a corpus of \"large\".*compare\.0"):
        report(make_experiment(), workdir)


def test_nothing_to_show(tmp_path):
    with pytest.raises(UserError, match="no model of demo was trained or evaluated here; use `ki-ds run`"):
        report(make_experiment(compare=()), tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("models/large/metrics.jsonl", '{"step": 1}\n{"step": ', r"metrics\.jsonl:2: cut off"),
        ("models/large/metrics.jsonl", '{"ce": 1.0}\n', r"metrics\.jsonl:1: step: missing"),
        ("models/large/metrics.jsonl", b"\xff\n", r"metrics\.jsonl:1: not UTF-8"),
        ("models/large/metrics.jsonl", "[" * 10**5 + "\n", r"metrics\.jsonl:1: nested too deep"),
        ("models/large/manifest.json", "{}", r"manifest\.json: not a manifest"),
        ("models/large/manifest.json", "", r"manifest\.json: cannot be read"),
        ("results/large/perplexity.json", b'{"\xff": 1}', r"perplexity\.json: not JSON.*results/large and run"),
        ("results/large/perplexity.json", "[" * 10**5, r"perplexity\.json: not JSON"),
        (
            "results/large/perplexity.json",
            '{"corpora": {"docs": {"perplexity": "1"}}}',
            r"perplexity\.json: corpora\.docs",
        ),
        ("results/large/perplexity.json", '{"corpora": {"docs": 3}}', r"perplexity\.json: corpora\.docs"),
    ],
)
def test_damaged_files_are_named(workdir, file, text, said):
    (workdir / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        report(make_experiment(), workdir)
