"""What a rank is given at a step: the same sequences at any world size, each row with the targets of its own token."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ki_ds.batches import Lane, Loader, Plan
from ki_ds.corpus.hashing import counter_hash, derive_key
from ki_ds.corpus.masking import Viewer
from ki_ds.corpus.stream import CorpusStream, Mix
from ki_ds.errors import UserError
from ki_ds.targets import codec
from ki_ds.targets.shard import Frame, ShardFolder, shard_name, write_shard

LENGTH, K, PER_SHARD, SPECIAL, MASK = 24, 6, 5, [0, 1, 2, 3, 4], 4
SIZES = (11, 7)  # sequences of the corpora


@dataclass(frozen=True)
class World:
    """Two corpora with targets on disk, and what the tests need to know of them."""

    lanes: list[Lane]
    views: int
    vocabulary: int
    folder: Path


def stored_ids(corpus, sequence, view, index, vocabulary):
    """[K] distinct ids that name a target position: no two positions share them, but by accident."""
    key = derive_key("ids", corpus, sequence, view, index)
    first = int(counter_hash(key, np.arange(1))[0] % np.uint64(vocabulary))
    return (first + np.arange(K) * 7) % vocabulary


def stored_steps(sequence, view, index):
    return np.minimum(np.arange(K) * (1 + (sequence + view + index) % 9), 255)


def write_targets(folder, lane, vocabulary, positions):
    """Shards of the first positions of a lane's stream, as a teacher would leave them."""
    folder.mkdir(parents=True)
    for start in range(0, positions, PER_SHARD):
        end = min(start + PER_SHARD, positions)
        sequences, views = lane.stream.pairs(np.arange(start, end))
        view = lane.viewer(lane.tokens[sequences], sequences, views)
        frames = []
        for row, digest in enumerate(lane.viewer.digests(view)):
            asked = np.flatnonzero(view.targets_BS[row])
            pair = int(sequences[row]), int(views[row])
            ids = np.array([stored_ids(lane.name, *pair, int(i), vocabulary) for i in asked]).reshape(-1, K)
            steps = np.array([stored_steps(*pair, int(i)) for i in asked]).reshape(-1, K)
            planes = codec.pack(ids, -0.5 - codec.QUANTUM * steps, np.zeros(len(asked)), vocabulary)
            frames.append(Frame(int(digest), planes))
        header = {"start": start, "end": end, "k": K, "vocabulary": vocabulary, "sequence_length": LENGTH}
        write_shard(folder / shard_name(start, end), header, frames)
    return ShardFolder(folder, positions, PER_SHARD, keep_open=2)


def make_world(folder, objective="mlm", vocabulary=300, views=3, taught=(True, True), seed=1):
    lanes = []
    for number, size in enumerate(SIZES):
        name = f"corpus{number}"
        tokens = np.random.default_rng(number).integers(5, vocabulary, (size, LENGTH))
        tokens = tokens.astype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        viewer = Viewer(objective, seed, name, vocabulary, SPECIAL, MASK if objective == "mlm" else None, 0.25)
        lane = Lane(name, tokens, CorpusStream(size, views, seed, f"digest{number}"), viewer, None)
        if taught[number]:
            lane = replace(lane, targets=write_targets(folder / name, lane, vocabulary, size * views))
        lanes.append(lane)
    return World(lanes, views, vocabulary, folder)


@pytest.fixture(scope="module", params=["mlm", "clm", "mlm, three-byte ids"])
def world(request, tmp_path_factory):
    objective, _, wide = request.param.partition(",")
    views = 1 if objective == "clm" else 3
    return make_world(tmp_path_factory.mktemp("targets"), objective, 90_000 if wide else 300, views)


def plan(batch=8, micro=2, rank=0, world_size=1):
    return Plan(batch, micro, rank, world_size)


def loader(world, cut=None, weights=(2.0, 1.0), k=K, lanes=None):
    lanes = world.lanes if lanes is None else lanes
    return Loader(lanes, Mix(list(weights[: len(lanes)])), plan() if cut is None else cut, k, world.vocabulary)


