"""Frames: a frame says all that was packed, and frames or codecs that do not fit are refused."""

import math

import numpy as np
import pytest
from helpers.targets import (
    FIELDS,
    assert_same,
    entries,
    inputs,
    joined,
    packed,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets import codec
from ki_ds.targets.codec import Codec


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
