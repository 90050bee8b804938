"""Packed planes: what is packed is what was given, a frame says it all, and frames that do not fit are refused."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets import codec
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.quanta import LARGEST, MINUS_INFINITY, quantum

FIELDS = ("ids_nK", "high_nK", "values_nK", "count_n", "scalars_Sn")
VOCABULARIES = (1, 2, 200, 256, 257, 65_535, 65_536, 65_537, 152_064, 1 << 24)
QUANTA = (1 / 1024, 0.0693359375, 1 / 16, 1.0)
SCALARS = (("first",), ("first", "truth"), ("first", "truth", 1.0, 2.5))


def assert_same(one, two):
    for name in FIELDS:
        left, right = getattr(one, name), getattr(two, name)
        if left is None or right is None:
            assert left is None and right is None, name
        else:
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)


def entries(planes):
    """A dict from id to value for each row."""
    rows = zip(planes.ids().tolist(), planes.values_nK.tolist(), planes.count_n.tolist(), strict=True)
    return [dict(zip(ids[:count], values[:count], strict=True)) for ids, values, count in rows]


def joined(how, planes, ends):
    """The frames of sequences whose rows end at `ends`."""
    return [b"".join(parts) for parts in how.encode(planes, np.array(ends))]


def distinct_ids(rng, rows, width, vocabulary):
    """Ids in no order; the vocabulary's first and last are among them now and then."""
    ids = np.stack([rng.choice(vocabulary, width, replace=False) for _ in range(rows)] or [np.zeros(width, int)])[:rows]
    for row in ids[::2]:
        for extreme in (0, vocabulary - 1):
            if extreme not in row:
                row[rng.integers(width)] = extreme
    return ids


def rounded(logp, precision):
    """Log-probabilities as they come from logits of a precision; float32."""
    return torch.from_numpy(logp).to(precision).float().numpy()


