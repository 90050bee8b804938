"""The stream: hashing, permutations, (sequence, view) pairs and mixes, as a pure function of the sample."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ki_ds.corpus.hashing import counter_hash, derive_key, mix64
from ki_ds.corpus.stream import CorpusStream, Mix, Permutation

calm = settings(deadline=None, max_examples=30)
keys = st.integers(0, 2**64 - 1)
SURPRISE = 5.0  # standard deviations that do not come by chance; keys are fixed, so what passes once passes always


def stream(size=7, views=3, seed=1, corpus="c0ffee"):
    return CorpusStream(size, views, seed, corpus)


def ints(array):
    return [int(value) for value in np.ravel(array)]


def surprise(counts):
    """By how many standard deviations counts are less equal than by chance (Wilson and Hilferty 1931)."""
    expected, degrees = np.mean(counts), len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / np.sqrt(2 / (9 * degrees))


def correlation(one, two):
    """In standard deviations from none."""
    return abs(np.corrcoef(one, two)[0, 1]) * np.sqrt(len(one))


# ------------------------------------------------------------------------------------------------------- hashing


def test_mix64_is_the_published_finaliser():
    """The first outputs of splitmix64 with seed 0 are the finaliser of multiples of the golden ratio."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([golden * n % 2**64 for n in (1, 2, 3)], dtype=np.uint64)
    assert ints(mix64(states)) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_mix64_writes_no_input():
    values = np.arange(10, dtype=np.uint64)
    mix64(values)
    assert ints(values) == list(range(10))


@calm
@given(keys, st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_counter_hash_is_elementwise_and_broadcasts(key, counters):
    rows, columns = np.array(counters)[:, None], np.array([0, 1, 2**33])[None, :]
    table = counter_hash(key, rows, columns)
    assert table.dtype == np.uint64 and table.shape == (len(counters), 3)
    for (i, row), (j, column) in itertools.product(enumerate(counters), enumerate([0, 1, 2**33])):
        assert table[i, j] == counter_hash(key, np.array(row), np.array(column))


def test_counter_hash_tells_order_number_and_key_apart():
    one, two = np.array(1), np.array(2)
    found = [counter_hash(0, one, two), counter_hash(0, two, one), counter_hash(0, one), counter_hash(1, one, two),
             counter_hash(0, one, two, np.array(0)), counter_hash(2**64 - 1, one, two)]  # fmt: skip
    assert len({int(value) for value in found}) == len(found)


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_every_bit_of_the_hash_is_fair(bit):
    ones = int((counter_hash(5, np.arange(100_000)) >> np.uint64(bit) & np.uint64(1)).sum())
    assert surprise(np.array([ones, 100_000 - ones])) < SURPRISE


def test_derived_keys_tell_their_parts_apart():
    assert derive_key("a", 1) != derive_key("a1") != derive_key("a", 2)
    assert derive_key("order", 1, "c0ffee", 0) == derive_key("order", "1", "c0ffee", "0") < 2**64


def test_golden_hashes():
    assert ints(counter_hash(1, np.arange(2), np.array(3))) == [16318707280804337342, 617770901575264392]
    assert derive_key("mask", 1, "c0ffee") == 3599380068662825327


# --------------------------------------------------------------------------------------------------- permutation


@calm
@given(st.integers(1, 5000), keys)
@example(1, 0)
@example(2, 2**64 - 1)
@example(4096, 3)
@example(4097, 3)
def test_permutation_takes_every_value_once_and_back(size, key):
    permutation = Permutation(size, key)
    images = permutation(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))
    assert np.array_equal(permutation.inverse(images), np.arange(size))
    assert np.array_equal(permutation(permutation.inverse(np.arange(size))), np.arange(size))


def test_permutations_of_the_smallest_sizes():
    for size in range(1, 70):
        for key in range(5):
            assert sorted(Permutation(size, key)(np.arange(size))) == list(range(size))