def rows_of(batches):
    """Every target row as one comparable tuple: (input sequence, index, label, α, count, ids, steps)."""
    rows = []
    for batch in batches:
        sequences = [tuple(row) for row in batch.input_ids_BS.tolist()]
        targets = batch.targets
        for n, (row, label) in enumerate(zip(batch.rows_N.tolist(), batch.labels_N.tolist(), strict=True)):
            taught = ()
            if targets is not None:
                count = int(targets.count_N[n])
                ids, steps = targets.ids()[n].tolist()[:count], targets.steps_NK[n].tolist()[:count]
                taught = (float(batch.alpha_N[n]), count, tuple(ids), tuple(steps))
            rows.append((sequences[row // LENGTH], row % LENGTH, label, *taught))
    return rows


def expected_rows(world, step, batch_size, alpha, k=K, weights=(2.0, 1.0)):
    """The same from the definitions, position by position."""
    choice, places = Mix(list(weights))(np.arange(step * batch_size, (step + 1) * batch_size))
    rows = []
    for number, place in zip(choice.tolist(), places.tolist(), strict=True):
        lane = world.lanes[number]
        (sequence,), (view,) = (x.tolist() for x in lane.stream.pairs(np.array([place])))
        seen = lane.viewer(lane.tokens[[sequence]], np.array([sequence]), np.array([view]))
        for index in np.flatnonzero(seen.targets_BS[0]).tolist():
            ids = stored_ids(lane.name, sequence, view, index, world.vocabulary)[:k]
            steps = stored_steps(sequence, view, index)[:k]
            taught = (np.float32(alpha).item(), k, tuple(ids.tolist()), tuple(steps.tolist()))
            rows.append((tuple(seen.inputs_BS[0].tolist()), index, int(seen.labels_BS[0, index]), *taught))
    return rows


@pytest.mark.parametrize("step", [0, 1, 3, 5, 40])  # from step 5 on pairs are read a second time, by random access
def test_rows_line_up_with_their_stored_targets(world, step):
    assert rows_of(loader(world).load(step, 0.5)) == expected_rows(world, step, 8, 0.5)


@pytest.mark.parametrize("step", [0, 2, 9])
def test_batch_is_the_same_at_any_world_size_and_micro_batch_size(world, step):
    whole = rows_of(loader(world, plan(8, 8)).load(step, 0.5))
    assert len(whole) > 8
    for world_size in (1, 2, 4):
        for micro in (1, 2, 4, 8):
            if 8 // world_size % micro:
                continue
            rows = []
            for rank in range(world_size):
                cut = plan(8, micro, rank, world_size)
                batches = loader(world, cut).load(step, 0.5)
                assert [len(b.input_ids_BS) for b in batches] == [micro] * cut.accumulation
                rows += rows_of(batches)
            assert rows == whole, (world_size, micro)


def test_consecutive_steps_tile_the_stream(world):
    """Two steps of 4 read what one step of 8 reads."""
    small = loader(world, plan(4, 4))
    assert rows_of(small.load(6, 0.5) + small.load(7, 0.5)) == rows_of(loader(world, plan(8, 8)).load(3, 0.5))


def test_every_target_of_the_first_epochs_is_read_once(world):
    """The union over the epochs that the targets cover is exactly what was stored."""
    lane = world.lanes[0]
    positions = SIZES[0] * world.views
    one = loader(world, plan(1, 1), weights=(1.0,), lanes=[lane])
    rows = [row for step in range(positions) for row in rows_of(one.load(step, 0.5))]
    stored = sum(len(lane.targets.frame(position).planes) for position in range(positions))
    assert len(rows) == stored
    if world.views > 1:  # each epoch shows another masking
        assert len({(row[0], row[1]) for row in rows}) == stored


def test_later_epochs_read_the_frames_of_their_pair(world):
    lane = world.lanes[0]
    one = loader(world, plan(1, 1), weights=(1.0,), lanes=[lane])
    cycle = SIZES[0] * world.views
    first = sorted(row for step in range(cycle) for row in rows_of(one.load(step, 0.5)))
    again = [row for step in range(5 * cycle, 6 * cycle) for row in rows_of(one.load(step, 0.5))]
    assert sorted(again) == first
    assert again != [row for step in range(cycle) for row in rows_of(one.load(step, 0.5))]  # in another order


def test_corpus_without_teacher_beside_one_with(tmp_path):
    world = make_world(tmp_path, taught=(True, False))
    both = expected_rows(make_world(tmp_path / "all"), 1, 8, 0.5)
    batches = loader(world, plan(8, 8)).load(1, 0.5)
    found = rows_of(batches)
    assert [row[:3] for row in found] == [row[:3] for row in both]
    choice, _ = Mix([2.0, 1.0])(np.arange(8, 16))
    owners = choice[batches[0].rows_N.numpy() // LENGTH]
    assert {0, 1} == set(owners.tolist())
    for row, other, owner in zip(found, both, owners, strict=True):
        assert row[4:] == (other[4:] if owner == 0 else (0, (), ()))
    assert batches[0].taught == int((owners == 0).sum())


def test_micro_batch_of_the_untaught_corpus_alone(tmp_path):
    world = make_world(tmp_path, taught=(False, True))
    lanes = [world.lanes[0]]
    (batch,) = loader(world, plan(2, 2), weights=(1.0,), lanes=lanes).load(0, 0.5)
    assert batch.targets is None and batch.alpha_N is None
    assert batch.taught == 0
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
    (batch,) = loader(world, plan(8, 8), k=2).load(0, 0.5)
    assert set(batch.targets.count_N.tolist()) == {0, 2}


# ------------------------------------------------------------------------------------------------ misalignment


def misaligned(world, lane, steps=(0, 4, 11)):
    """Every step of a changed lane is refused, with the folder in the message."""
    for step in steps:
        with pytest.raises(UserError, match="the teacher saw another input") as error:
            loader(world, weights=(1.0,), lanes=[lane]).load(step, 0.5)
        assert str(world.folder) in str(error.value)
        assert lane.name in str(error.value)


@pytest.fixture(scope="module", params=["mlm", "clm"])
def aligned(request, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("aligned"), request.param, views=1 if request.param == "clm" else 3)


def test_wrong_mask_seed(tmp_path):
    world = make_world(tmp_path)
    misaligned(
        world, replace(world.lanes[0], viewer=Viewer("mlm", 2, "corpus0", world.vocabulary, SPECIAL, MASK, 0.25))
    )


def test_wrong_mask_probability(tmp_path):
    world = make_world(tmp_path)
    misaligned(world, replace(world.lanes[0], viewer=Viewer("mlm", 1, "corpus0", world.vocabulary, SPECIAL, MASK, 0.5)))


def test_wrong_order_seed(aligned):
    lane = aligned.lanes[0]
    misaligned(aligned, replace(lane, stream=replace(lane.stream, seed=2)), steps=(0,))


def test_swapped_corpus(aligned):
    one, two = aligned.lanes
    misaligned(aligned, replace(two, targets=one.targets), steps=(0,))
    misaligned(aligned, replace(one, tokens=np.random.default_rng(9).permuted(one.tokens, axis=1)))


def test_one_changed_token(aligned):
    """One token of the sequence, which is an input but is not asked for."""
    lane = aligned.lanes[0]
    (sequence,), views = lane.stream.pairs(np.array([0]))
    asked = lane.viewer(lane.tokens[[sequence]], np.array([sequence]), views).targets_BS[0]
    tokens = lane.tokens.copy()
    tokens[sequence, np.flatnonzero(~asked)[-1]] ^= 64
    misaligned(aligned, replace(lane, tokens=tokens), steps=(0,))


def test_targets_shifted_by_one(tmp_path):
    world = make_world(tmp_path)
    lane = world.lanes[0]

    class Shifted(ShardFolder):
        def frame(self, position):
            return super().frame((position + 1) % self.positions)

    misaligned(world, replace(lane, targets=Shifted(tmp_path / "corpus0", SIZES[0] * 3, PER_SHARD)))


def test_other_sequence_length(aligned):
    lane = aligned.lanes[0]
    misaligned(aligned, replace(lane, tokens=lane.tokens[:, :-1]))


def test_other_number_of_views(tmp_path):
    """The first epochs agree; the first view that the teacher has not seen is refused."""
    world = make_world(tmp_path)
    lane = replace(world.lanes[0], stream=replace(world.lanes[0].stream, views=2))
    fine = loader(world, plan(1, 1), weights=(1.0,), lanes=[lane])
    fine.load(0, 0.5)
    fine.load(2 * SIZES[0] - 1, 0.5)
    fine.load(2 * SIZES[0], 0.5)  # view 0 again, found by random access: still the right frame
    more = replace(world.lanes[0], stream=replace(world.lanes[0].stream, views=4))
    with pytest.raises(UserError):
        loader(world, plan(1, 1), weights=(1.0,), lanes=[more]).load(3 * SIZES[0], 0.5)


# ------------------------------------------------------------------------------------------------ looking ahead


@pytest.fixture
def ready(world):
    made = loader(world)
    yield made
    made.close()


def test_look_ahead_gives_what_load_gives(world, ready):
    plain = loader(world)
    alphas = [0.5, 0.4, 0.2, 0.0, 0.0]
    for step, alpha in enumerate(alphas[:-1]):
        assert rows_of(ready(step, alpha, alphas[step + 1])) == rows_of(plain.load(step, alpha))


def test_same_step_twice_and_steps_out_of_order(world, ready):
    plain = loader(world)
    for step in (3, 3, 4, 2, 2, 9, 0):
        assert rows_of(ready(step, 0.5, 0.5)) == rows_of(plain.load(step, 0.5))


def test_alpha_that_was_guessed_wrong_ahead(world, ready):
    """An adaptive α is known only when its step comes: what was loaded for another α must not be used."""
    ready(0, 0.5, 0.4)
    assert rows_of(ready(1, 0.3, 0.3)) == rows_of(loader(world).load(1, 0.3))
    (first, *_) = ready(2, 0.0, 0.0)
    assert first.targets is None
    assert rows_of(ready(3, 0.25, 0.0)) == rows_of(loader(world).load(3, 0.25))


def test_failure_ahead_shows_at_its_own_step(tmp_path):
    """The step before it is unharmed, and asking again fails again."""
    world = make_world(tmp_path, taught=(True, False))
    lane = world.lanes[0]
    made = loader(world, plan(5, 5), weights=(1.0,), lanes=[lane])
    (tmp_path / "corpus0" / shard_name(5, 10)).unlink()
    try:
        assert len(made(0, 0.5, 0.5)) == 1
        for _ in range(2):
            with pytest.raises(UserError, match=shard_name(5, 10)):
                made(1, 0.5, 0.5)
        assert len(made(2, 0.5, 0.5)) == 1
    finally:
        made.close()


def test_looking_past_the_last_target_harms_nobody(tmp_path):
    """At the last taught step the next one, which the teacher never saw, is loaded ahead and thrown away."""
    world = make_world(tmp_path, taught=(True, False))
    lane = replace(world.lanes[0], targets=ShardFolder(tmp_path / "corpus0", 5, PER_SHARD))
    made = loader(world, plan(5, 5), weights=(1.0,), lanes=[lane])
    assert made(0, 0.5, 0.5)[0].taught > 0
    made.close()


def test_batches_do_not_write_to_the_corpus(world):
    before = [lane.tokens.copy() for lane in world.lanes]
    loader(world).load(0, 0.5)
    for lane, tokens in zip(world.lanes, before, strict=True):
        np.testing.assert_array_equal(lane.tokens, tokens)


def test_device_arguments_are_the_student_s_forward_arguments(world):
    (batch, *_) = loader(world).load(0, 0.5)
    ids, rows, labels, targets, alpha = batch.to(torch.device("cpu"))
    assert torch.equal(ids, batch.input_ids_BS) and torch.equal(rows, batch.rows_N)
    assert torch.equal(labels, batch.labels_N) and torch.equal(alpha, batch.alpha_N)
    assert torch.equal(targets.ids(), batch.targets.ids()) and len(targets) == len(rows)
    assert {ids.dtype, rows.dtype, labels.dtype} == {torch.int64}
