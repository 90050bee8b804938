"""Every selection of targets, and targets of another experiment."""

import json
import shutil

import pytest
from helpers.commands import folder_digest, ki_ds, metrics
from helpers.pipelines import (
    TEXT,
    copy_without,
    opened,
)

from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.errors import UserError
from ki_ds.experiment.graph import trained_models
from ki_ds.stages import models, pipeline, student_data
from ki_ds.stages.teach import Teach

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]


TEACH = ("t@a", "t@a@sampled-20-t2", "t@a@top_p-0.3")


def student_of(space, name):
    return trained_models(space.experiment)[name]


def targets_read(space, name):
    return student_data.targets(space, student_of(space, name), "a")


def first_batch(space, name):
    loader = student_data.loader(space, student_of(space, name), BatchLayout(8, 8, 0, 1))
    try:
        return loader.load(0, 1.0)
    finally:
        loader.close()


def folder_states(space):
    return {name: Teach(name).state(space) for name in TEACH}


def test_every_selection_trains_to_the_end(selections):
    _, work = selections
    assert sorted(path.name for path in (work / "targets").iterdir()) == sorted(TEACH)
    first = {}
    for name in ("plain", "tail", "nucleus", "drawn"):
        lines = metrics(work / "models" / name)
        assert len(lines) == 5 and lines[-1]["validation"].keys() == {"a"}
        assert [line["kl"] is not None and line["kl"] > 0 for line in lines] == [True] * 3 + [False] * 2
        assert lines[-1]["reading_seconds"] >= lines[0]["reading_seconds"] > 0
        first[name] = lines[0]["kl"]
        assert first[name] != pytest.approx(lines[0]["ce"], rel=1e-3)
    assert len({round(value, 4) for value in first.values()}) == 4  # each reads another target
    assert all(line["reading_seconds"] == 0 for line in metrics(work / "models" / "t"))


def test_headers_say_where_targets_come_from(selections):
    file, work = selections
    header = json.loads((work / "targets" / "t@a" / "manifest.json").read_text())["facts"]["header"]
    space = opened(file, work)
    assert header["teacher"] == {"name": "t", "digest": models.content(space, "t")}
    assert header["corpus"] == {"name": "a", "digest": space.tokens("a").digest}
    assert header["stream"] == {"seed": 1, "views": 1, "sequences": len(space.tokens("a").train)}
    assert header["codec"]["scalars"] == ["first", "truth", "tail@1", "tail@2"]  # temperatures of both students


def test_larger_k_serves_a_smaller_one_and_any_temperature_without_the_teacher(selections):
    """Log-probabilities are stored at temperature 1."""
    file, work = selections
    space = opened(file, work, "models.plain.inherit.targets.k=5", "models.plain.inherit.temperature=3.5")
    assert set(folder_states(space).values()) == {"sealed"}
    (batch,), (whole,) = first_batch(space, "plain"), first_batch(opened(file, work), "plain")
    assert set(batch.targets.count_N.tolist()) == {5} and set(whole.targets.count_N.tolist()) == {16}
    kept = [set(row) for row in whole.targets.ids().tolist()]
    assert all(set(row) <= other for row, other in zip(batch.targets.ids().tolist(), kept, strict=True))


@pytest.mark.parametrize(
    ("setting", "name", "difference"),
    [
        ("models.plain.inherit.targets.k=17", "t@a", "config.selection.k: found 16, expected 17"),
        ("models.tail.inherit.temperature=3", "t@a", "config.scalars: found "),
        ("target_distortion.mean=1e-5", "t@a", "config.target_distortion: found 0.0002, expected 1e-05"),
    ],
)
def test_folder_that_lacks_what_is_asked_is_refused_with_the_key_and_the_remedy(selections, setting, name, difference):
    file, work = selections
    space = opened(file, work, setting)
    assert folder_states(space)[name] == "other"
    with pytest.raises(UserError) as refused:
        pipeline.run(space, pipeline.Launch([], 1, None), "train")
    said = str(refused.value)
    assert f"targets/{name}: made from another experiment" in said and difference in said
    assert f"or remove the folder {work / 'targets' / name}." in said


def test_tail_at_another_temperature_is_never_read_as_this_one(selections):
    """The last line of defence, should a folder be put in place by hand."""
    file, work = selections
    with pytest.raises(UserError, match=r"at the temperatures 1, 2; expected 3 \(models.tail.inherit.temperature\)"):
        targets_read(opened(file, work, "models.tail.inherit.temperature=3"), "tail")


def test_counts_are_exact_whatever_the_bound(selections):
    file, work = selections
    tight = folder_states(opened(file, work, "target_distortion.mean=1e-5"))
    assert tight["t@a@sampled-20-t2"] == "sealed" and tight["t@a"] == "other"


def test_two_ranks_store_the_same_bytes(selections, tmp_path):
    """Top-k, top-p and draws."""
    file, work = selections
    here = copy_without(work, tmp_path / "work")
    shutil.rmtree(here / "targets")
    ki_ds("teach", file, "--workdir", here, "--processes", 2)
    for name in TEACH:
        assert len(list((here / "targets" / name).glob("*.kit"))) == 3
        assert folder_digest(here / "targets" / name) == folder_digest(work / "targets" / name), name