@calm
@given(st.sampled_from([2**31, 2**32 - 1, 2**32 + 1, 2**40, 2**40 + 1, 2**62, 2**63 - 1]), keys, st.data())
def test_permutation_of_more_than_memory_holds(size, key, data):
    places = st.integers(0, size - 1)
    values = np.array(data.draw(st.lists(places, min_size=1, max_size=20, unique=True)), dtype=np.int64)
    permutation = Permutation(size, key)
    images = permutation(values)
    assert images.min() >= 0 and images.max() < size and len(np.unique(images)) == len(values)
    assert np.array_equal(permutation.inverse(images), values)


def test_permutation_keeps_shape_and_input():
    values = np.arange(6).reshape(2, 3)
    permutation = Permutation(10, 3)
    assert permutation(values).shape == (2, 3) and ints(values) == list(range(6))
    assert permutation(np.array(4)).shape == () and permutation(np.array([], dtype=int)).shape == (0,)
    assert ints(permutation(values)) == [int(permutation(np.array(value))) for value in range(6)]


@pytest.mark.parametrize("values", [[-1], [10], [0, 10], [2**62]])
def test_value_outside_the_permutation(values):
    permutation = Permutation(10, 3)
    for act in (permutation, permutation.inverse):
        with pytest.raises(ValueError, match=r"values must lie in \[0, 10\)"):
            act(np.array(values))


@pytest.mark.parametrize("size", [0, -1])
def test_permutation_of_nothing(size):
    with pytest.raises(ValueError, match=f"at least one element, got {size}"):
        Permutation(size, 1)


@pytest.mark.parametrize("size", [2, 3, 5, 16])
@pytest.mark.parametrize("value", [0, -1])
def test_where_a_value_goes_is_uniform_over_keys(size, value):
    images = [int(Permutation(size, derive_key(n))(np.array(value % size))) for n in range(800)]
    assert surprise(np.bincount(images, minlength=size)) < SURPRISE


def test_all_orders_of_four_are_equally_likely():
    orders = list(itertools.permutations(range(4)))
    found = [orders.index(tuple(ints(Permutation(4, derive_key(n))(np.arange(4))))) for n in range(1200)]
    assert surprise(np.bincount(found, minlength=24)) < SURPRISE


@pytest.mark.parametrize("size", [1000, 4096, 65_537])
def test_neighbours_do_not_stay_neighbours(size):
    """Neither of values nor of images: pairs are uncorrelated, and differences are as of a random order."""
    images = Permutation(size, derive_key("neighbours"))(np.arange(size))
    for lag in (1, 2, 64):
        assert correlation(images[:-lag], images[lag:]) < SURPRISE
    rises = int((np.diff(images) > 0).sum())
    assert abs(rises - (size - 1) / 2) < 6 * np.sqrt((size + 1) / 12)
    assert (np.abs(np.diff(images)) == 1).sum() < 12  # two expected
    assert (images == np.arange(size)).sum() < 10  # one expected


