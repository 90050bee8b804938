"""What a rank is given at a step: the same sequences at any world size, each row with the targets of its own token."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ki_ds.corpus.hashing import counter_hash, derive_key
from ki_ds.corpus.masking import Viewer
from ki_ds.corpus.stream import CorpusStream, Mix
from ki_ds.errors import UserError
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.quanta import NAT
from ki_ds.targets.shard import pack_block, shard_name, write_shard
from ki_ds.training.batches import BatchLayout, Lane, Loader, Reading

LENGTH, K, PER_SHARD, SPECIAL, MASK = 24, 6, 5, [0, 1, 2, 3, 4], 4
SIZES = (11, 7)  # sequences of the corpora
QUANTUM, TAIL = 1 / 16, 2.0
SCALARS = ("first", "truth", 1.0, TAIL)


@dataclass(frozen=True)
class World:
    """Two corpora with targets on disk, and what the tests need to know of them."""

    lanes: list[Lane]
    views: int
    vocabulary: int
    folder: Path
    kind: str = "top_k"


def stored_ids(corpus, sequence, view, index, vocabulary, k=K):
    """[k] distinct ids, most probable first, that name a row: no two share them, but by accident."""
    key = derive_key("ids", corpus, sequence, view, index)
    first = int(counter_hash(key, np.arange(1))[0] % np.uint64(vocabulary))
    return (first + np.arange(k) * 7) % vocabulary


def stored_row(kind, corpus, sequence, view, index, vocabulary, k=K):
    """(ids, values, tail's log weight at temperature 2) of a sample: quanta below the first, or counts of draws."""
    some = sequence + 3 * view + index
    ids, values = stored_ids(corpus, sequence, view, index, vocabulary, k), np.arange(k) * (1 + some % 9)
    if kind != "top_k":  # ragged
        ids, values = ids[: 1 + some % k], values[: 1 + some % k]
    if kind == "counts":
        values = 1 + values
    return ids, values, -(some % 700) / NAT


def codec(kind, vocabulary, k=K):
    if kind == "counts":
        return Codec(vocabulary, k, 0.0, ("first", "truth"))
    return Codec(vocabulary, k, QUANTUM, scalars=SCALARS)


def write_targets(folder, lane, vocabulary, samples, kind="top_k", k=K, move=()):
    """Shards of the first samples of a lane's stream, as a teacher would leave them; `move`: records that lose their
    last row to the next one."""
    folder.mkdir(parents=True)
    how = codec(kind, vocabulary, k)
    header = FolderHeader(LENGTH, how)
    for start in range(0, samples, PER_SHARD):
        end = min(start + PER_SHARD, samples)
        sequences, views = lane.stream.pairs(np.arange(start, end))
        view = lane.viewer(lane.tokens[sequences], sequences, views)
        places = [(int(sequences[row]), int(views[row]), int(i)) for row, i in np.argwhere(view.loss_mask_BS)]
        rows = [stored_row(kind, lane.name, *place, vocabulary, k) for place in places]
        ids = np.zeros((len(rows), k), np.int64)
        given = np.zeros((len(rows), k), np.int64) if kind == "counts" else np.full((len(rows), k), -np.inf)
        for row, (kept, values, _) in enumerate(rows):
            ids[row, : len(kept)] = kept
            given[row, : len(kept)] = values if kind == "counts" else -0.5 - QUANTUM * values
        tails = np.array([tail for *_, tail in rows])
        scalars = {"first": np.full(len(rows), -0.5), "truth": np.full(len(rows), -0.5), 1.0: tails - 1}
        planes, distortion_n = pack_arrays(how, ids, given, scalars | {TAIL: tails})
        ends = np.cumsum(view.loss_mask_BS.sum(axis=1))
        ends[[sample - start for sample in move if start <= sample < end - 1]] -= 1
        block = pack_block(how, planes, ends, lane.viewer.digests(view), distortion_n)
        write_shard(folder / shard_name(start, end), header, start, [block])
    return ShardFolder(folder, samples, PER_SHARD, header, keep=2)


def make_world(
    folder, objective="mlm", vocabulary=300, views=3, taught=(True, True), seed=1, kind="top_k", ks=(K, K), move=()
):
    lanes = []
    for number, size in enumerate(SIZES):
        name = f"corpus{number}"
        tokens = np.random.default_rng(number).integers(5, vocabulary, (size, LENGTH))
        tokens = tokens.astype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        viewer = Viewer(objective, seed, name, vocabulary, SPECIAL, MASK if objective == "mlm" else None, 0.25)
        lane = Lane(name, tokens, CorpusStream(size, views, seed, f"digest{number}"), viewer, None)
        if taught[number]:
            targets = write_targets(folder / name, lane, vocabulary, size * views, kind, ks[number], move)
            lane = replace(lane, targets=targets)
        lanes.append(lane)
    return World(lanes, views, vocabulary, folder, kind)


@pytest.fixture(scope="module", params=["mlm", "clm", "mlm, three-byte ids"])
def world(request, tmp_path_factory):
    objective, _, wide = request.param.partition(",")
    views = 1 if objective == "clm" else 3
    return make_world(tmp_path_factory.mktemp("targets"), objective, 90_000 if wide else 300, views)


def layout(batch=8, micro=2, rank=0, world_size=1):
    return BatchLayout(batch, micro, rank, world_size)


def loader(world, cut=None, weights=(2.0, 1.0), k=K, lanes=None, tail=None):
    lanes = world.lanes if lanes is None else lanes
    return Loader(lanes, Mix(list(weights[: len(lanes)])), layout() if cut is None else cut, Reading(k, tail))


def rows_of(batches):
    """Every target row as one comparable tuple: (input sequence, index, label, α, count, ids, values)."""
    rows = []
    for batch in batches:
        sequences = [tuple(row) for row in batch.input_ids_BS.tolist()]
        targets = batch.targets
        for n, (row, label) in enumerate(zip(batch.rows_N.tolist(), batch.labels_N.tolist(), strict=True)):
            taught = ()
            if targets is not None:
                count = int(targets.count_N[n])
                ids, values = targets.ids()[n].tolist()[:count], targets.values_NK[n].tolist()[:count]
                taught = (float(batch.alpha_N[n]), count, tuple(ids), tuple(values))
            rows.append((sequences[row // LENGTH], row % LENGTH, label, *taught))
    return rows


def expected_rows(world, step, batch_size, alpha, k=K, weights=(2.0, 1.0), ks=(K, K)):
    """The same from the definitions, sample by sample: the k most probable ids, which rise."""
    choice, places = Mix(list(weights))(np.arange(step * batch_size, (step + 1) * batch_size))
    rows = []
    for number, place in zip(choice.tolist(), places.tolist(), strict=True):
        lane = world.lanes[number]
        (sequence,), (view,) = (x.tolist() for x in lane.stream.pairs(np.array([place])))
        seen = lane.viewer(lane.tokens[[sequence]], np.array([sequence]), np.array([view]))
        for index in np.flatnonzero(seen.loss_mask_BS[0]).tolist():
            ids, values, _ = stored_row(world.kind, lane.name, sequence, view, index, world.vocabulary, ks[number])
            held = sorted(zip(ids[:k].tolist(), values[:k].tolist(), strict=True))
            taught = (np.float32(alpha).item(), len(held), tuple(x for x, _ in held), tuple(y for _, y in held))
            rows.append((tuple(seen.inputs_BS[0].tolist()), index, int(seen.labels_BS[0, index]), *taught))
    return rows


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
    lane = world.lanes[0]
    samples = SIZES[0] * world.views
    one = loader(world, layout(1, 1), weights=(1.0,), lanes=[lane])
    rows = [row for step in range(samples) for row in rows_of(one.load(step, 0.5))]
    stored = sum(lane.targets.read(np.arange(samples)).rows)
    assert len(rows) == stored
    if world.views > 1:  # each epoch shows another masking
        assert len({(row[0], row[1]) for row in rows}) == stored


def test_later_epochs_read_the_frames_of_their_pair(world):
    lane = world.lanes[0]
    one = loader(world, layout(1, 1), weights=(1.0,), lanes=[lane])
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
    assert batches[0].taught == int((owners == 0).sum())


def test_micro_batch_of_the_untaught_corpus_alone(tmp_path):
    world = make_world(tmp_path, taught=(False, True))
    lanes = [world.lanes[0]]
    (batch,) = loader(world, layout(2, 2), weights=(1.0,), lanes=lanes).load(0, 0.5)
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
    choice, places = Mix(list(weights))(np.arange(step * batch_size, (step + 1) * batch_size))
    tails = []
    for number, place in zip(choice.tolist(), places.tolist(), strict=True):
        lane = world.lanes[number]
        (sequence,), (view,) = (x.tolist() for x in lane.stream.pairs(np.array([place])))
        seen = lane.viewer(lane.tokens[[sequence]], np.array([sequence]), np.array([view]))
        for index in np.flatnonzero(seen.loss_mask_BS[0]).tolist():
            _, values, tail = stored_row(world.kind, lane.name, sequence, view, index, world.vocabulary)
            whole = np.exp(tail) + np.exp(-QUANTUM * values[k:] / 2).sum()
            tails.append(None if lane.targets is None else np.log(whole))
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
    asked = lane.viewer(lane.tokens[[sequence]], np.array([sequence]), views).loss_mask_BS[0]
    tokens = lane.tokens.copy()
    tokens[sequence, np.flatnonzero(~asked)[-1]] ^= 64
    misaligned(aligned, replace(lane, tokens=tokens), steps=(0,))


def change_one_input(lane, places):
    """One token that is not asked for, at the given places of the lane."""
    tokens = lane.tokens.copy()
    sequences, views = lane.stream.pairs(np.array(places))
    for sequence, view in zip(sequences, views, strict=True):
        asked = lane.viewer(lane.tokens[[sequence]], np.array([sequence]), np.array([view])).loss_mask_BS[0]
        tokens[sequence, np.flatnonzero(~asked)[-1]] ^= 64
    return replace(lane, tokens=tokens)


@pytest.mark.parametrize("micro", [1, 8])
def test_first_record_that_differs_is_named_and_nothing_behind_it_is_read(aligned, micro):
    lane = aligned.lanes[0]
    read = []

    class Watched(ShardFolder):
        def read(self, samples):
            read.extend(samples.tolist())
            return super().read(samples)

    watched = Watched(lane.targets.folder, lane.targets.samples, PER_SHARD, lane.targets.header)
    changed = change_one_input(replace(lane, targets=watched), [3, 5])
    with pytest.raises(UserError, match="sample 3: the teacher saw another input"):
        loader(aligned, layout(8, micro), weights=(1.0,), lanes=[changed]).load(0, 0.5)
    assert read == list(range(4 if micro == 1 else 8))


def test_row_that_slipped_into_the_next_record_is_refused(tmp_path):
    """All digests agree, and so does the number of rows of the whole batch."""
    world = make_world(tmp_path, "clm", views=1, move=(2,))
    one = loader(world, layout(8, 8), weights=(1.0,), lanes=[world.lanes[0]])
    with pytest.raises(UserError, match="sample 2: the teacher saw another input"):
        one.load(0, 0.5)
    sound = loader(world, layout(2, 2), weights=(1.0,), lanes=[world.lanes[0]])
    assert len(sound.load(0, 0.5)) == 1


def test_targets_shifted_by_one(tmp_path):
    world = make_world(tmp_path)
    lane = world.lanes[0]

    class Shifted(ShardFolder):
        def read(self, samples):
            return super().read((samples + 1) % self.samples)

    folder = Shifted(tmp_path / "corpus0", SIZES[0] * 3, PER_SHARD, lane.targets.header)
    misaligned(world, replace(lane, targets=folder))


def test_other_sequence_length(aligned):
    lane = aligned.lanes[0]
    misaligned(aligned, replace(lane, tokens=lane.tokens[:, :-1]))


def test_other_number_of_views(tmp_path):
    """The first epochs agree; the first view that the teacher has not seen is refused."""
    world = make_world(tmp_path)
    lane = replace(world.lanes[0], stream=replace(world.lanes[0].stream, views=2))
    fine = loader(world, layout(1, 1), weights=(1.0,), lanes=[lane])
    fine.load(0, 0.5)
    fine.load(2 * SIZES[0] - 1, 0.5)
    fine.load(2 * SIZES[0], 0.5)  # view 0 again, found by random access: still the right frame
    more = replace(world.lanes[0], stream=replace(world.lanes[0].stream, views=4))
    with pytest.raises(UserError):
        loader(world, layout(1, 1), weights=(1.0,), lanes=[more]).load(3 * SIZES[0], 0.5)


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
    made = loader(world, layout(5, 5), weights=(1.0,), lanes=[lane])
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
    lane = replace(
        world.lanes[0], targets=ShardFolder(tmp_path / "corpus0", 5, PER_SHARD, world.lanes[0].targets.header)
    )
    made = loader(world, layout(5, 5), weights=(1.0,), lanes=[lane])
    assert made(0, 0.5, 0.5)[0].taught > 0
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
            made(step, 0.5, 0.5)
            waited.append(made.waited_s)
        assert 0 < waited[0] < waited[1] < waited[2]
    finally:
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