def test_bound_that_cannot_be_met_ends_with_one_line(selections, tmp_path):
    file, work = selections
    here = copy_without(work, tmp_path / "work")
    shutil.rmtree(here / "targets")
    sets = ("--set", "target_distortion.mean=1e-6", "--set", "models.plain.inherit.targets.k=300")
    said = ki_ds("worker", "teach", file, "--workdir", here, "--name", "t@a", *sets, code=2)
    errors = [line for line in said.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert "target_distortion." in errors[0] and "models.t" in errors[0]
    assert "Traceback" not in said
    assert not (here / "targets" / "t@a" / "manifest.json").exists()


def test_stored_teacher_teaches_in_another_experiment(stored, tmp_path):
    """Its folder is named relative to the experiment file; nobody here runs or evaluates it."""
    work = tmp_path / "work"
    said = ki_ds("run", stored, "--workdir", work)
    assert "all done" in said and "teach" not in said.split("all done")[0]
    assert not (work / "targets").exists() and not (work / "results" / "t").exists()
    assert [line["kl"] is not None for line in metrics(work / "models" / "s")] == [True] * 3 + [False] * 2
    facts = json.loads((work / "models" / "s" / "manifest.json").read_text())["facts"]
    assert facts["teachers"]["a"]["flops_per_sequence"] is None
    assert (facts["skipped_steps"], facts["skipped_tries"], facts["loss_scale"]) == (0, 0, None)
    space = opened(stored, work)
    assert {stage.state(space) for stage in pipeline.stages(space.experiment)} == {"sealed"}
    summary = json.loads((work / "report" / "summary.json").read_text())
    assert summary["models"]["s"]["teachers"] == {"a": "t"}
    assert "its teacher t at unknown." in (work / "report" / "report.html").read_text()


@pytest.fixture
def elsewhere(stored, tmp_path):
    """The experiment `stored` on another text, with its corpus made."""
    (stored.parent / "b.txt").write_text(TEXT.replace("square", "second power"))
    other = opened(stored, tmp_path, 'corpora.a.sources=[{"text": "b.txt"}]')
    pipeline.run(other, pipeline.Launch([], 1, None), "corpus")
    return other


def test_stored_teacher_of_another_seed_or_corpus_is_refused_before_anything_runs(stored, selections, elsewhere):
    _, made = selections
    with pytest.raises(UserError, match=r"t@a: its teacher saw another order .*stream\.seed: found 1, expected 2"):
        preflight(opened(stored, made, "seed=2", "models.s.seed=1", "models.alone.seed=1"))
    with pytest.raises(UserError, match=r"t@a: its teacher saw another order .*corpora\.a: (stream|corpus)\."):
        preflight(elsewhere)


def test_what_a_header_does_not_tell_is_refused_at_the_first_record(stored, selections, elsewhere, monkeypatch):
    monkeypatch.setattr(student_data, "_check_order", lambda *_: None)
    _, made = selections
    assert first_batch(opened(stored, made), "s")[0].taught_N.sum() == 8 * 31
    for space in (opened(stored, made, "seed=2"), elsewhere):
        with pytest.raises(UserError, match="t@a: sample 0: the teacher saw another input than the student"):
            first_batch(space, "s")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["models.s.inherit.targets.k=17"], r"'k': 16.*expected models.s.inherit.targets .*'k': 17"),
        (["models.s.inherit.targets.select=top_p", "models.s.inherit.targets.p=0.9"], r"expected .*'kind': 'top_p'"),
        (["models.s.inherit.targets.select=sampled", "models.s.inherit.targets.k=null"], r"expected .*'sampled'"),
        (["models.s.inherit.temperature=3"], r"at the temperatures 1, 2; expected 3"),
        (["models.s.inherit.teacher_steps=4"], r"holds 24 samples; expected the 32 that models.s reads of corpora.a"),
    ],
)
def test_stored_teacher_that_lacks_what_is_asked_is_refused_before_anything_runs(
    stored, selections, settings, words, tmp_path
):
    _, work = selections
    with pytest.raises(UserError, match=words):
        targets_read(opened(stored, work, *settings), "s")
    with pytest.raises(UserError, match=words):
        preflight(opened(stored, tmp_path, *settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["sequence_length=16"], "of sequences of 32 tokens; expected sequence_length 16"),
        (["tokenizer.train.vocabulary_size=280"], "of a vocabulary of 300 ids; the tokenizer has 280"),
        (["seed=2"], "stream.seed: found 1, expected 2"),
        (["objective=mlm"], "objective: found clm, expected mlm"),
    ],
)
def test_stored_teacher_of_other_inputs_is_refused_before_there_is_a_corpus(stored, settings, words, tmp_path):
    with pytest.raises(UserError, match=rf"t@a: .*{words}"):
        preflight(opened(stored, tmp_path, *settings))
    assert not any(tmp_path.glob("*/*"))


def test_a_tokenizer_that_is_yet_to_be_trained_may_come_out_smaller_than_it_is_asked_for(stored, tmp_path):
    preflight(opened(stored, tmp_path, "tokenizer.train.vocabulary_size=320"))


@pytest.mark.parametrize("name", ["t@a@sampled-20-t2", "t@a@top_p-0.3"])
def test_stored_folder_of_another_selection_is_not_read_as_top_k(stored, selections, name):
    _, work = selections
    with pytest.raises(UserError, match=r"expected models\.s\.inherit\.targets"):
        targets_read(opened(stored, work, f"models.t.targets.a=work/targets/{name}"), "s")


def preflight(space):
    pipeline.preflight(space, pipeline.stages(space.experiment), 1)


def test_missing_stored_folder_is_refused_before_anything_runs(stored, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: there is no manifest\.json: not a finished targets folder"):
        preflight(opened(stored, tmp_path, "models.t.targets.a=nowhere"))
    preflight(opened(stored, tmp_path))
