"""The loader: called with the step alone, it reads one step ahead."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.taught_corpora import PER_SHARD, layout, loader, make_world, rows_of

from ki_ds.errors import UserError
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.shard import shard_name


@pytest.fixture
def ready(world):
    made = loader(world)
    yield made
    made.close()


def test_look_ahead_gives_what_load_gives(world, ready):
    plain = loader(world)
    alphas = [0.5, 0.4, 0.2, 0.0, 0.0]
    ready.alpha = alphas.__getitem__
    for step, alpha in enumerate(alphas[:-1]):
        batch = ready(step)
        assert (batch.step, batch.alpha) == (step, alpha)
        assert rows_of(batch.micro_batches) == rows_of(plain.load(step, alpha))


def test_called_with_the_step_alone_each_step_is_loaded_once(ready, monkeypatch):
    """The next one in the loader's own thread, with the α that the schedule says."""
    asked, load = [], ready.load

    def watch(step, alpha):
        asked.append((step, alpha, threading.current_thread().name.startswith("loader")))
        return load(step, alpha)

    monkeypatch.setattr(ready, "load", watch)
    ready.alpha = {step: 1 - step / 8 for step in range(5)}.__getitem__
    for step in range(4):
        ready(step)
    ready.close()
    assert [step for step, *_ in asked[:4]] == [0, 1, 2, 3]
    assert asked[:2] == [(0, 1.0, True), (1, 0.875, True)]
    assert len(asked) == len({step for step, *_ in asked})


def test_same_step_twice_and_steps_out_of_order(world, ready):
    plain = loader(world)
    for step in (3, 3, 4, 2, 2, 9, 0):
        assert rows_of(ready(step).micro_batches) == rows_of(plain.load(step, 0.5))


def test_alpha_that_was_guessed_wrong_ahead(world, ready):
    """An adaptive α is known only when its step comes: what was loaded for another α must not be used."""

    def with_alphas(step, now, ahead):
        ready.alpha = {step: now, step + 1: ahead}.__getitem__
        return ready(step).micro_batches

    with_alphas(0, 0.5, 0.4)
    assert rows_of(with_alphas(1, 0.3, 0.3)) == rows_of(loader(world).load(1, 0.3))
    (first, *_) = with_alphas(2, 0.0, 0.0)
    assert first.targets is None
    assert rows_of(with_alphas(3, 0.25, 0.0)) == rows_of(loader(world).load(3, 0.25))


def test_failure_ahead_shows_at_its_own_step(tmp_path):
    """The step before it is unharmed, and asking again fails again."""
    world = make_world(tmp_path, taught=(True, False))
    reader = world.readers[0]
    made = loader(world, layout(5, 5), weights=(1.0,), readers=[reader])
    (tmp_path / "corpus0" / shard_name(5, 10)).unlink()
    try:
        assert len(made(0).micro_batches) == 1
        for _ in range(2):
            with pytest.raises(UserError, match=shard_name(5, 10)):
                made(1)
        assert len(made(2).micro_batches) == 1
    finally:
        made.close()


def test_looking_past_the_last_target_harms_nobody(tmp_path):
    """At the last taught step the next one, which the teacher never saw, is loaded ahead and thrown away."""
    world = make_world(tmp_path, taught=(True, False))
    reader = replace(
        world.readers[0], targets=ShardFolder(tmp_path / "corpus0", 5, PER_SHARD, world.readers[0].targets.header)
    )
    made = loader(world, layout(5, 5), weights=(1.0,), readers=[reader])
    assert made(0).counts(1)[1].any()
    made.close()


def test_time_of_reading_and_waiting_is_counted(tmp_path):
    """Reading only where targets are read; waiting at every step."""
    made = loader(make_world(tmp_path))
    try:
        assert (made.reading_s, made.waited_s) == (0, 0)
        made.load(0, 0.5)
        once = made.reading_s
        assert once > 0
        made.load(5, 0.0)
        assert made.reading_s == once and made.waited_s == 0
        made.load(1, 0.5)
        assert made.reading_s > once
        waited = []
        for step in range(3):
            made(step)
            waited.append(made.waited_s)
        assert 0 < waited[0] < waited[1] < waited[2]
    finally:
        made.close()


def test_batches_do_not_write_to_the_corpus(world):
    before = [reader.tokens.copy() for reader in world.readers]
    loader(world).load(0, 0.5)
    for reader, tokens in zip(world.readers, before, strict=True):
        np.testing.assert_array_equal(reader.tokens, tokens)


def test_device_arguments_are_the_student_s_forward_arguments(world):
    (batch, *_) = loader(world).load(0, 0.5)
    ids, rows, labels, targets, alpha = batch.to(torch.device("cpu"))
    assert torch.equal(ids, batch.input_ids_BS) and torch.equal(rows, batch.rows_N)
    assert torch.equal(labels, batch.labels_N) and torch.equal(alpha, batch.alpha_N)
    assert torch.equal(targets.ids(), batch.targets.ids()) and len(targets) == len(rows)
    assert {ids.dtype, rows.dtype, labels.dtype} == {torch.int64}