@st.composite
def inputs(draw, *kinds, scales=(0.01, 1.0, 5.0, 60.0)):
    """A codec and what it is to pack: ids in any order, some rows cut short, some without an entry."""
    vocabulary = draw(st.sampled_from(VOCABULARIES))
    k = min(draw(st.integers(1, 40)), vocabulary)
    width = draw(st.integers(1, k))
    kind = draw(st.sampled_from(kinds or (codec.LOG_PROBABILITY, codec.COUNT)))
    how = Codec(
        vocabulary, k, draw(st.sampled_from(QUANTA)) if kind == "log-probability" else 0.0,
        draw(st.sampled_from(SCALARS if kind == "log-probability" else ((), *SCALARS))),
    )  # fmt: skip
    rows = draw(st.integers(0, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = distinct_ids(rng, rows, width, vocabulary)
    ragged = rng.integers(0, width + 1, rows) if draw(st.booleans()) else np.full(rows, width)
    left_out = rng.permuted(np.arange(width) >= ragged[:, None], axis=1)
    if kind == "count":
        given = np.where(left_out, 0, rng.integers(1, LARGEST + 1, (rows, width)))
    else:
        precision = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
        drawn = -rng.exponential(draw(st.sampled_from(scales)), (rows, width)).astype(np.float32)
        given = np.where(left_out, -np.inf, rounded(drawn, precision)).astype(np.float32)
    scalars = {name: -rng.exponential(5, rows) for name in how.scalars}
    for nats in scalars.values():
        nats[rng.random(rows) < 0.1] = -np.inf
    return how, ids, given, scalars


def by_hand(how, data, rows):
    """(dicts from id to quanta or count, scalars as stored) of a frame, read as FORMAT.md says, number by number."""
    size = (1 + len(how.scalars)) * rows
    numbers = [
        [data[n * rows + i], data[size + n * rows + i]] for n in range(1 + len(how.scalars)) for i in range(rows)
    ]
    counts = [int.from_bytes(number, "big") for number in numbers[:rows]]
    signed = [int.from_bytes(number, "big", signed=True) for number in numbers[rows:]]
    scalars = [signed[n * rows : (n + 1) * rows] for n in range(len(how.scalars))]
    total, width = sum(counts), 3 if how.vocabulary > 65_536 else 2
    rest = data[2 * size :]
    assert len(rest) == (width + 1) * total
    found, at = [], 0
    for count in counts:
        row, id = [], 0
        for entry in range(at, at + count):
            id += sum(rest[byte * total + entry] << 8 * byte for byte in range(width))
            row.append((id, rest[width * total + entry]))
        if not how.counts:
            highest = max((value for _, value in row), default=0)
            row = [(id, highest - value) for id, value in row]
        found.append(dict(row))
        at += count
    return found, scalars


# -------------------------------------------------------------------------------------------------- frames


@settings(max_examples=150, deadline=None)
@given(inputs(), st.lists(st.integers(0, 7), max_size=4))
def test_frames_return_what_was_packed(case, cuts):
    how, ids, given_nK, scalars = case
    planes, _ = pack_arrays(how, ids, given_nK, scalars)
    ends = [*sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    rows = np.diff(ends, prepend=0).tolist()
    frames = joined(how, planes, ends)
    assert_same(how.decode(frames, rows), planes)
    one_by_one = [how.decode([data], [n]) for data, n in zip(frames, rows, strict=True)]
    assert_same(codec.concatenate(one_by_one), planes)
    assert_same(codec.concatenate([how.empty(0), *one_by_one]), planes)
    for data, n, part in zip(frames, rows, one_by_one, strict=True):
        assert len(data) == how.frame_bytes(n, int(part.count_n.sum()))
        found, stored = by_hand(how, data, n)
        assert found == entries(part)
        assert stored == part.scalars_Sn.tolist()


@settings(max_examples=60, deadline=None)
@given(inputs(), st.randoms(use_true_random=False))
def test_order_of_the_ids_given_does_not_matter(case, random):
    how, ids, given_nK, scalars = case
    other, shuffled = ids.copy(), given_nK.copy()
    for row in range(len(ids)):
        order = random.sample(range(ids.shape[1]), ids.shape[1])
        other[row], shuffled[row] = ids[row, order], given_nK[row, order]
    (one, lost), (two, also) = pack_arrays(how, ids, given_nK, scalars), pack_arrays(how, other, shuffled, scalars)
    assert_same(one, two)
    np.testing.assert_allclose(lost, also, rtol=1e-3, atol=1e-6)


def test_decoded_planes_can_be_written_to():
    """They become tensors without a copy: torch warns of memory that cannot be written to."""
    for step in (1 / 16, 0.0):
        how = Codec(70_000, 4, step)
        for width in (4, 2):
            ids, given_nK = np.arange(3 * width).reshape(3, width), np.full((3, width), 1)
            planes, _ = pack_arrays(how, ids, given_nK, {"first": np.zeros(3), "truth": np.zeros(3)})
            decoded = how.decode(joined(how, planes, [3]), [3])
            for name in FIELDS:
                assert getattr(decoded, name).flags.writeable, name


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_rows_and_concatenate_are_inverse(vocabulary):
    how, planes = packed(vocabulary, rows=11)
    parts = [planes.rows(slice(a, b)) for a, b in ((0, 3), (3, 3), (3, 10), (10, 11))]
    assert [len(part) for part in parts] == [3, 0, 7, 1]
    assert_same(codec.concatenate(parts), planes)
    assert joined(how, parts[2], [7]) == [joined(how, planes, [3, 10, 11])[1]]  # a view of rows


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_empty_rows_join_with_others(vocabulary):
    how, planes = packed(vocabulary, rows=3)
    both = codec.concatenate([how.empty(4), planes])
    assert both.count_n[:4].tolist() == [0] * 4
    assert_same(both.rows(slice(4, 7)), planes)
    assert_same(how.decode(joined(how, how.empty(4), [4]), [4]), how.empty(4))


def packed(vocabulary, rows, k=5):
    """Ragged rows of a codec."""
    how, rng = Codec(vocabulary, k, 1 / 16), np.random.default_rng(rows)
    logp = -rng.exponential(2, (rows, k)).astype(np.float32)
    logp[1::2, 3:] = -np.inf
    first = logp.max(axis=1)
    return how, pack_arrays(how, distinct_ids(rng, rows, k, vocabulary), logp, {"first": first, "truth": first - 1})[0]


# ------------------------------------------------------------------------------------------------ refusals


def frame(counts, gaps, values, scalars=2, width=2):
    """Bytes of a frame, written down as FORMAT.md has it."""
    data = b"".join(bytes(count >> shift & 0xFF for count in counts) + bytes(scalars * len(counts)) for shift in (8, 0))
    data += b"".join(bytes(gap >> 8 * byte & 0xFF for gap in gaps) for byte in range(width))
    return data + bytes(values)


@pytest.mark.parametrize("vocabulary", [300, 70_000])
@pytest.mark.parametrize("change", [-1, 1, 3, 4, 100])
def test_frame_of_another_length_is_refused(vocabulary, change):
    how, planes = packed(vocabulary, rows=4)
    (data,) = joined(how, planes, [4])
    other = data[:change] if change < 0 else data + b"\0" * change
    with pytest.raises(ValueError, match=r"do not make a frame of 4 rows|do not sum"):
        how.decode([other], [4])
    with pytest.raises(ValueError, match="do not make a frame of 4 rows"):
        how.decode([data[:5]], [4])  # less than the counts


@pytest.mark.parametrize(
    ("vocabulary", "k", "counts", "gaps", "message"),
    [
        (300, 2, [3], [1, 1, 1], "a row has 3 entries, more than K = 2"),
        (300, 3, [1, 3], [1, 1, 1], "do not sum to its 3 entries"),
        (300, 3, [1, 1], [1, 1, 1], "do not sum to its 3 entries"),
        (300, 3, [65_535, 4], [1, 1, 1], "do not sum to its 3 entries"),  # but they do in 16 bits
        (300, 2, [2], [7, 0], "do not rise"),
        (300, 3, [2], [7, 0], "do not rise"),
        (300, 3, [3], [0, 0, 5], "do not rise"),
        (300, 2, [2], [7, 293], "an id of 300 in a vocabulary of 300"),
        (300, 3, [2], [7, 293], "an id of 300 in a vocabulary of 300"),
        (300, 3, [3, 1, 1], [1, 1, 1, 300, 1], "an id of 300 in a vocabulary of 300"),
        (300, 1, [1], [65_535], "an id of 65535 in a vocabulary of 300"),
        (300, 2, [2], [7, 65_535], "an id of"),  # 6 in 16 bits
        (65_536, 2, [2], [65_535, 1], "an id of"),  # 0 in 16 bits
        (65_536, 3, [2], [40_000, 65_535], "an id of"),
        (65_537, 2, [2], [65_536, 1], "an id of 65537 in a vocabulary of 65537"),
        (1 << 24, 2, [2], [(1 << 24) - 1, 1], "an id of 16777216 in a vocabulary of 16777216"),
        (1 << 24, 300, [258], [(1 << 24) - 1] * 257 + [258], "an id of"),  # 1 in 32 bits
        (1 << 24, 258, [258], [(1 << 24) - 1] * 257 + [258], "an id of"),
    ],
)
def test_rows_that_no_writer_gives_are_refused(vocabulary, k, counts, gaps, message):
    how, width = Codec(vocabulary, k, 1 / 16), 3 if vocabulary > 1 << 16 else 2
    data = frame(counts, gaps, bytes(len(gaps)), width=width)
    good = frame([1], [vocabulary - 1], [0], width=width)
    assert entries(how.decode([good], [1])) == [{vocabulary - 1: 0}]  # the builder itself makes frames
    for frames, rows in (([data], [len(counts)]), ([good, data, good], [1, len(counts), 1])):
        with pytest.raises(ValueError, match=message):
            how.decode(frames, rows)


def test_heights_that_do_not_begin_at_zero_are_read():
    """A stranger's writer may leave a gap below: only differences count."""
    how = Codec(300, 3, 1 / 16)
    assert entries(how.decode([frame([3, 2], [5, 1, 1, 9, 9], [9, 20, 7, 255, 0])], [2])) == [
        {5: 11, 6: 0, 7: 13}, {9: 0, 18: 255}
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": 0}, {"vocabulary": (1 << 24) + 1}, {"vocabulary": "300"}, {"vocabulary": True},
        {"vocabulary": 10**400}, {"vocabulary": 4}, {"k": 0}, {"k": 1025, "vocabulary": 5000}, {"k": 2.0}, {"k": -1},
        {"quantum": 0}, {"quantum": -0.5}, {"quantum": 1.5}, {"quantum": "0.5"}, {"quantum": True}, {"quantum": None},
        {"quantum": 10**400}, {"quantum": math.nan}, {"quantum": math.inf}, {"values": "count"},
        {"values": "logit", "quantum": 0}, {"values": ["count"], "quantum": 0}, {"values": None},
        {"scalars": "first"}, {"scalars": None}, {"scalars": ["first", 1]}, {"scalars": ["first", ["a"]]},
        {"scalars": []}, {"scalars": ["truth"]}, {"scalars": ["first", "first"]}, {"scalars": ["first", "tail@"]},
        {"scalars": ["first", "tail@0"]}, {"scalars": ["first", "tail@nan"]}, {"scalars": ["first", "tail@one"]},
        {"scalars": ["first", *(f"a{n}" for n in range(64))]}, {"more": 1},
    ],
)  # fmt: skip
def test_header_that_is_no_codec(change):
    said = Codec(300, 5, 1 / 16).record
    assert Codec.read(said) == Codec(300, 5, 1 / 16)
    with pytest.raises(ValueError):
        Codec.read({**said, **change})
    for name in change.keys() & said.keys():
        with pytest.raises(ValueError, match="expected the keys"):
            Codec.read({key: value for key, value in said.items() if key != name})


@pytest.mark.parametrize("said", [None, [], 3, "codec", {}])
def test_codec_that_is_no_object(said):
    with pytest.raises(ValueError, match="expected the keys"):
        Codec.read(said)


@settings(max_examples=30, deadline=None)
@given(inputs())
def test_codec_survives_its_header(case):
    assert Codec.read(case[0].record) == case[0]


# ---------------------------------------------------------------------------------------------------- pack


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


# ---------------------------------------------------------------------------------------------- distortion


def quanta(value):
    """FORMAT.md's D(v) / q."""
    return value + 7 * max(value - 192, 0)


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


# -------------------------------------------------------------------------------------------------- prefix


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


# ------------------------------------------------------------------------------------------------- imports


def test_reading_and_writing_do_not_need_torch():
    """Whoever only looks at targets, a data loader's worker for one, does not wait for torch."""
    names = "ki_ds.sealed, ki_ds.targets.manifest, ki_ds.targets.spec, ki_ds.targets.shard"
    code = f"import sys, {names}; print([n for n in ('torch', 'fsspec', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_planes_have_the_fields_that_are_compared_here():
    assert tuple(Planes.__dataclass_fields__) == FIELDS