def test_halves_of_an_epoch_are_fair_samples():
    size = 10_000
    first = Permutation(size, derive_key("halves"))(np.arange(size // 2))
    counts = np.bincount(first // 100, minlength=100)
    assert surprise(counts) < SURPRISE


def test_keys_give_unrelated_orders():
    size = 2000
    orders = [Permutation(size, key)(np.arange(size)) for key in (0, 1, 2, 2**63, 2**64 - 1)]
    for one, two in itertools.combinations(orders, 2):
        assert correlation(one, two) < SURPRISE and (one == two).sum() < 10


# ------------------------------------------------------------------------------------------------------- stream


@calm
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_every_pair_appears_once_in_the_first_views_epochs(size, views, seed):
    sequences, shown = stream(size, views, seed).pairs(np.arange(size * views))
    assert len(set(zip(ints(sequences), ints(shown), strict=True))) == size * views
    assert np.array_equal(shown, np.repeat(np.arange(views), size))


@calm
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 100))
def test_every_epoch_shows_every_sequence_once_in_one_view(size, views, epoch):
    sequences, shown = stream(size, views).pairs(np.arange(epoch * size, (epoch + 1) * size))
    assert sorted(sequences) == list(range(size)) and set(ints(shown)) == {epoch % views}


@calm
@given(st.integers(1, 1000), st.integers(1, 12), st.lists(st.integers(0, 2**45), min_size=1, max_size=30))
def test_pair_stood_in_the_first_views_epochs_already(size, views, places):
    one, samples = stream(size, views), np.array(places)
    first = one.first_samples(samples)
    assert first.min() >= 0 and first.max() < views * size
    for before, after in zip(one.pairs(samples), one.pairs(first), strict=True):
        assert np.array_equal(before, after)
    early = samples < views * size
    assert np.array_equal(first[early], samples[early])


def test_first_samples_of_a_late_epoch_are_all_different():
    one = stream(50, 4)
    late = np.arange(4 * 50, 8 * 50)
    assert sorted(one.first_samples(late)) == list(range(4 * 50))
    assert ints(late[:3]) == [200, 201, 202]


@calm
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.integers(1, 39))
def test_samples_may_be_asked_for_in_any_batches(places, cut):
    one, samples = stream(13, 3), np.array(places)
    for function in (one.pairs, lambda p: (one.first_samples(p),)):
        whole = function(samples)
        parts = [function(part) for part in (samples[:cut], samples[cut:])]
        for index, array in enumerate(whole):
            assert np.array_equal(array, np.concatenate([part[index] for part in parts]))
            assert ints(array) == [int(function(np.array([p]))[index][0]) for p in places]
    assert ints(samples) == places


def test_epochs_seeds_and_corpora_have_orders_of_their_own():
    size = 500
    epochs = [stream(size).pairs(np.arange(e * size, (e + 1) * size))[0] for e in range(7)]
    others = [stream(size, seed=2), stream(size, corpus="decade")]
    epochs += [other.pairs(np.arange(size))[0] for other in others]
    for one, two in itertools.combinations(epochs, 2):
        assert (one == two).sum() < 10


def test_the_number_of_views_changes_no_order():
    for views in (1, 2, 10):
        assert np.array_equal(stream(20, views).pairs(np.arange(100))[0], stream(20, 3).pairs(np.arange(100))[0])


def test_a_corpus_of_one_sequence():
    sequences, views = stream(1, 3).pairs(np.arange(7))
    assert ints(sequences) == [0] * 7 and ints(views) == [0, 1, 2, 0, 1, 2, 0]
    assert ints(stream(1, 3).first_samples(np.arange(7))) == [0, 1, 2, 0, 1, 2, 0]


def test_no_samples():
    one = stream()
    assert all(len(array) == 0 for array in (*one.pairs(np.array([], int)), one.first_samples(np.array([], int))))


def test_golden_order():
    """A change of the order makes every stored target worthless: it needs another schema of the folders."""
    one = stream(1000, 2, 1, "c0ffee")
    sequences, views = one.pairs(np.array([0, 1, 2, 999, 1000, 2000, 123_456_789, 2**45]))
    assert ints(sequences) == [404, 764, 488, 517, 6, 432, 733, 532]
    assert ints(views) == [0, 0, 0, 0, 1, 0, 0, 0]
    assert ints(one.first_samples(np.array([7, 2000, 2**45]))) == [7, 555, 576]


# ---------------------------------------------------------------------------------------------------------- mix

weights_lists = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


@calm
@given(weights_lists)
@example([1])
@example([1, 1])
@example([1, 999])
@example([999, 1])
@example([1000, 1, 1, 1000])
def test_mix_is_dense_and_its_counts_are_counted(weights):
    mix, length = Mix(weights), 2000
    streams, places = mix(np.arange(length))
    counted = np.zeros(len(weights), int)
    for sample in range(length):
        if sample % 97 == 0 or sample > length - 50:
            assert mix.counts(sample) == ints(counted)
        assert places[sample] == counted[streams[sample]]  # 0, 1, 2 … within each stream
        counted[streams[sample]] += 1
    assert mix.counts(length) == ints(counted)


