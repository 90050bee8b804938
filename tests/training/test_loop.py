"""The training loop: a step's result and its record, what is due when, and what a resumed run goes on from."""

import dataclasses

import pytest
import torch
from helpers.commands import metrics
from helpers.engines import LENGTH, Loader, new_engine, tiny_run, world  # noqa: F401
from helpers.taught_corpora import TAIL, K, layout, loader, make_world

from ki_ds.launch import heartbeat
from ki_ds.training.batches import Batch, MicroBatch, host_tensor
from ki_ds.training.divergence import MOST_SKIPPED, SkippedSteps
from ki_ds.training.loop import Sums, train, update
from ki_ds.training.records import Records, StepResult
from ki_ds.training.run import Every

RESULT = StepResult(
    step=4, alpha=0.25, loss=2.5, ce=3.0, kl=1.5, learning_rate=1e-2, gradient_norm=0.7, applied=True,
    loss_scale=None, skipped=0, asked_to_stop=False,
)  # fmt: skip
KEYS = [
    "loss", "ce", "kl", "learning_rate", "gradient_norm", "applied", "loss_scale", "skipped", "step", "tokens",
    "seconds", "alpha", "tokens_per_second", "reading_seconds", "waited_seconds",
]  # fmt: skip


class Slow(Loader):
    """Says that each step took so long."""

    def __call__(self, number):
        self.reading_s += 0.5
        self.waited_s += 0.25
        return super().__call__(number)


class Interrupted(Exception):
    pass


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
    assert record["tokens_per_second"] == pytest.approx(4 * LENGTH / record["seconds"])
    assert metrics(tmp_path) == [record]


def test_means_are_over_all_rows_and_over_those_that_inherit():
    assert Sums(loss=6.0, ce=8.0, kl=3.0, rows=4.0, taught=2.0, asked_to_stop=0.0).means == (1.5, 2.0, 1.5)
    assert Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0).means == (0.0, 0.0, None)


def test_a_step_without_any_row_is_one_of_loss_zero():
    one, empty = new_engine(1), torch.zeros(0, dtype=torch.int64)
    micros = [MicroBatch(torch.zeros(2, LENGTH, dtype=torch.int64), empty, empty, None, None)] * 2
    result = update(one, Batch(0, 0.0, micros), tiny_run())
    assert (result.loss, result.ce, result.kl, result.gradient_norm) == (0.0, 0.0, None, 0.0)
    assert result.applied


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
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "seconds": 2.0}\n')
    with Records(tiny_run(), Slow(), tmp_path, 3) as records:
        assert (records.seconds, records.reading_s, records.waited_s) == (2.0, 0.0, 0.0)


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
    found = [micro.input_ids_BS, micro.rows_N, micro.labels_N, micro.alpha_N, of.ids_NK, of.values_NK, of.count_N]
    return found + [x for x in (of.high_NK, of.tail_N) if x is not None]


def test_batches_are_pinned_where_there_is_a_gpu(tmp_path, pinned, monkeypatch):
    """Every tensor of them, with the same numbers as without."""
    corpora = make_world(tmp_path, vocabulary=90_000)
    (micro,) = loader(corpora, layout(8, 8), tail=TAIL).load(0, 0.5)
    assert sorted(pinned) == sorted(tuple(x.shape) for x in tensors(micro))
    assert len(pinned) == 9 and micro.targets.ids_NK.shape[1] == K
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
