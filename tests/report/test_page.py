"""The report of a work directory: what is written, what it says, and what is refused."""

import base64
import json
import math
import os
import re
from html.parser import HTMLParser

import matplotlib.image
import pytest

from ki_ds.errors import UserError
from ki_ds.experiment.schema import Experiment
from ki_ds.report.page import report, words

STEPS = 16
CURVES = {"small": 255.125, "large": 240.75, "student-v1.0": 183.25}


def make_experiment(compare=(("student-v1.0", "large"),), models=tuple(CURVES)):
    train = {"on": {"docs": 1.0}, "steps": STEPS, "batch_size": 4, "learning_rate": 1e-3}
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
            },
            "compare": [{"student": student, "baseline": baseline} for student, baseline in compare],
        }
    )


def write_model(workdir, name, last, teacher_steps=0, every=4, corpora=("docs",), teacher="small", alpha=None):
    folder = workdir / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
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
    (folder / "manifest.json").write_text(json.dumps({"stage": "train", "facts": facts}))


def write_result(workdir, name, perplexity, corpus="docs"):
    folder = workdir / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    result = {"model": name, "corpora": {corpus: {"perplexity": perplexity, "nats": 5.0, "targets": 100}}}
    (folder / "perplexity.json").write_text(json.dumps(result))


@pytest.fixture
def workdir(tmp_path):
    for name, last in CURVES.items():
        write_model(tmp_path, name, last, teacher_steps=8 if name == "student-v1.0" else 0)
        write_result(tmp_path, name, last)
    return tmp_path


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


def test_files_of_a_comparison(workdir):
    path = report(make_experiment(), workdir)
    assert path == workdir / "report" / "report.html"
    figures = {"perplexity-student-v1.0-docs.png", "alpha-student-v1.0.png", "losses-student-v1.0.png"}
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
    experiment = make_experiment([("student-v1.0", "large"), ("student-v1.0", "small")])
    path = report(experiment, workdir)
    names = sorted(name for name in os.listdir(path.parent) if name.startswith("perplexity"))
    assert names == ["perplexity-student-v1.0-docs-2.png", "perplexity-student-v1.0-docs.png"]
    assert len(read_summary(workdir)["comparisons"]) == 2


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
    pattern = r'"docs": [\d.]+' if whole else r'"docs": 240.75'
    metrics.write_text(re.sub(pattern, f'"docs": {value}', metrics.read_text()))
    write_result(workdir, "large", float("inf"))
    path = report(make_experiment(), workdir)
    (record,) = read_summary(workdir)["comparisons"]
    assert record["final"]["baseline"] is None
    assert record["end"] is None
    assert record["ahead_from"] == 4
    assert "large (learns alone) at no finite value" in Page(path).text


def test_steps_written_twice_by_a_resumed_run_count_once(workdir):
    metrics = workdir / "models" / "large" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:10], '{"step": 8, "validation": {"docs": 7.5}}', *lines[8:]]) + "\n")
    report(make_experiment(), workdir)
    assert read_summary(workdir)["comparisons"][0]["break_away"]["baseline_step"] < 8


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
        ("models/large/metrics.jsonl", '{"step": 1}\n{"step": ', r"metrics\.jsonl:2: not JSON"),
        ("models/large/metrics.jsonl", '{"ce": 1.0}', r"metrics\.jsonl:1: step: missing"),
        ("models/large/metrics.jsonl", "[]", r"metrics\.jsonl:1: "),
        ("models/large/manifest.json", "{}", r"manifest\.json: facts: missing"),
        ("models/large/manifest.json", "", r"manifest\.json: not JSON"),
        ("results/large/perplexity.json", '{"corpora": {"docs": 3}}', r"perplexity\.json: corpora\.docs"),
    ],
)
def test_damaged_files_are_named(workdir, file, text, said):
    (workdir / file).write_text(text)
    with pytest.raises(UserError, match=said):
        report(make_experiment(), workdir)
