"""A prefix of a row is its most probable ids, and the tail takes the rest."""

import math

import numpy as np
import pytest
from helpers.definition import quanta
from helpers.targets import entries, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets.codec import Codec


@settings(max_examples=150, deadline=None)
@given(inputs("log-probability"), st.integers(1, 40))
def test_prefix_is_the_most_probable_and_the_tail_takes_the_rest(case, k):
    how, ids, logp, scalars = case
    planes, _ = pack_arrays(how, ids, logp, scalars)
    before = [planes.ids().copy(), planes.values_nK.copy(), planes.scalars_Sn.copy()]
    prefix = how.prefix(planes, k)
    for old, new in zip(before, (planes.ids(), planes.values_nK, planes.scalars_Sn), strict=True):
        np.testing.assert_array_equal(old, new)
    assert prefix.ids_nK.shape[1] == min(k, how.k)
    whole, few = entries(planes), entries(prefix)
    for old, new in zip(whole, few, strict=True):
        assert new == dict(sorted(old.items(), key=lambda entry: (entry[1], entry[0]))[:k])
        assert list(new) == sorted(new)
    for name in how.scalars:
        was, now = (how.scalar(p, name).astype(float).tolist() for p in (planes, prefix))
        if isinstance(name, str):
            assert was == now
            continue
        for row in range(len(planes)):
            cut = [value for id, value in whole[row].items() if id not in few[row]]
            parts = [math.exp(was[row])] + [math.exp(-how.quantum * quanta(value) / name) for value in cut]
            expected = math.log(math.fsum(parts)) if any(parts) else -math.inf
            if expected <= -127.9:
                assert now[row] == expected or now[row] <= -127.9
            else:
                assert abs(now[row] - expected) <= 1 / 512 + 1e-4


def test_prefix_keeps_the_total_mass():
    how, rng = Codec(1000, 100, 1 / 16, scalars=("first", 1.0, 2.0)), np.random.default_rng(0)
    logits = rng.normal(0, 3, (20, 1000))
    logits -= logits.max(axis=1, keepdims=True)
    ids = np.argsort(-logits, axis=1)
    kept, rest = (np.take_along_axis(logits, part, axis=1) for part in (ids[:, :100], ids[:, 100:]))
    scalars = {"first": np.zeros(20)} | {t: np.log(np.exp(rest / t).sum(axis=1)) for t in (1, 2)}
    planes, _ = pack_arrays(how, ids[:, :100], kept.astype(np.float32), scalars)

    def mass(planes, temperature):
        weights = np.where(planes.kept(), np.exp(-how.quantum / temperature * planes.values_nK), 0).sum(axis=1)
        return weights + np.exp(how.scalar(planes, temperature))

    for temperature in (1, 2):
        whole = mass(planes, temperature)
        np.testing.assert_allclose(whole, np.exp(logits / temperature).sum(axis=1), rtol=0.02)
        for k in (99, 50, 7, 1):
            np.testing.assert_allclose(mass(how.prefix(planes, k), temperature), whole, rtol=4e-3)


def test_prefix_whose_tail_is_too_small_for_a_scalar():
    """It is held at the smallest, and does not become a large one."""
    how = Codec(300, 3, 1.0, scalars=("first", 1.0, 0.5))
    nothing = np.array([-np.inf])
    scalars = {"first": np.zeros(1), 1.0: nothing, 0.5: nothing}
    planes, _ = pack_arrays(how, np.array([[1, 2, 3]]), np.array([[0, -200, -200]], np.float32), scalars)
    prefix = how.prefix(planes, 1)
    assert [how.scalar(prefix, name).tolist() for name in how.scalars[1:]] == [[-32_767 / 256]] * 2


def test_counts_of_draws_cannot_be_shortened():
    how = Codec(300, 3, 0.0, ("first",))
    planes, _ = pack_arrays(how, np.array([[1, 2, 3]]), np.array([[1, 2, 3]]), {"first": np.zeros(1)})
    with pytest.raises(ValueError, match="cannot be shortened"):
        how.prefix(planes, 2)
    assert how.prefix(planes, 3) is planes