@calm
@given(weights_lists)
@example([1, 2, 4, 8, 16, 32])
def test_no_stream_is_ever_far_from_its_share(weights):
    """At no sample, whole numbers of weights being exact."""
    mix, length = Mix(weights), 8000
    streams, _ = mix(np.arange(length))
    for index, weight in enumerate(weights):
        count = np.concatenate([[0], np.cumsum(streams == index)])
        assert np.abs(count - np.arange(length + 1) * (weight / sum(weights))).max() <= len(weights)


@calm
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_fractional_weights_are_kept_to_a_thirty_thousandth(weights):
    assume(min(weights) / sum(weights) > 1e-3)
    counts = Mix(weights).counts(10**9)
    assert sum(counts) == 10**9
    for count, weight in zip(counts, weights, strict=True):
        assert count / 10**9 == pytest.approx(weight / sum(weights), abs=len(weights) / 2**15)


@calm
@given(weights_lists, st.lists(st.integers(0, 2**46), min_size=1, max_size=20), st.integers(0, 19))
def test_mix_at_far_samples_in_any_batches(weights, places, cut):
    """Place and count by arithmetic in numpy are those of Python's unbounded integers."""
    mix, samples = Mix(weights), np.array(places)
    streams, found = mix(samples)
    for batch in (slice(None, cut), slice(cut, None)):
        again = mix(samples[batch])
        assert np.array_equal(streams[batch], again[0]) and np.array_equal(found[batch], again[1])
    for sample, index, place in zip(places, ints(streams), ints(found), strict=True):
        before, after = mix.counts(sample), mix.counts(sample + 1)
        assert sum(before) == sample and before[index] == place
        assert [b - a for a, b in zip(before, after, strict=True)] == [int(n == index) for n in range(len(weights))]
    assert ints(samples) == places


@calm
@given(weights_lists, st.integers(0, 2**46))
def test_mix_does_not_drift(weights, sample):
    for count, weight in zip(Mix(weights).counts(sample), weights, strict=True):
        assert abs(count - Fraction(weight, sum(weights)) * sample) <= len(weights)


def test_scaled_weights_are_the_same_mix():
    one, two = Mix([1, 3, 2])(np.arange(500)), Mix([0.5, 1.5, 1.0])(np.arange(500))
    assert np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1])


def test_equal_weights_alternate():
    assert len(set(ints(Mix([1.0, 1.0])(np.arange(10))[0][::2]))) == 1
    for start in range(0, 30, 3):
        assert sorted(Mix([1, 1, 1])(np.arange(start, start + 3))[0]) == [0, 1, 2]


def test_a_mix_of_one_is_the_stream_itself():
    streams, places = Mix([0.7])(np.arange(5))
    assert ints(streams) == [0] * 5 and ints(places) == [0, 1, 2, 3, 4] and Mix([0.7]).counts(5) == [5]


@pytest.mark.parametrize("weights", [[], [0.0], [1, 0], [1, -1]])
def test_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match="weights must be positive"):
        Mix(weights)


@pytest.mark.parametrize("weights", [[1e6, 1], [1, 1e6], [1, 1, 1e6], [1e308, 1e308]])
def test_a_weight_that_would_never_be_read(weights):
    with pytest.raises(ValueError, match="too little to ever be read"):
        Mix(weights)


def test_golden_mix():
    streams, places = Mix([1, 3, 2])(np.array([0, 1, 2, 3, 4, 5, 10**6, 2**45]))
    assert ints(streams) == [1, 2, 0, 1, 2, 1, 2, 0]
    assert ints(places) == [0, 0, 0, 1, 1, 2, 333333, 5864062014805]
