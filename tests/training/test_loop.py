"""The training loop: a step's result and its record, what is due when, and what a resumed run goes on from."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers.commands import metrics
from helpers.engines import LENGTH, VOCABULARY, Loader, batch, new_engine, settings, tiny_run, world  # noqa: F401
from helpers.taught_corpora import TAIL, K, layout, loader, make_world

from ki_ds.corpus.masking import Viewer
from ki_ds.errors import UserError
from ki_ds.launch import heartbeat
from ki_ds.metrics import read_metrics
from ki_ds.pinned import host_tensor
from ki_ds.training.batches import Batch, MicroBatch
from ki_ds.training.divergence import MOST_SKIPPED, SkippedSteps, diverged, run_facts
from ki_ds.training.loop import Sums, accumulate, train, update
from ki_ds.training.records import CorpusMeans, Records, StepResult
from ki_ds.training.run import Every

RESULT = StepResult(
    step=4, alpha=0.25, loss=2.5, ce=3.0, kl=1.5, temperature=2.0, corpora={"a": CorpusMeans(3.0, 1.5)},
    learning_rate=1e-2, gradient_norm=0.7, applied=True, loss_scale=None, skipped=0, asked_to_stop=False,
)  # fmt: skip
KEYS = [
    "loss", "ce", "kl", "kl_tau2", "corpora", "learning_rate", "gradient_norm", "applied", "loss_scale", "skipped",
    "step", "tokens", "seconds", "alpha", "tokens_per_second", "reading_seconds", "waited_seconds",
]  # fmt: skip


class Slow(Loader):
    """Says that each step took so long."""

    def __call__(self, number):
        self.reading_s += 0.5
        self.waited_s += 0.25
        return super().__call__(number)


class Interrupted(Exception):
    pass


def validating(**changes):
    """A run with a validation part."""
    tokens = np.random.default_rng(0).integers(5, VOCABULARY, (3, LENGTH)).astype(np.uint16)
    viewer = Viewer("clm", 1, "a", VOCABULARY, [0, 1, 2, 3, 4], None, 0.15)
    return dataclasses.replace(tiny_run(**changes), validation={"a": (tokens, viewer)})


# ------------------------------------------------------------------------------------------------ results, records


def test_a_result_is_frozen_and_becomes_a_record_in_one_place(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        RESULT.loss = 0.0
    with Records(tiny_run(), Loader(), tmp_path, 0) as records:
        with records.timed():
            pass
        record = records.write(RESULT, None)
        validated = records.record(RESULT, {"a": 20.0})
    assert list(record) == KEYS
    assert list(validated) == [*KEYS, "validation"] and validated["validation"] == {"a": 20.0}
    said = {key: record[key] for key in ("step", "tokens", "alpha", "kl", "skipped", "loss_scale")}
    assert said == {"step": 5, "tokens": 5 * 4 * LENGTH, "alpha": 0.25, "kl": 1.5, "skipped": 0, "loss_scale": None}
    assert (record["kl_tau2"], record["corpora"]) == (6.0, {"a": {"ce": 3.0, "kl": 1.5}})
    assert record["tokens_per_second"] == pytest.approx(4 * LENGTH / record["seconds"])
    assert metrics(tmp_path) == [record]


def test_means_are_over_all_rows_and_over_those_that_inherit():
    sums = Sums(6.0, {"a": 8.0, "b": 0.0}, {"a": 3.0, "b": 0.0}, 0.0, {"a": 4.0, "b": 0.0}, {"a": 2.0, "b": 0.0})
    assert sums.means == (1.5, 2.0, 1.5)
    assert sums.means_by_corpus == {"a": (2.0, 1.5), "b": (None, None)}


def test_a_step_without_any_row_is_one_of_loss_zero():
    one, empty = new_engine(1), torch.zeros(0, dtype=torch.int64)
    micros = [MicroBatch(torch.zeros(2, LENGTH, dtype=torch.int64), empty, empty, None, None, empty.short())] * 2
    result = update(one, Batch(0, 0.0, micros), tiny_run())
    assert (result.loss, result.ce, result.kl, result.gradient_norm) == (0.0, 0.0, None, 0.0)
    assert result.corpora == {"a": (None, None)}
    assert result.applied


def test_ce_and_kl_of_each_corpus_are_those_of_its_rows_alone():
    one, number = new_engine(1), torch.Generator().manual_seed(0)
    run = dataclasses.replace(tiny_run(), train=settings(on={"a": 1.0, "b": 1.0, "c": 1.0}))
    micros = [
        dataclasses.replace(micro, corpus_N=torch.randint(0, 2, (len(micro.labels_N),), generator=number).short())
        for micro in batch(0)
    ]
    sums = Sums.of(accumulate(one, Batch(0, 0.0, micros), run), run)
    for corpus, name in enumerate("ab"):
        ce = rows = 0
        for micro in micros:
            here = micro.corpus_N == corpus
            rows += int(here.sum())
            ce += one(micro.input_ids_BS, micro.rows_N[here], micro.labels_N[here], None, None, 1.0).ce.item()
        assert sums.means_by_corpus[name] == (pytest.approx(ce / rows, rel=1e-5), None)
    assert sums.means_by_corpus["c"] == (None, None)
    assert sum(sums.rows.values()) == 16


def test_progress_shows_the_cross_entropy_and_not_the_mixture():
    assert RESULT.words == "CE 3.000, KL 1.500, alpha 0.25"
    assert dataclasses.replace(RESULT, kl=None, alpha=0.0).words == "CE 3.000"


def test_a_rank_that_was_asked_to_stop_says_so_in_the_result_of_its_step(tmp_path, monkeypatch):
    """A checkpoint is saved after that step; the record knows nothing of it."""
    asked = iter([False, False, True])
    monkeypatch.setattr(heartbeat, "asked_to_stop", lambda: next(asked))
    with pytest.raises(heartbeat.Stopped):
        train(new_engine(0), Loader(), tiny_run(), tmp_path, {})
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    assert "asked_to_stop" not in metrics(tmp_path)[-1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))[-1] == "step-00000003"


def test_one_finite_step_forgives_those_before(tmp_path):
    skipped = SkippedSteps(tiny_run())
    bad = dataclasses.replace(RESULT, applied=False)
    for _ in range(3):
        for result in [bad] * MOST_SKIPPED + [RESULT]:
            skipped.count(result)
    assert skipped.in_a_row == 0


# ------------------------------------------------------------------------------------------------------ what is due


def validated(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation"]["a"]) for line in lines if "validation" in line]


def test_model_is_validated_once_before_its_first_step_also_where_the_run_is_resumed(tmp_path):
    class Broken(Loader):
        at = 3

        def __call__(self, number):
            if number == self.at:
                raise Interrupted
            return super().__call__(number)

    run = validating(evaluate_every=10, checkpoint_every=5)
    for Broken.at in (3, 7):  # before there is a checkpoint, and after
        with pytest.raises(Interrupted):
            train(new_engine(0), Broken(), run, tmp_path, {})
    train(new_engine(0), Loader(), run, tmp_path, {})
    found = validated(tmp_path)
    assert [step for step, _ in found] == [0, 10, 20]
    assert found[0][1] == pytest.approx(VOCABULARY, rel=0.2)  # an untrained model knows nothing
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"step", "tokens", "seconds", "validation"} and first["tokens"] == 0


@pytest.mark.parametrize(("every", "wanted"), [(3, [3, 6, 9, 10]), (1, [*range(1, 11)]), (40, [10]), (5, [5, 10])])
def test_due_every_so_many_steps_and_after_the_last(every, wanted):
    due = Every(every, last=10).due
    assert [step for step in range(1, 11) if due(step)] == wanted


def test_validation_and_checkpoints_come_when_they_are_due(tmp_path):
    run = tiny_run(evaluate_every=8, checkpoint_every=9, keep_checkpoints=9)
    train(new_engine(0), Loader(), run, tmp_path, {})
    assert [line["step"] for line in metrics(tmp_path) if "validation" in line] == [8, 16, 20]
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == ["step-00000009", "step-00000018", "step-00000020"]


def test_the_checkpoint_before_the_decay_is_always_kept(tmp_path):
    wsd = {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 9}
    train(new_engine(0), Loader(), tiny_run(checkpoint_every=4, keep_checkpoints=1, **wsd), tmp_path, {})
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == ["step-00000011", "step-00000020"]


# ---------------------------------------------------------------------------------------------------------- resuming


def test_times_go_on_where_a_run_is_resumed(tmp_path):
    """From the last line that is kept: later ones are of steps that are done again."""

    class Broken(Slow):
        def __call__(self, number):
            if number == 7:
                raise Interrupted
            return super().__call__(number)

    run = tiny_run(checkpoint_every=5)
    with pytest.raises(Interrupted):
        train(new_engine(0), Broken(), run, tmp_path, {})
    before = metrics(tmp_path)
    assert [line["step"] for line in before] == [*range(1, 8)]
    train(new_engine(0), Slow(), run, tmp_path, {})
    lines = metrics(tmp_path)
    assert lines[:5] == before[:5]
    assert [line["reading_seconds"] for line in lines] == [0.5 * n for n in range(1, 21)]
    assert [line["waited_seconds"] for line in lines] == [0.25 * n for n in range(1, 21)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and len(set(seconds)) == 20


def test_a_line_from_before_these_times_were_kept_counts_as_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.0}\n')
    with Records(tiny_run(), Slow(), tmp_path, 1) as records:
        assert (records.seconds, records.reading_s, records.waited_s) == (2.0, 0.0, 0.0)


def test_advice_on_missing_lines_makes_them_again(tmp_path):
    run = validating(checkpoint_every=5, keep_checkpoints=9)
    train(new_engine(0), Loader(), run, tmp_path, {})
    path, whole = tmp_path / "metrics.jsonl", metrics(tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:13]))  # as another run may leave it
    with pytest.raises(UserError, match="ends after line 13 with step 12") as caught:
        train(new_engine(0), Loader(), run, tmp_path, {})
    said = str(caught.value)
    removed = [name for name in os.listdir(tmp_path / "checkpoints") if f"{tmp_path}/checkpoints/{name}" in said]
    assert sorted(removed) == ["step-00000015", "step-00000020"]
    for name in removed:
        shutil.rmtree(tmp_path / "checkpoints" / name)
    train(new_engine(0), Loader(), run, tmp_path, {})
    computed = ("step", "ce", "validation", "corpora", "learning_rate")
    mine, theirs = ([[line.get(key) for key in computed] for line in lines] for lines in (metrics(tmp_path), whole))
    assert mine == theirs


# --------------------------------------------------------------------------------------------------------- divergence


def test_a_run_that_diverges_is_said_once_and_is_a_fact(tmp_path, capsys):
    run = validating(evaluate_every=4)
    run = dataclasses.replace(run, train=run.train.model_copy(update={"learning_rate": 3.0}))
    train(new_engine(0), Loader(), run, tmp_path, {})
    assert capsys.readouterr().out.count("WARNING: train m has diverged: validation perplexity on a ") == 1
    facts = run_facts(read_metrics(tmp_path / "metrics.jsonl", 20, str))
    found = validated(tmp_path)
    assert facts["diverged"] == {"a": {"first": found[0][1], "now": found[-1][1]}}


@pytest.mark.parametrize(
    ("first", "now", "wanted"),
    [(100.0, 199.0, False), (100.0, 201.0, True), (100.0, None, True), (None, None, False), (None, 5.0, False)],
)
def test_far_above_is_twice_the_first_or_not_finite(first, now, wanted):
    assert bool(diverged({"a": first, "b": 1.0}, {"a": now})) == wanted


def test_training_that_goes_well_is_not_warned_of(tmp_path, capsys):
    train(new_engine(0), Loader(), validating(), tmp_path, {})
    assert "WARNING" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- pinned memory


@pytest.fixture
def pinned(monkeypatch):
    """As on a machine with a GPU: the shapes of what is pinned."""
    shapes, empty = [], torch.empty

    def watch(*shape, pin_memory=False, **given):
        if pin_memory:
            shapes.append(tuple(shape[0]))
        return empty(*shape, **given)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", watch)
    return shapes


def tensors(micro):
    of = micro.targets
    found = [micro.input_ids_BS, micro.rows_N, micro.labels_N, micro.alpha_N, micro.corpus_N]
    found += [of.ids_NK, of.values_NK, of.count_N]
    return found + [x for x in (of.high_NK, of.tail_N) if x is not None]


def test_batches_are_pinned_where_there_is_a_gpu(tmp_path, pinned, monkeypatch):
    """Every tensor of them, with the same numbers as without."""
    corpora = make_world(tmp_path, vocabulary=90_000)
    (micro,) = loader(corpora, layout(8, 8), tail=TAIL).load(0, 0.5)
    assert sorted(pinned) == sorted(tuple(x.shape) for x in tensors(micro))
    assert len(pinned) == 10 and micro.targets.ids_NK.shape[1] == K
    monkeypatch.undo()
    (plain,) = loader(corpora, layout(8, 8), tail=TAIL).load(0, 0.5)
    for mine, theirs in zip(tensors(micro), tensors(plain), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_nothing_is_pinned_nor_copied_without_a_gpu(pinned, monkeypatch):
    import numpy as np

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    array = np.arange(6).reshape(2, 3)
    assert host_tensor(array).data_ptr() == array.ctypes.data
    assert pinned == []
