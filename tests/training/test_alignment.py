"""A teacher that saw another input than the student is about to see is found out."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.taught_corpora import MASK, PER_SHARD, SIZES, SPECIAL, layout, loader, make_world

from ki_ds.corpus.masking import Viewer
from ki_ds.errors import UserError
from ki_ds.targets.folder import ShardFolder


def misaligned(world, reader, steps=(0, 4, 11)):
    """Every step of a changed reader is refused, with the folder in the message."""
    for step in steps:
        with pytest.raises(UserError, match="the teacher saw another input") as error:
            loader(world, weights=(1.0,), readers=[reader]).load(step, 0.5)
        assert str(world.folder) in str(error.value)
        assert reader.name in str(error.value)


@pytest.fixture(scope="module", params=["mlm", "clm"])
def aligned(request, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("aligned"), request.param, views=1 if request.param == "clm" else 3)


def test_wrong_mask_seed(tmp_path):
    world = make_world(tmp_path)
    misaligned(
        world, replace(world.readers[0], viewer=Viewer("mlm", 2, "corpus0", world.vocabulary, SPECIAL, MASK, 0.25))
    )


def test_wrong_mask_probability(tmp_path):
    world = make_world(tmp_path)
    misaligned(
        world, replace(world.readers[0], viewer=Viewer("mlm", 1, "corpus0", world.vocabulary, SPECIAL, MASK, 0.5))
    )


def test_wrong_order_seed(aligned):
    reader = aligned.readers[0]
    misaligned(aligned, replace(reader, stream=replace(reader.stream, seed=2)), steps=(0,))


def test_swapped_corpus(aligned):
    one, two = aligned.readers
    misaligned(aligned, replace(two, targets=one.targets), steps=(0,))
    misaligned(aligned, replace(one, tokens=np.random.default_rng(9).permuted(one.tokens, axis=1)))


def test_one_changed_token(aligned):
    """One token of the sequence, which is an input but is not asked for."""
    reader = aligned.readers[0]
    (sequence,), views = reader.stream.pairs(np.array([0]))
    asked = reader.viewer(reader.tokens[[sequence]], np.array([sequence]), views).loss_mask_BS[0]
    tokens = reader.tokens.copy()
    tokens[sequence, np.flatnonzero(~asked)[-1]] ^= 64
    misaligned(aligned, replace(reader, tokens=tokens), steps=(0,))


def change_one_input(reader, samples):
    """One token that is not asked for, in each of these samples of the reader."""
    tokens = reader.tokens.copy()
    sequences, views = reader.stream.pairs(np.array(samples))
    for sequence, view in zip(sequences, views, strict=True):
        asked = reader.viewer(reader.tokens[[sequence]], np.array([sequence]), np.array([view])).loss_mask_BS[0]
        tokens[sequence, np.flatnonzero(~asked)[-1]] ^= 64
    return replace(reader, tokens=tokens)


@pytest.mark.parametrize("micro", [1, 8])
def test_first_record_that_differs_is_named_and_nothing_behind_it_is_read(aligned, micro):
    reader = aligned.readers[0]
    read = []

    class Watched(ShardFolder):
        def read(self, samples, check):
            read.extend(samples.tolist())
            return super().read(samples, check)

    watched = Watched(reader.targets.folder, reader.targets.samples, PER_SHARD, reader.targets.header)
    changed = change_one_input(replace(reader, targets=watched), [3, 5])
    with pytest.raises(UserError, match="sample 3: the teacher saw another input"):
        loader(aligned, layout(8, micro), weights=(1.0,), readers=[changed]).load(0, 0.5)
    assert read == list(range(4 if micro == 1 else 8))


def test_row_that_slipped_into_the_next_record_is_refused(tmp_path):
    """All digests agree, and so does the number of rows of the whole batch."""
    world = make_world(tmp_path, "clm", views=1, move=(2,))
    one = loader(world, layout(8, 8), weights=(1.0,), readers=[world.readers[0]])
    with pytest.raises(UserError, match="sample 2: the teacher saw another input"):
        one.load(0, 0.5)
    sound = loader(world, layout(2, 2), weights=(1.0,), readers=[world.readers[0]])
    assert len(sound.load(0, 0.5)) == 1


def test_targets_shifted_by_one(tmp_path):
    world = make_world(tmp_path)
    reader = world.readers[0]

    class Shifted(ShardFolder):
        def read(self, samples, check):
            return super().read((samples + 1) % self.samples, check)

    folder = Shifted(tmp_path / "corpus0", SIZES[0] * 3, PER_SHARD, reader.targets.header)
    misaligned(world, replace(reader, targets=folder))


def test_other_sequence_length(aligned):
    reader = aligned.readers[0]
    misaligned(aligned, replace(reader, tokens=reader.tokens[:, :-1]))


def test_other_number_of_views(tmp_path):
    """The first epochs agree; the first view that the teacher has not seen is refused."""
    world = make_world(tmp_path)
    reader = replace(world.readers[0], stream=replace(world.readers[0].stream, views=2))
    fine = loader(world, layout(1, 1), weights=(1.0,), readers=[reader])
    fine.load(0, 0.5)
    fine.load(2 * SIZES[0] - 1, 0.5)
    fine.load(2 * SIZES[0], 0.5)  # view 0 again, found by random access: still the right frame
    more = replace(world.readers[0], stream=replace(world.readers[0].stream, views=4))
    with pytest.raises(UserError):
        loader(world, layout(1, 1), weights=(1.0,), readers=[more]).load(3 * SIZES[0], 0.5)
