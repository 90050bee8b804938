"""What a rank is given at a step: the same sequences at any world size, each row with the targets of its own token."""

import shutil

import numpy as np
import pytest
import torch
from helpers.taught_corpora import (
    LENGTH,
    QUANTUM,
    SIZES,
    TAIL,
    K,
    expected_rows,
    layout,
    loader,
    make_world,
    rows_of,
    stored_row,
)

from ki_ds.corpus.stream import Mix
from ki_ds.errors import UserError
from ki_ds.targets.quanta import NAT


@pytest.mark.parametrize("step", [0, 1, 3, 5, 40])  # from step 5 on pairs are read a second time, by random access
def test_rows_line_up_with_their_stored_targets(world, step):
    assert rows_of(loader(world).load(step, 0.5)) == expected_rows(world, step, 8, 0.5)


@pytest.mark.parametrize("step", [0, 2, 9])
def test_batch_is_the_same_at_any_world_size_and_micro_batch_size(world, step):
    whole = rows_of(loader(world, layout(8, 8)).load(step, 0.5))
    assert len(whole) > 8
    for world_size in (1, 2, 4):
        for micro in (1, 2, 4, 8):
            if 8 // world_size % micro:
                continue
            rows = []
            for rank in range(world_size):
                cut = layout(8, micro, rank, world_size)
                batches = loader(world, cut).load(step, 0.5)
                assert [len(b.input_ids_BS) for b in batches] == [micro] * cut.accumulation
                rows += rows_of(batches)
            assert rows == whole, (world_size, micro)


def test_consecutive_steps_tile_the_stream(world):
    """Two steps of 4 read what one step of 8 reads."""
    small = loader(world, layout(4, 4))
    assert rows_of(small.load(6, 0.5) + small.load(7, 0.5)) == rows_of(loader(world, layout(8, 8)).load(3, 0.5))


def test_every_target_of_the_first_epochs_is_read_once(world):
    """The union over the epochs that the targets cover is exactly what was stored."""
    reader = world.readers[0]
    samples = SIZES[0] * world.views
    one = loader(world, layout(1, 1), weights=(1.0,), readers=[reader])
    rows = [row for step in range(samples) for row in rows_of(one.load(step, 0.5))]
    stored = sum(reader.targets.read(np.arange(samples)).rows)
    assert len(rows) == stored
    if world.views > 1:  # each epoch shows another masking
        assert len({(row[0], row[1]) for row in rows}) == stored


def test_later_epochs_read_the_frames_of_their_pair(world):
    reader = world.readers[0]
    one = loader(world, layout(1, 1), weights=(1.0,), readers=[reader])
    cycle = SIZES[0] * world.views
    first = sorted(row for step in range(cycle) for row in rows_of(one.load(step, 0.5)))
    again = [row for step in range(5 * cycle, 6 * cycle) for row in rows_of(one.load(step, 0.5))]
    assert sorted(again) == first
    assert again != [row for step in range(cycle) for row in rows_of(one.load(step, 0.5))]  # in another order


