"""The choice of the top K: against a naive sort by (-logit, id), with ties everywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.targets.select import top_k

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def naive(logits, k):
    """Ids of each row by falling logit, then rising id, in Python."""
    return [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in logits.double().tolist()]


def naive_logp(logits, ids):
    """Log-probabilities of the given ids, in Python floats."""
    result = []
    for row, chosen in zip(logits.double().tolist(), ids, strict=True):
        normaliser = math.log(math.fsum(math.exp(z) for z in row))
        result.append([row[i] - normaliser for i in chosen])
    return result


@st.composite
def tied_logits(draw):
    """Integer logits from a narrow range, so that most rows have ties; and a K."""
    vocabulary = draw(st.integers(1, 24))
    rows = draw(st.integers(1, 5))
    spread = draw(st.sampled_from([0, 1, 3, 40]))
    values = draw(st.lists(st.integers(-spread, spread), min_size=rows * vocabulary, max_size=rows * vocabulary))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.tensor(values, dtype=dtype).view(rows, vocabulary), draw(st.integers(1, vocabulary))


@settings(max_examples=120, deadline=None)
@given(tied_logits())
def test_order_is_by_falling_logit_then_rising_id(case):
    logits, k = case
    ids, logp, normaliser = top_k(logits, k)
    assert ids.tolist() == naive(logits, k)
    torch.testing.assert_close(
        logp.double(), torch.tensor(naive_logp(logits, ids.tolist())).double(), rtol=0, atol=2e-5
    )
    torch.testing.assert_close(normaliser.double(), logits.double().logsumexp(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_tie_across_the_boundary_keeps_the_lowest_ids(dtype, k):
    logits = torch.tensor([[0, 2, 1, 2, 2, 1], [5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6]], dtype=dtype)
    assert top_k(logits, k)[0].tolist() == [[1, 3, 4, 2, 5, 0][:k], [0, 1, 2, 3, 4, 5][:k], [5, 4, 3, 2, 1, 0][:k]]


def test_large_vocabulary_with_ties_at_the_boundary():
    """topk itself takes arbitrary ids of equal values only on rows that are long enough."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (8, 20_000), generator=generator).float()
    assert top_k(logits, 100)[0].tolist() == naive(logits, 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_tie_after_rounding(dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(6, 3000, generator=generator) * 4).to(dtype)
    ids, logp, _ = top_k(logits, 50)
    assert ids.tolist() == naive(logits, 50)
    assert logp.dtype == torch.float32  # not rounded to the input's precision
    torch.testing.assert_close(
        logp.double(), torch.tensor(naive_logp(logits, ids.tolist())).double(), rtol=0, atol=1e-5
    )


def test_k_equals_vocabulary_gives_the_whole_distribution():
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(2))
    ids, logp, _ = top_k(logits, 37)
    assert torch.equal(ids.sort(1).values, torch.arange(37).expand(4, -1))
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(4))


def test_k_is_one():
    logits = torch.tensor([[1.0, 3.0, 3.0]])
    ids, logp, _ = top_k(logits, 1)
    assert ids.tolist() == [[1]]
    assert logp.item() == pytest.approx(-math.log(2 + math.exp(-2)), abs=1e-6)


def test_impossible_tokens_come_last_by_rising_id():
    inf = math.inf
    logits = torch.tensor([[-inf, 1.0, -inf, 1.0, -inf], [-inf, -inf, -inf, -inf, 0.0]])
    ids, logp, normaliser = top_k(logits, 4)
    assert ids.tolist() == [[1, 3, 0, 2], [4, 0, 1, 2]]
    assert logp[0, :2].tolist() == pytest.approx([-math.log(2)] * 2)
    assert logp[1, 0].item() == 0
    assert (logp[0, 2:] == -inf).all()
    assert (logp[1, 1:] == -inf).all()
    assert normaliser.tolist() == pytest.approx([1 + math.log(2), 0])


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[60000.0, 59999.0, -60000.0]], dtype=torch.float32)
    _, logp, _ = top_k(logits, 3)
    torch.testing.assert_close(logp[0, :2], torch.tensor([0.0, -1.0]).log_softmax(0), rtol=0, atol=5e-3)  # ulp at 6e4
    assert torch.isfinite(logp).all()


def test_no_rows():
    ids, logp, normaliser = top_k(torch.zeros(0, 9), 3)
    assert (ids.shape, logp.shape, normaliser.shape) == ((0, 3), (0, 3), (0,))
    assert ids.dtype == torch.int64


def test_inputs_unchanged():
    logits = torch.randint(-2, 3, (5, 40), generator=torch.Generator().manual_seed(3)).float()
    before = logits.clone()
    top_k(logits, 7)
    assert torch.equal(logits, before)
