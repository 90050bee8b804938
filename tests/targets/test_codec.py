"""Packed planes: quantisation within its bound, a lossless frame, and the layout pinned by bytes written by hand."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.targets import codec
from ki_ds.targets.codec import LARGEST_STEP, QUANTUM, Planes

VOCABULARIES = (300, 65_535, 65_536, 65_537, 152_064, 1 << 24)
FIELDS = ("ids_nK", "high_nK", "steps_nK", "count_n", "first_n", "truth_n")


def assert_same(one, two):
    for name in FIELDS:
        left, right = getattr(one, name), getattr(two, name)
        if left is None or right is None:
            assert left is None and right is None, name
        else:
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)


def whole_ids(planes):
    ids = planes.ids_nK.astype(np.int64)
    return ids if planes.high_nK is None else ids | (planes.high_nK.astype(np.int64) << 16)


def random_planes(rows, k, vocabulary, seed):
    """Planes as `pack` could give them, counts 0 included: zero beyond the count, steps rising."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, k + 1, rows).astype(np.uint16)
    kept = np.arange(k) < count[:, None]
    ids = np.where(kept, rng.integers(0, vocabulary, (rows, k)), 0)
    steps = np.where(kept, np.sort(rng.integers(0, 256, (rows, k)), axis=1), 0).astype(np.uint8)
    high = (ids >> 16).astype(np.uint8) if vocabulary > 1 << 16 else None
    first, truth = (-rng.exponential(3, rows).astype(np.float32) for _ in range(2))
    return Planes((ids & 0xFFFF).astype(np.uint16), high, steps, count, first, truth)


