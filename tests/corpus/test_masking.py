"""Views: the masking's rates, that it is a pure function of counters, and that its digest proves the alignment."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ki_ds.corpus.masking import VALIDATION_VIEW, View, Viewer

VOCABULARY, SPECIAL, MASK = 50, [0, 1, 2, 3, 4], 4
calm = settings(deadline=None, max_examples=50)


def viewer(
    objective="mlm", seed=1, corpus="c0ffee", vocabulary=VOCABULARY, special=SPECIAL, mask=MASK, probability=0.15
):
    return Viewer(objective, seed, corpus, vocabulary, special, mask, probability)


def corpus(rows=40, columns=512, vocabulary=VOCABULARY, dtype=np.uint16):
    """Sequences as the corpus stage makes them: framed, with special tokens between documents."""
    tokens = np.random.default_rng(0).integers(5, vocabulary, (rows, columns)).astype(dtype)
    tokens[:, 0], tokens[:, -1], tokens[:, 7::13] = 0, 2, 2
    return tokens


def same(one, two):
    """As far as a model can tell: labels count at targets only."""
    return (
        np.array_equal(one.inputs_BS, two.inputs_BS)
        and np.array_equal(one.loss_mask_BS, two.loss_mask_BS)
        and np.array_equal(one.labels_BS[one.loss_mask_BS], two.labels_BS[two.loss_mask_BS])
    )


def rows(view, which):
    return View(view.inputs_BS[which], view.loss_mask_BS[which], view.labels_BS[which])


def within(count, trials, share):
    """Six standard deviations of a binomial distribution; keys are fixed, so what passes once passes always."""
    return abs(count - trials * share) <= 6 * np.sqrt(trials * share * (1 - share)) + 1


# -------------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize("probability", [0.01, 0.15, 0.4, 0.999])
def test_rates_of_choice_mask_random_and_kept(probability):
    tokens = corpus(200)
    view = viewer(probability=probability)(tokens, np.arange(200), np.zeros(200, int))
    ordinary = ~np.isin(tokens, SPECIAL)
    chosen = view.loss_mask_BS
    assert within(chosen.sum(), ordinary.sum(), probability)
    masked = (view.inputs_BS == MASK) & chosen
    changed = chosen & ~masked & (view.inputs_BS != tokens)
    count = int(chosen.sum())
    assert within(masked.sum(), count, 0.8)
    assert within(changed.sum(), count, 0.1 * 44 / 45)  # one of the 45 ordinary tokens is the old one
    assert within((chosen & (view.inputs_BS == tokens)).sum(), count, 0.1 + 0.1 / 45)


def test_random_replacements_cover_every_ordinary_token_evenly_and_no_special_one():
    tokens = np.full((400, 512), 5, np.uint16)
    view = viewer(probability=0.9)(tokens, np.arange(400), np.zeros(400, int))
    random = view.inputs_BS[view.loss_mask_BS & (view.inputs_BS != MASK) & (view.inputs_BS != 5)]
    counts = np.bincount(random, minlength=VOCABULARY)
    assert not counts[SPECIAL].any() and counts[5] == 0
    assert all(within(count, len(random), 1 / 44) for count in counts[6:])


@calm
@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=8, max_size=40), st.integers(0, 2**40), st.integers(0, 2**33))
def test_special_tokens_are_neither_chosen_nor_changed_nor_made(ids, sequence, number):
    tokens = np.array([ids])
    view = viewer(probability=0.9)(tokens, np.array([sequence]), np.array([number]))
    special = np.isin(tokens, SPECIAL)
    assert not view.loss_mask_BS[special].any()
    assert np.array_equal(view.inputs_BS[~view.loss_mask_BS], tokens[~view.loss_mask_BS])
    made = view.inputs_BS[view.loss_mask_BS]
    assert np.isin(made[made != MASK], np.setdiff1d(np.arange(VOCABULARY), SPECIAL)).all()
    assert np.array_equal(view.labels_BS[view.loss_mask_BS], tokens[view.loss_mask_BS])


def test_every_index_is_chosen_equally_often_over_sequences():
    counts = viewer()(np.full((4000, 64), 9), np.arange(4000), np.zeros(4000, int)).loss_mask_BS.sum(axis=0)
    assert all(within(count, 4000, 0.15) for count in counts)


def test_a_sequence_of_special_tokens_has_no_target():
    view = viewer()(np.zeros((2, 16), np.uint16), np.arange(2), np.zeros(2, int))
    assert not view.loss_mask_BS.any() and not view.inputs_BS.any()


def test_special_tokens_at_the_end_of_the_vocabulary():
    view = viewer(special=[49, 48], mask=48, probability=0.9)(np.full((50, 64), 7), np.arange(50), np.zeros(50, int))
    random = view.inputs_BS[view.loss_mask_BS & (view.inputs_BS != 48)]
    assert 49 not in random and 0 in random


# ------------------------------------------------------------------------------------------------ a pure function


@calm
@given(st.permutations(range(12)), st.integers(0, 12))
def test_batches_and_their_order_do_not_matter(order, cut):
    tokens, sequences, views = corpus(12, 32), np.arange(12) * 7, np.arange(12) % 3
    whole = viewer()(tokens, sequences, views)
    for part in (order[:cut], order[cut:]):
        if part:
            assert same(viewer()(tokens[part], sequences[part], views[part]), rows(whole, part))


def test_inputs_are_not_written_to_nor_shared():
    for objective in ("mlm", "clm"):
        tokens = corpus(4, 32, dtype=np.int32)
        tokens.flags.writeable = False
        view = viewer(objective)(tokens, np.arange(4), np.zeros(4, int))
        assert np.array_equal(tokens, corpus(4, 32)) and not np.shares_memory(view.inputs_BS, tokens)
        assert view.inputs_BS.dtype == np.int32 and view.loss_mask_BS.dtype == bool and view.labels_BS.dtype == np.int32


@pytest.mark.parametrize("dtype", ["<u2", "<u4", np.int32, np.int64])
def test_the_width_of_the_stored_ids_does_not_matter(dtype):
    whole = viewer()(corpus(4, 32), np.arange(4), np.zeros(4, int))
    assert same(whole, viewer()(corpus(4, 32, dtype=dtype), np.arange(4), np.zeros(4, int)))


def test_ids_beyond_two_bytes():
    tokens = corpus(4, 32, vocabulary=100_000, dtype=np.uint32)
    view = viewer(vocabulary=100_000)(tokens, np.arange(4), np.zeros(4, int))
    assert (
        np.array_equal(view.labels_BS[view.loss_mask_BS], tokens[view.loss_mask_BS]) and view.labels_BS.max() > 65_536
    )


def test_views_sequences_seeds_and_corpora_are_masked_differently():
    tokens = np.full((1, 2000), 9)

    def chosen(sequence=0, number=0, **more):
        return viewer(**more)(tokens, np.array([sequence]), np.array([number])).loss_mask_BS[0]

    found = [chosen(), chosen(number=1), chosen(number=VALIDATION_VIEW), chosen(sequence=1), chosen(1, 1),
             chosen(seed=2), chosen(corpus="decade")]  # fmt: skip
    for one, two in itertools.combinations(found, 2):
        assert within((one & two).sum(), 2000, 0.15**2)  # as if independent
    assert np.array_equal(chosen(3, 5), chosen(3, 5))


def test_the_tokens_do_not_move_the_masking():
    """Choice goes by place, so that two domains with one sequence number do not leak into each other's rates."""
    one, two = (viewer()(np.full((3, 64), token), np.arange(3), np.zeros(3, int)) for token in (9, 10))
    assert np.array_equal(one.loss_mask_BS, two.loss_mask_BS)


