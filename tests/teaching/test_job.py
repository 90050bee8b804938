"""The teacher stage: the numbers that draws are made of."""

import math

import numpy as np

from ki_ds.corpus.masking import View
from ki_ds.targets.selection import Selection
from ki_ds.teaching.asking import uniforms


def places(sequences, length, targets):
    view = View(np.zeros((sequences, length), np.int32), targets, np.zeros((sequences, length), np.int32))
    return view, np.flatnonzero(targets)


def test_uniforms_do_not_depend_on_what_else_is_in_the_batch():
    rng = np.random.default_rng(0)
    sequences, views = rng.integers(0, 1 << 40, 12), rng.integers(0, 5, 12)
    targets, how = rng.random((12, 9)) < 0.4, Selection("sampled", 6)
    view, rows = places(12, 9, targets)
    whole = uniforms(77, sequences, views, rows, view, how)
    assert whole.shape == (len(rows), 6) and whole.dtype == np.float64
    at = 0
    for begin in range(0, 12, 5):
        here = slice(begin, begin + 5)
        part_view, part_rows = places(len(sequences[here]), 9, targets[here])
        part = uniforms(77, sequences[here], views[here], part_rows, part_view, how)
        np.testing.assert_array_equal(part, whole[at : at + len(part)])
        at += len(part)
    assert at == len(whole)
    more = uniforms(77, sequences, views, rows, view, Selection("sampled", 9))
    np.testing.assert_array_equal(more[:, :6], whole)  # a draw's number is its own, however many follow


def test_uniforms_differ_with_key_sequence_view_index_and_draw():
    """None of the five is lost on the way: all values of a small grid are distinct."""
    found = []
    view, rows = places(4, 5, np.ones((4, 5), bool))
    for key in (1, 2):
        for shift in range(3):
            found.append(uniforms(key, np.arange(4), np.full(4, shift), rows, view, Selection("sampled", 7)))
    assert len(np.unique(np.concatenate(found))) == 2 * 3 * 4 * 5 * 7


def test_uniforms_are_uniform_and_uncorrelated():
    """A million: Pearson's statistic of 1000 bins, mean, variance and neighbours' correlation, to 4.5 deviations."""
    view, rows = places(200, 100, np.ones((200, 100), bool))
    u = uniforms(5, np.arange(200), np.zeros(200, np.int64), rows, view, Selection("sampled", 50))
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, 1000, (0, 1))[0]
    assert abs(((counts - 1000.0) ** 2 / 1000).sum() - 999) < 4.5 * math.sqrt(2 * 999)
    deviation = 1 / math.sqrt(12 * u.size)
    assert abs(u.mean() - 0.5) < 4.5 * deviation
    assert abs(u.var() - 1 / 12) < 4.5 * math.sqrt((1 / 80 - 1 / 144) / u.size)
    centred = (u - 0.5) * math.sqrt(12)
    for one, two in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1]), (centred[100:], centred[:-100])):
        assert abs((one * two).mean()) < 4.5 / math.sqrt(one.size)


def test_no_uniforms_where_nothing_is_drawn():
    assert (
        uniforms(0, np.arange(2), np.zeros(2), *places(2, 3, np.ones((2, 3), bool))[::-1], Selection("top_k", 3))
        is None
    )
