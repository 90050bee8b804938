"""Packing: what is packed is what was given, within the bounds of quantisation."""

import math
import warnings

import numpy as np
import pytest
from helpers.definition import quanta
from helpers.targets import entries, inputs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets.codec import Codec
from ki_ds.targets.quanta import LARGEST, MINUS_INFINITY, quantum


@settings(max_examples=150, deadline=None)
@given(inputs("log-probability"))
def test_quantisation_is_within_half_a_quantum(case):
    how, ids, logp, scalars = case
    planes, _ = pack_arrays(how, ids, logp, scalars)
    for found, row, given_K in zip(entries(planes), ids.tolist(), logp.tolist(), strict=True):
        kept = {id: value for id, value in zip(row, given_K, strict=True) if value > -math.inf}
        assert found.keys() == kept.keys()
        first = max(kept.values(), default=0)
        for id, value in kept.items():
            below = first - value
            step = how.quantum * (1 if below <= how.quantum * 192.5 else 8)
            if below > how.quantum * 700 * (1 + 1e-5):
                assert found[id] == LARGEST
            else:
                assert abs(how.quantum * quanta(found[id]) - below) <= step * 0.5 + 1e-5 * max(below, 1e-2)
        assert not kept or 0 in found.values()
    ids_of_rows = planes.ids().astype(np.int64)
    assert ((np.diff(ids_of_rows, axis=1) > 0) | ~planes.kept()[:, 1:]).all()
    assert not ids_of_rows[~planes.kept()].any() and not planes.values_nK[~planes.kept()].any()


@settings(max_examples=40, deadline=None)
@given(inputs("count"))
def test_counts_are_kept_as_they_are(case):
    how, ids, counts, scalars = case
    planes, lost = pack_arrays(how, ids, counts, scalars)
    expected = [
        {id: count for id, count in zip(row, drawn, strict=True) if count}
        for row, drawn in zip(ids.tolist(), counts.tolist(), strict=True)
    ]
    assert entries(planes) == expected
    assert not lost.any()


def test_scalars_are_within_half_a_unit_and_hold_at_their_ends():
    how = Codec(300, 1, 1 / 16, scalars=("first", 1.0))
    given_n = np.array([0.0, -0.1, -127.9, -128.0, -500.0, 3.3, 500.0, -np.inf])
    rows = len(given_n)
    planes, _ = pack_arrays(
        how, np.zeros((rows, 1), int), np.zeros((rows, 1), np.float32), {"first": given_n, 1.0: given_n[::-1]}
    )
    end = 32_767 / 256
    found = how.scalar(planes, "first")
    np.testing.assert_allclose(found[:3], given_n[:3], atol=1 / 512, rtol=0)
    assert abs(found[5] - 3.3) <= 1 / 512
    assert found[[3, 4, 6, 7]].tolist() == [-end, -end, end, -np.inf]
    assert planes.scalars_Sn[0, -1] == MINUS_INFINITY
    np.testing.assert_array_equal(how.scalar(planes, 1.0), found[::-1])


@settings(max_examples=40, deadline=None)
@given(inputs("log-probability"))
def test_log_probabilities_are_what_was_given(case):
    how, ids, logp, scalars = case
    first = logp.max(axis=1, initial=-60)
    planes, _ = pack_arrays(how, ids, logp, {**scalars, "first": first})
    assume((first > -60).all())
    found = how.log_probabilities(planes)
    for row, (id_K, given_K) in enumerate(zip(ids.tolist(), logp.tolist(), strict=True)):
        kept = planes.kept()[row]
        said = dict(zip(planes.ids()[row, kept].tolist(), found[row, kept].tolist(), strict=True))
        for id, value in zip(id_K, given_K, strict=True):
            if max(first[row] - 192 * how.quantum, -60) < value:
                assert abs(said[id] - value) <= how.quantum / 2 + 1 / 512 + 1e-4
    assert np.isneginf(found[~planes.kept()]).all()


