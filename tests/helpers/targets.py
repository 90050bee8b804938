"""Targets to be packed, and how packed ones are compared."""

import numpy as np
import torch
from hypothesis import strategies as st

from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets import codec
from ki_ds.targets.codec import Codec
from ki_ds.targets.quanta import LARGEST

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


def packed(vocabulary, rows, k=5):
    """Ragged rows of a codec."""
    how, rng = Codec(vocabulary, k, 1 / 16), np.random.default_rng(rows)
    logp = -rng.exponential(2, (rows, k)).astype(np.float32)
    logp[1::2, 3:] = -np.inf
    first = logp.max(axis=1)
    return how, pack_arrays(how, distinct_ids(rng, rows, k, vocabulary), logp, {"first": first, "truth": first - 1})[0]