def test_a_higher_probability_chooses_more_of_the_same():
    low, high = (viewer(probability=p)(corpus(5), np.arange(5), np.zeros(5, int)).loss_mask_BS for p in (0.15, 0.3))
    assert (high | low).sum() == high.sum() > low.sum()


# -------------------------------------------------------------------------------------------------------- causal


def test_causal_view_predicts_the_next_token_and_nothing_behind_the_last():
    tokens = corpus(3, 16)
    view = viewer("clm", mask=None)(tokens, np.arange(3), np.zeros(3, int))
    assert np.array_equal(view.inputs_BS, tokens)
    assert view.loss_mask_BS[:, :-1].all() and not view.loss_mask_BS[:, -1].any()
    assert np.array_equal(view.labels_BS[:, :-1], tokens[:, 1:])


def test_causal_view_is_the_same_in_every_view():
    make, tokens = viewer("clm", mask=None), corpus(3, 16)
    assert same(make(tokens, np.arange(3), np.zeros(3, int)), make(tokens, np.arange(3) + 9, np.ones(3, int)))


def test_a_masked_model_without_a_mask_token():
    with pytest.raises(ValueError, match="needs a mask token"):
        viewer(mask=None)


# ------------------------------------------------------------------------------------------------------- digests

SMALL = st.tuples(
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
)