def test_impossible_entries_are_dropped_without_a_warning():
    inf = np.inf
    ids = np.array([[70_001, 5, 70_003], [4, 70_002, 6], [7, 8, 9]])
    logp = np.array([[-0.5, -1.0, -inf], [0.0, -inf, -inf], [-inf, -inf, -inf]], np.float32)
    scalars = {"first": logp.max(axis=1), "truth": logp.max(axis=1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planes, lost = pack_arrays(Codec(100_000, 3, 1 / 16), ids, logp, scalars)
    assert entries(planes) == [{5: 8, 70_001: 0}, {4: 0}, {}]
    assert planes.ids().tolist() == [[5, 70_001, 0], [4, 0, 0], [0, 0, 0]]
    assert lost.tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_log_probability_that_is_no_number(value):
    logp = np.array([[-1.0, -2.0], [-1.0, value]], np.float32)
    scalars = {"first": np.zeros(2), "truth": np.zeros(2)}
    with pytest.raises(ValueError, match="log-probability is not a number"):
        pack_arrays(Codec(300, 2, 1 / 16), np.array([[1, 2], [3, 4]]), logp, scalars)


def test_scalar_that_is_no_number_is_named():
    scalars = {"first": np.zeros(2), "truth": np.array([0, np.nan])}
    with pytest.raises(ValueError, match="truth is not a number in row 1"):
        pack_arrays(Codec(300, 2, 1 / 16), np.array([[1, 2], [3, 4]]), np.zeros((2, 2), np.float32), scalars)


@pytest.mark.parametrize("count", [256, -1, 1 << 40])
def test_count_that_does_not_fit_a_byte(count):
    with pytest.raises(ValueError, match="expected 0 to 255"):
        pack_arrays(Codec(300, 2, 0.0, ("first",)), np.array([[1, 2]]), np.array([[1, count]]), {"first": np.zeros(1)})


def test_row_of_more_entries_than_k():
    scalars = {"first": np.zeros(1), "truth": np.zeros(1)}
    how, ids = Codec(300, 2, 1 / 16), np.array([[1, 2, 3]])
    with pytest.raises(ValueError, match="a row of 3 entries, more than K = 2"):
        pack_arrays(how, ids, np.zeros((1, 3), np.float32), scalars)
    planes, _ = pack_arrays(how, ids, np.array([[-np.inf, 0, -1]], np.float32), scalars)  # wide, but few hold
    assert entries(planes) == [{2: 0, 3: 16}]


def test_pack_leaves_its_inputs_alone():
    for step in (1 / 16, 0.0):
        for kind in (np.int64, np.uint32):
            ids = np.array([[7, 3, 5], [9, 8, 1]], kind)
            given_nK = np.array([[3, 2, 0], [1, 1, 1]], np.float32 if step else np.uint32)
            scalars = {"first": np.zeros(2), "truth": np.ones(2)}
            before = ids.copy(), given_nK.copy(), {name: nats.copy() for name, nats in scalars.items()}
            pack_arrays(Codec(300, 3, step), ids, given_nK, scalars)
            np.testing.assert_array_equal(ids, before[0])
            np.testing.assert_array_equal(given_nK, before[1])
            assert all((scalars[name] == before[2][name]).all() for name in scalars)


def independent_kl(how, ids, logp, planes):
    """KL(original ‖ decoded) over the kept entries of each row, where it is largest, in Python floats."""
    return np.max([kl_at(how, ids, logp, planes, temperature) for temperature in {*how.tails, 1.0}], axis=0)


def kl_at(how, ids, logp, planes, temperature):
    result = []
    for found, row, given_K in zip(entries(planes), ids.tolist(), logp.tolist(), strict=True):
        kept = [(id, value) for id, value in zip(row, given_K, strict=True) if value > -math.inf]
        first = max((value for _, value in kept), default=0)
        log_p = [(value - first) / temperature for _, value in kept]
        log_q = [-how.quantum * quanta(found[id]) / temperature for id, _ in kept]
        log_P = math.log(math.fsum(map(math.exp, log_p))) if kept else 0
        log_Q = math.log(math.fsum(map(math.exp, log_q))) if kept else 0
        result.append(
            math.fsum(math.exp(a - log_P) * (a - log_P - b + log_Q) for a, b in zip(log_p, log_q, strict=True))
        )
    return np.array(result)


@settings(max_examples=150, deadline=None)
@given(inputs("log-probability", scales=(0.01, 1.0, 5.0, 60.0, 1e6)))
def test_distortion_is_the_divergence_and_within_its_bound(case):
    how, ids, logp, scalars = case
    planes, lost = pack_arrays(how, ids, logp, scalars)
    np.testing.assert_allclose(lost, independent_kl(how, ids, logp, planes), rtol=1e-2, atol=1e-6)
    assert (lost >= 0).all()
    coarse = (planes.values_nK > 192).any(axis=1)
    lowest = min(1.0, *how.temperatures)
    assert (lost[~coarse] <= (how.quantum / lowest) ** 2 / 8 * (1 + 1e-4) + 1e-6).all()


@pytest.mark.parametrize("q", [1 / 1024, 1 / 16])
def test_distortion_counts_what_is_held_at_the_largest_value(q):
    """Most of the mass lies below the reach of 696 quanta, at a temperature where it counts."""
    how, reach = Codec(5000, 1000, q, scalars=("first", "truth", 1.0, 8.0)), 696 * q
    logp = np.concatenate([[0], np.full(999, -reach - 4)])[None].astype(np.float32)
    ids, scalars = np.arange(1000)[None], {name: np.zeros(1) for name in how.scalars}
    planes, lost = pack_arrays(how, ids, logp, scalars)
    assert (planes.values_nK[0, 1:] == LARGEST).all()
    np.testing.assert_allclose(lost, independent_kl(how, ids, logp, planes), rtol=1e-4)
    assert lost[0] > 1e-4


@pytest.mark.parametrize("k", [1, 10, 100])
def test_quantum_meets_the_mean_that_it_was_chosen_for(k):
    """On rows as a trained model gives them."""
    bound, rng = 2e-4, np.random.default_rng(k)
    how = Codec(2000, k, quantum(bound))
    logits = rng.normal(0, 3, (200, 2000))
    ids = np.argsort(-logits, axis=1)[:, :k]
    logp = np.take_along_axis(logits, ids, axis=1).astype(np.float32)
    _, lost = pack_arrays(how, ids, logp, {"first": np.zeros(200), "truth": np.zeros(200)})
    assert lost.mean() <= bound


@given(st.floats(6e-8, 1.0))
def test_quantum_is_the_largest_that_is_allowed(bound):
    q = quantum(bound)
    assert q**2 / 24 <= 0.8 * bound * (1 + 1e-9) < (q + 1 / 1024) ** 2 / 24 * (1 + 2e-9)
    assert (q * 1024).is_integer()


@pytest.mark.parametrize("gap", [12, 16, 20, 30])
def test_sure_rows_keep_their_tail_at_high_temperatures(gap):
    """A near-certain first id, the others far below: at τ = 2 and 4 they have mass, and keep it within the bound."""
    rng = np.random.default_rng(gap)
    how = Codec(5000, 100, quantum(2e-4), scalars=("first", "truth", 1.0, 2.0, 4.0))
    logp = -np.concatenate([np.zeros((50, 1)), gap + rng.exponential(2, (50, 99))], axis=1).astype(np.float32)
    planes, lost = pack_arrays(how, np.tile(np.arange(100), (50, 1)), logp, dict.fromkeys(how.scalars, np.zeros(50)))
    for temperature in (1.0, 2.0, 4.0):
        assert kl_at(how, np.tile(np.arange(100), (50, 1)), logp, planes, temperature).max() <= 2e-3
    assert lost.max() <= 2e-3


def test_values_reach_as_far_as_the_format_says():
    how = Codec(300, 5, 1 / 16, scalars=("first",))
    below = np.array([[0, 12, 12.5, 43.5, 1000]], np.float32)
    planes, _ = pack_arrays(how, np.arange(5)[None], -below, {"first": np.zeros(1)})
    assert planes.values_nK.tolist() == [[0, 192, 193, 255, 255]]
    assert how.below(planes).tolist() == [[0, 12, 12.5, 43.5, 43.5]]


def test_quantum_of_an_impossible_bound():
    with pytest.raises(ValueError, match="below what the smallest quantum"):
        quantum(1e-9)