def teacher_rows(rows, vocabulary, k, seed, scale=3.0):
    """Ids and log-probabilities of the top K of softmax(normal logits), as a trained model's predictions look."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (rows, vocabulary))
    logits[:, rng.integers(0, vocabulary)] += 4
    logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logp, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logp, ids, axis=1).astype(np.float32), logp[:, 0].astype(np.float32)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 9), st.integers(1, 130), st.sampled_from(VOCABULARIES), st.integers(0, 2**32))
def test_frame_round_trip(rows, k, vocabulary, seed):
    planes = random_planes(rows, k, vocabulary, seed)
    data = codec.encode(planes)
    assert len(data) == codec.frame_bytes(rows, k, vocabulary)
    assert_same(codec.decode(data, rows, k, vocabulary), planes)


def test_steps_that_fall_survive_the_differences():
    """Differences are modulo 256, so that order is not needed for a lossless frame."""
    planes = random_planes(1, 4, 300, 0)
    falling = Planes(planes.ids_nK, None, np.array([[200, 3, 255, 0]], np.uint8), *[planes.count_n] * 1,
                     planes.first_n, planes.truth_n)  # fmt: skip
    assert codec.decode(codec.encode(falling), 1, 4, 300).steps_nK.tolist() == [[200, 3, 255, 0]]


def test_decoded_planes_are_writable_and_hold_no_frame_bytes():
    planes = codec.decode(codec.encode(random_planes(3, 4, 70_000, 1)), 3, 4, 70_000)
    for name in FIELDS:
        assert getattr(planes, name).flags.writeable, name


def test_golden_frame():
    """Two rows, K = 3, a vocabulary that needs three bytes an id; the second row keeps one entry."""
    ids = np.array([[0x012345, 0x00ABCD, 7], [0x0100FF, 9, 9]])
    logp = np.array([[-0.5, -0.75, -17.0], [-0.125, -np.inf, -np.inf]], np.float32)
    planes = codec.pack(ids, logp, np.array([-2.0, -0.125], np.float32), 1 << 17)
    golden = bytes.fromhex(
        "0300 0100"  # counts
        "000000bf 000000be"  # first: -0.5, -0.125
        "000000c0 000000be"  # truth: -2, -0.125
        "45 cd 07  ff 00 00"  # low bytes
        "23 ab 00  00 00 00"  # high bytes
        "01 00 00  01 00 00"  # third bytes
        "00 04 fb  00 00 00"  # steps 0, 4, 255 as differences
    )
    assert codec.encode(planes) == golden
    decoded = codec.decode(golden, 2, 3, 1 << 17)
    assert whole_ids(decoded).tolist() == [[0x012345, 0x00ABCD, 7], [0x0100FF, 0, 0]]
    assert decoded.steps_nK.tolist() == [[0, 4, 255], [0, 0, 0]]
    assert decoded.count_n.tolist() == [3, 1]
    assert decoded.first_n.tolist() == [-0.5, -0.125] and decoded.truth_n.tolist() == [-2.0, -0.125]


def test_golden_frame_without_third_bytes():
    planes = codec.pack(np.array([[0xFFFF, 1]]), np.array([[-1.0, -1.0625]], np.float32), np.array([-1.0]), 1 << 16)
    assert planes.high_nK is None
    assert codec.encode(planes) == bytes.fromhex("0200 000080bf 000080bf ff01 ff00 0001")


@pytest.mark.parametrize("vocabulary", [300, 70_000])
@pytest.mark.parametrize("change", [-1, 1, 100])
def test_decode_refuses_another_length(vocabulary, change):
    data = codec.encode(random_planes(4, 5, vocabulary, 2))
    other = data[:change] if change < 0 else data + b"\0" * change
    with pytest.raises(ValueError, match=rf"takes {len(data)} bytes, found {len(other)}"):
        codec.decode(other, 4, 5, vocabulary)


def test_decode_refuses_a_count_above_k():
    data = bytearray(codec.encode(random_planes(2, 5, 300, 3)))
    data[2:4] = (6).to_bytes(2, "little")
    with pytest.raises(ValueError, match="more than K = 5"):
        codec.decode(bytes(data), 2, 5, 300)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 40), min_size=1, max_size=40), st.floats(-30, 0, width=32))
def test_quantisation_is_within_half_a_quantum(gaps, top):
    logp = np.sort(top - np.array([0.0, *gaps]))[::-1].astype(np.float32)[None, :]
    ids = np.arange(logp.shape[1])[None, :]
    planes = codec.pack(ids, logp, np.zeros(1), 300)
    below = (logp[0, 0] - logp[0]).astype(np.float64)
    decoded = QUANTUM * planes.steps_nK[0].astype(np.float64)
    held = below > QUANTUM * (LARGEST_STEP + 0.5)
    assert (np.abs(decoded - below)[~held] <= QUANTUM / 2 + 1e-5).all()
    assert (planes.steps_nK[0][held] == LARGEST_STEP).all()
    assert planes.steps_nK[0, 0] == 0
    assert planes.first_n[0] == logp[0, 0]
    assert planes.count_n[0] == logp.shape[1]


def test_impossible_entries_are_dropped():
    inf = np.inf
    ids = np.array([[70_001, 5, 70_003], [4, 70_002, 6], [7, 8, 9]])
    logp = np.array([[-0.5, -1.0, -inf], [0.0, -inf, -inf], [-inf, -inf, -inf]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planes = codec.pack(ids, logp, np.zeros(3), 100_000)
        lost = codec.distortion(logp, planes)
    assert planes.count_n.tolist() == [2, 1, 0]
    assert whole_ids(planes).tolist() == [[70_001, 5, 0], [4, 0, 0], [0, 0, 0]]
    assert planes.steps_nK.tolist() == [[0, 8, 0], [0, 0, 0], [0, 0, 0]]
    assert lost[1:].tolist() == [0, 0]
    assert np.isfinite(lost).all()


def independent_kl(logp, planes):
    """KL over the kept entries, in Python floats."""
    result = []
    for row, steps, count in zip(logp.tolist(), planes.steps_nK.tolist(), planes.count_n.tolist(), strict=True):
        p = [math.exp(v) for v in row[:count]]
        q = [math.exp(-QUANTUM * s) for s in steps[:count]]
        p, q = [v / math.fsum(p) for v in p], [v / math.fsum(q) for v in q]
        result.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return result


@pytest.mark.parametrize(("k", "scale"), [(1, 3.0), (10, 1.0), (50, 3.0), (100, 3.0), (100, 1.5)])
def test_distortion_is_the_divergence_and_small(k, scale):
    ids, logp, truth = teacher_rows(60, 2000, k, seed=k, scale=scale)
    planes = codec.pack(ids, logp, truth, 2000)
    lost = codec.distortion(logp, planes)
    np.testing.assert_allclose(lost, independent_kl(logp, planes), rtol=1e-6, atol=1e-9)
    assert lost.min() >= -1e-12
    assert lost.mean() <= 2e-4


def test_distortion_counts_what_is_held_at_the_largest_step():
    logp = np.array([[-1e-9, -20.0]], np.float32)
    planes = codec.pack(np.array([[1, 2]]), logp, np.zeros(1), 300)
    assert planes.steps_nK[0, 1] == LARGEST_STEP
    np.testing.assert_allclose(codec.distortion(logp, planes), independent_kl(logp, planes), rtol=1e-3)
    assert codec.distortion(logp, planes)[0] > 0


@pytest.mark.parametrize("vocabulary", [2000, 100_000])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_prefix_is_what_a_smaller_k_would_have_given(vocabulary, k):
    ids, logp, truth = teacher_rows(8, 2000, 30, seed=4)
    ids = ids + (vocabulary - 2000)
    logp[2, 3:] = -np.inf
    logp[3, :] = -np.inf
    prefix = codec.pack(ids, logp, truth, vocabulary).prefix(k)
    smaller = codec.pack(ids[:, :k], logp[:, :k], truth, vocabulary)
    assert_same(prefix, smaller)
    assert codec.encode(prefix) == codec.encode(smaller)  # a view of columns, not contiguous


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_rows_and_concatenate_are_inverse(vocabulary):
    planes = random_planes(11, 6, vocabulary, 5)
    parts = [planes.rows(slice(a, b)) for a, b in ((0, 3), (3, 3), (3, 10), (10, 11))]
    assert [len(part) for part in parts] == [3, 0, 7, 1]
    assert_same(codec.concatenate(parts), planes)
    assert codec.encode(parts[2]) == codec.encode(random_planes(11, 6, vocabulary, 5).rows(slice(3, 10)))


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_empty_rows_have_no_target_and_join_with_others(vocabulary):
    blank, planes = codec.empty(4, 6, vocabulary), random_planes(3, 6, vocabulary, 6)
    both = codec.concatenate([blank, planes])
    assert both.count_n[:4].tolist() == [0] * 4
    assert_same(both.rows(slice(4, 7)), planes)
    assert_same(codec.decode(codec.encode(blank), 4, 6, vocabulary), blank)


def test_pack_leaves_its_inputs_alone():
    ids, logp, truth = teacher_rows(5, 300, 9, seed=7)
    before = ids.copy(), logp.copy(), truth.copy()
    codec.pack(ids, logp, truth, 300)
    for one, two in zip((ids, logp, truth), before, strict=True):
        np.testing.assert_array_equal(one, two)