def made(inputs, targets, labels):
    return View(np.array([inputs], np.int32), np.array([targets], bool), np.array([labels], np.int32))


@calm
@given(SMALL, SMALL)
def test_digests_agree_exactly_where_the_views_do(one, two):
    one, two = made(*one), made(*two)
    assert (Viewer.digests(one)[0] == Viewer.digests(two)[0]) == same(one, two)


@calm
@given(SMALL, st.integers(0, 5), st.integers(1, 9))
def test_digest_changes_with_a_single_id_flag_or_label_and_not_with_a_label_nobody_asks_for(small, place, shift):
    before = Viewer.digests(made(*small))[0]
    for part in range(3):
        changed = [list(values) for values in small]
        changed[part][place] = not changed[part][place] if part == 1 else changed[part][place] + shift
        asked = part < 2 or small[1][place]
        assert (Viewer.digests(made(*changed))[0] != before) == asked


@calm
@given(SMALL)
def test_digest_tells_the_order_of_ids(small):
    reverse = tuple(list(reversed(values)) for values in small)
    assume(not same(made(*small), made(*reverse)))
    assert Viewer.digests(made(*small))[0] != Viewer.digests(made(*reverse))[0]


def test_digests_are_of_rows_whatever_the_memory_order():
    view = viewer()(corpus(6, 32), np.arange(6), np.zeros(6, int))
    whole = Viewer.digests(view)
    assert whole.shape == (6,) and whole.dtype == np.uint64 and len(set(whole.tolist())) == 6
    turned = View(*(np.asfortranarray(array) for array in (view.inputs_BS, view.loss_mask_BS, view.labels_BS)))
    assert np.array_equal(Viewer.digests(turned), whole)
    assert np.array_equal(Viewer.digests(rows(view, [4, 1])), whole[[4, 1]])
    wide = View(view.inputs_BS.astype(np.int64), view.loss_mask_BS, view.labels_BS.astype(np.int64))
    assert np.array_equal(Viewer.digests(wide), whole)


def test_golden_views():
    """A change of the masking makes every stored target worthless: it needs another schema of the folders."""
    tokens = np.arange(5, 25)[None].repeat(2, axis=0)
    view = viewer(probability=0.5)(tokens, np.array([3, 2**40]), np.array([1, VALIDATION_VIEW]))
    assert view.inputs_BS.tolist() == [
        [4, 4, 7, 8, 9, 10, 11, 4, 13, 4, 15, 4, 4, 18, 4, 4, 21, 22, 4, 4],
        [4, 6, 4, 8, 4, 10, 4, 12, 38, 39, 15, 4, 4, 4, 4, 20, 4, 22, 23, 4],
    ]
    assert [int(value) for value in Viewer.digests(view)] == [8706402037489606808, 13554437698384089787]
    causal = viewer("clm", mask=None)(tokens[:1], np.array([0]), np.array([0]))
    assert int(Viewer.digests(causal)[0]) == 8389409901659076532