def test_corpus_without_teacher_beside_one_with(tmp_path):
    world = make_world(tmp_path, taught=(True, False))
    both = expected_rows(make_world(tmp_path / "all"), 1, 8, 0.5)
    batches = loader(world, layout(8, 8)).load(1, 0.5)
    found = rows_of(batches)
    assert [row[:3] for row in found] == [row[:3] for row in both]
    choice, _ = Mix([2.0, 1.0])(np.arange(8, 16))
    owners = choice[batches[0].rows_N.numpy() // LENGTH]
    assert {0, 1} == set(owners.tolist())
    for row, other, owner in zip(found, both, owners, strict=True):
        assert row[4:] == (other[4:] if owner == 0 else (0, (), ()))
    assert batches[0].taught_N.sum() == int((owners == 0).sum())


def test_micro_batch_of_the_untaught_corpus_alone(tmp_path):
    world = make_world(tmp_path, taught=(False, True))
    readers = [world.readers[0]]
    (batch,) = loader(world, layout(2, 2), weights=(1.0,), readers=readers).load(0, 0.5)
    assert batch.targets is None and batch.alpha_N is None
    assert not batch.taught_N.any()
    assert len(batch.labels_N) > 0


def test_alpha_zero_reads_no_shard(tmp_path):
    world = make_world(tmp_path)
    shutil.rmtree(tmp_path / "corpus0")
    shutil.rmtree(tmp_path / "corpus1")
    batches = loader(world).load(3, 0.0)
    assert all(batch.targets is None and batch.alpha_N is None for batch in batches)
    assert [row[:3] for row in rows_of(batches)] == [row[:3] for row in expected_rows(world, 3, 8, 0.0)]
    with pytest.raises(UserError, match="is missing"):
        loader(world).load(3, 0.1)


@pytest.mark.parametrize("k", [1, 3, K])
def test_smaller_k_reads_the_prefix(world, k):
    assert rows_of(loader(world, k=k).load(2, 0.5)) == expected_rows(world, 2, 8, 0.5, k=k)


def test_smaller_k_beside_a_corpus_without_teacher(tmp_path):
    world = make_world(tmp_path, taught=(True, False))
    (batch,) = loader(world, layout(8, 8), k=2).load(0, 0.5)
    assert set(batch.targets.count_N.tolist()) == {0, 2}


# --------------------------------------------------------------------------------- rows of all kinds and lengths


@pytest.fixture(scope="module", params=["top_p", "counts", "counts, three-byte ids"])
def ragged(request, tmp_path_factory):
    kind, _, wide = request.param.partition(",")
    return make_world(tmp_path_factory.mktemp("ragged"), vocabulary=90_000 if wide else 300, kind=kind)


@pytest.mark.parametrize("step", [0, 3, 40])
def test_ragged_rows_and_counts_line_up(ragged, step):
    batches = loader(ragged).load(step, 0.5)
    assert rows_of(batches) == expected_rows(ragged, step, 8, 0.5)
    assert {batch.targets.quantum for batch in batches} == {0 if ragged.kind == "counts" else QUANTUM}
    assert len({count for batch in batches for count in batch.targets.count_N.tolist()}) > 2


def test_what_lies_behind_a_ragged_row_is_empty(ragged):
    for batch in loader(ragged).load(1, 0.5):
        assert not batch.targets.values_NK[~batch.targets.kept()].any()
        assert not batch.targets.ids_NK[~batch.targets.kept()].any()


def test_targets_are_no_wider_than_their_longest_row(tmp_path):
    """Two corpora in each micro-batch: the width is that of all its rows."""
    world = make_world(tmp_path, kind="top_p")
    widths = []
    for step in range(12):
        for batch in loader(world, layout(4, 2)).load(step, 0.5):
            (width,) = {plane.shape[1] for plane in (batch.targets.ids_NK, batch.targets.values_NK)}
            assert width == batch.targets.count_N.max()
            widths.append(width)
    assert len(set(widths)) > 1


def test_counts_are_never_shortened(tmp_path):
    """A student that asks for fewer entries must not lose draws."""
    world = make_world(tmp_path, kind="counts")
    assert rows_of(loader(world, k=2).load(0, 0.5)) == expected_rows(world, 0, 8, 0.5)


def test_smaller_k_of_ragged_rows(tmp_path):
    world = make_world(tmp_path, kind="top_p")
    assert rows_of(loader(world, k=3).load(0, 0.5)) == expected_rows(world, 0, 8, 0.5, k=3)


@pytest.mark.parametrize("ks", [(K, 4), (4, K)])
@pytest.mark.parametrize("k", [K, 4, 2])
def test_corpora_stored_with_different_k(tmp_path, ks, k):
    """Each keeps what it has of the k asked for, whichever comes first."""
    world = make_world(tmp_path, ks=ks)
    for step in range(3):
        assert rows_of(loader(world, k=k).load(step, 0.5)) == expected_rows(world, step, 8, 0.5, k=k, ks=ks)


def expected_tails(world, step, batch_size, k=K, weights=(2.0, 1.0)):
    """Of each row: the stored tail and what is cut off; None without a teacher."""
    choice, samples = Mix(list(weights))(np.arange(step * batch_size, (step + 1) * batch_size))
    tails = []
    for number, sample in zip(choice.tolist(), samples.tolist(), strict=True):
        reader = world.readers[number]
        (sequence,), (view,) = (x.tolist() for x in reader.stream.pairs(np.array([sample])))
        seen = reader.viewer(reader.tokens[[sequence]], np.array([sequence]), np.array([view]))
        for index in np.flatnonzero(seen.loss_mask_BS[0]).tolist():
            _, values, tail = stored_row(world.kind, reader.name, sequence, view, index, world.vocabulary)
            whole = np.exp(tail) + np.exp(-QUANTUM * values[k:] / 2).sum()
            tails.append(None if reader.targets is None else np.log(whole))
    return tails


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
@pytest.mark.parametrize("k", [K, 2])
@pytest.mark.parametrize("taught", [(True, True), (True, False), (False, True)])
def test_tail_stands_at_its_own_row_and_takes_in_what_is_cut(tmp_path, kind, k, taught):
    world = make_world(tmp_path, taught=taught, kind=kind)
    for step in range(3):
        batches = loader(world, layout(8, 4), k=k, tail=TAIL).load(step, 0.5)
        found = [row for batch in batches for row in batch.targets.tail_N.tolist()]
        counts = [row for batch in batches for row in batch.targets.count_N.tolist()]
        expected = expected_tails(world, step, 8, k)
        assert [count > 0 for count in counts] == [tail is not None for tail in expected]
        assert len({round(tail, 3) for tail in expected if tail is not None}) > 8
        for one, other in zip(found, expected, strict=True):
            assert other is None or one == pytest.approx(other, abs=0.51 / NAT)


def test_tail_is_that_of_the_asked_temperature_and_none_without_one(tmp_path):
    world = make_world(tmp_path)
    (warm,), (cold,) = (loader(world, layout(8, 8), tail=name).load(0, 0.5) for name in (TAIL, 1.0))
    torch.testing.assert_close(warm.targets.tail_N - 1, cold.targets.tail_N)
    (without,) = loader(world, layout(8, 8)).load(0, 0.5)
    assert without.targets.tail_N is None


def test_rows_without_a_teacher_weigh_nothing_in_the_loss(tmp_path):
    """With a tail: neither an entry nor the tail of such a row has any probability."""
    world = make_world(tmp_path, taught=(True, False))
    (batch,) = loader(world, layout(8, 8), tail=TAIL).load(0, 0.5)
    entries, tail = batch.targets.log_probabilities(2.0)
    empty = batch.targets.count_N == 0
    assert empty.any() and not empty.all()
    assert torch.isneginf(entries[empty]).all() and torch.isneginf(tail[empty]).all()
    whole = torch.logaddexp(entries[~empty].logsumexp(dim=1), tail[~empty])
    torch.testing.assert_close(whole, torch.zeros_like(whole), rtol=0, atol=1e-5)
