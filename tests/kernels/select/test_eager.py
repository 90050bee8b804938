"""What is kept of a prediction: each kind against a naive version in float64, with ties and impossible ids everywhere.

M rows, V vocabulary, K kept ids or draws.
"""

import math

import numpy as np
import pytest
import torch
from helpers.loss_problems import Largest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.kernels import select_targets
from ki_ds.kernels.select import eager as kernel_select
from ki_ds.kernels.select.eager import draw, nucleus, select
from ki_ds.targets.scalars import scalars_of
from ki_ds.targets.selection import Selection

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
INF = math.inf


def naive_order(logits):
    """Ids of each row by falling logit, then rising id, in Python."""
    return [sorted(range(len(row)), key=lambda i: (-row[i], i)) for row in logits.double().tolist()]


def top(logits, k, **more):
    return select(logits, torch.zeros(len(logits), dtype=torch.int64), Selection("top_k", k), **more)


def logp(found):
    """Log-probabilities of the kept ids."""
    return found.given_NK + found.scalars["first"][:, None]


def normal(rows, vocabulary, seed, scale=3.0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def random(rows, draws, seed):
    return torch.rand(rows, draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def tied_logits(draw):
    """Integer logits from a narrow range, so that most rows have ties, some of them -inf; and a K."""
    vocabulary = draw(st.integers(1, 24))
    rows = draw(st.integers(1, 5))
    spread = draw(st.sampled_from([0, 1, 3, 40]))
    value = st.integers(-spread, spread) | st.just(-INF) if draw(st.booleans()) else st.integers(-spread, spread)
    values = draw(st.lists(value, min_size=rows * vocabulary, max_size=rows * vocabulary))
    logits = torch.tensor(values, dtype=draw(st.sampled_from(DTYPES))).view(rows, vocabulary)
    logits[:, draw(st.integers(0, vocabulary - 1))] = spread  # a row is never impossible throughout
    return logits, draw(st.integers(1, vocabulary))


# ------------------------------------------------------------------------------------------------------------ top K


@settings(max_examples=100, deadline=None)
@given(tied_logits())
def test_order_is_by_falling_logit_then_rising_id(case):
    logits, k = case
    found = top(logits, k)
    assert found.ids_NK.tolist() == [row[:k] for row in naive_order(logits)]
    expected = logits.double().log_softmax(dim=1).gather(1, found.ids_NK)
    torch.testing.assert_close(logp(found).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_tie_across_the_boundary_keeps_the_lowest_ids(dtype, k):
    logits = torch.tensor([[0, 2, 1, 2, 2, 1], [5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6]], dtype=dtype)
    assert top(logits, k).ids_NK.tolist() == [[1, 3, 4, 2, 5, 0][:k], [0, 1, 2, 3, 4, 5][:k], [5, 4, 3, 2, 1, 0][:k]]


def test_large_vocabulary_with_ties_at_the_boundary():
    """topk itself takes arbitrary ids of equal values only on rows that are long enough."""
    logits = torch.randint(-3, 4, (8, 20_000), generator=torch.Generator().manual_seed(0)).float()
    assert top(logits, 100).ids_NK.tolist() == [row[:100] for row in naive_order(logits)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_tie_after_rounding(dtype):
    logits = normal(6, 3000, 1, 4).to(dtype)
    found = top(logits, 50)
    assert found.ids_NK.tolist() == [row[:50] for row in naive_order(logits)]
    assert found.given_NK.dtype == torch.float32  # not rounded to the input's precision
    expected = logits.double().log_softmax(dim=1).gather(1, found.ids_NK)
    torch.testing.assert_close(logp(found).double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("k", [37, 38, 1000])
def test_k_at_or_above_the_vocabulary_gives_the_whole_distribution(k):
    found = top(normal(4, 37, 2), k, temperatures=TEMPERATURES)
    assert torch.equal(found.ids_NK.sort(1).values, torch.arange(37).expand(4, -1))
    torch.testing.assert_close(logp(found).exp().sum(1), torch.ones(4))
    assert all((found.scalars[t] == -INF).all() for t in TEMPERATURES)


def test_k_is_one():
    found = top(torch.tensor([[1.0, 3.0, 3.0]]), 1)
    assert found.ids_NK.tolist() == [[1]]
    assert logp(found).item() == pytest.approx(-math.log(2 + math.exp(-2)), abs=1e-6)


def test_impossible_tokens_come_last_by_rising_id():
    found = top(torch.tensor([[-INF, 1.0, -INF, 1.0, -INF], [-INF, -INF, -INF, -INF, 0.0]]), 4)
    assert found.ids_NK.tolist() == [[1, 3, 0, 2], [4, 0, 1, 2]]
    assert logp(found)[0, :2].tolist() == pytest.approx([-math.log(2)] * 2)
    assert logp(found)[1, 0] == 0
    assert (found.given_NK[0, 2:] == -INF).all() and (found.given_NK[1, 1:] == -INF).all()


@pytest.mark.parametrize("kind", ["top_k", "top_p", "sampled"])
def test_rows_of_which_all_but_a_few_ids_are_impossible(kind):
    """A constrained decoder's mask: no scalar becomes NaN, and no impossible id is kept."""
    logits = torch.full((3, 500), -INF)
    logits[0, [7, 400]] = torch.tensor([0.0, 1.0])
    logits[1, 499] = -4.0
    logits[2, [0, 250, 499]] = 1e4
    labels = torch.tensor([7, 499, 250])
    found = select(logits, labels, Selection(kind, 10, p=0.9999), TEMPERATURES, random(3, 10, 0))
    holds = found.given_NK > 0 if kind == "sampled" else found.given_NK > -INF
    assert torch.isfinite(logits.gather(1, found.ids_NK)[holds]).all()
    if kind != "sampled":
        assert holds.sum(1).tolist() == [2, 1, 3]
        assert all((found.scalars[t] == -INF).all() for t in TEMPERATURES)
    truth = [-math.log1p(math.e), 0, -math.log(3)]
    assert found.scalars["truth"].tolist() == pytest.approx(truth, abs=1e-3)  # one ulp at 1e4


def test_large_logits_do_not_overflow():
    found = top(torch.tensor([[60000.0, 59999.0, -60000.0]]), 3)
    torch.testing.assert_close(logp(found)[0, :2], torch.tensor([0.0, -1.0]).log_softmax(0), rtol=0, atol=1e-6)
    assert torch.isfinite(found.given_NK).all()


@pytest.mark.parametrize("kind", ["top_k", "top_p", "sampled"])
def test_no_rows(kind):
    found = select(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), Selection(kind, 3, 0.5), (2,), random(0, 3, 0))
    assert (found.ids_NK.shape, found.given_NK.shape) == ((0, 3), (0, 3))
    assert found.ids_NK.dtype == torch.int64
    assert set(found.scalars) == set(scalars_of(Selection(kind, 3), (2,)))
    assert all(x.shape == (0,) for x in found.scalars.values())


@pytest.mark.parametrize("kind", ["top_k", "top_p", "sampled"])
def test_inputs_unchanged_and_results_repeat(kind):
    logits = torch.randint(-2, 3, (5, 40), generator=torch.Generator().manual_seed(3)).float()
    labels, numbers, before = torch.arange(5), random(5, 7, 0), logits.clone()
    kept = numbers.clone()
    one, two = (select(logits, labels, Selection(kind, 7, 0.5, 2.0), (2.0,), numbers) for _ in range(2))
    assert torch.equal(logits, before) and torch.equal(numbers, kept)
    assert torch.equal(one.ids_NK, two.ids_NK) and torch.equal(one.given_NK, two.given_NK)
    assert all(torch.equal(one.scalars[name], two.scalars[name]) for name in one.scalars)


@pytest.mark.parametrize("kind", ["top_k", "top_p", "sampled"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_batch_split_decides_nothing(kind, size):
    logits, labels, numbers = normal(20, 300, 4), torch.arange(20), random(20, 12, 1)
    how = Selection(kind, 12, 0.8, 2.0)
    whole = select(logits, labels, how, TEMPERATURES, numbers)
    for start in range(0, 20, size):
        here = slice(start, start + size)
        part = select(logits[here], labels[here], how, TEMPERATURES, numbers[here])
        assert torch.equal(part.ids_NK, whole.ids_NK[here]) and torch.equal(part.given_NK, whole.given_NK[here])
        assert all(torch.equal(part.scalars[name], whole.scalars[name][here]) for name in whole.scalars)


# ------------------------------------------------------------------------------------------------------------ scalars


def naive_tail(logits, kept, temperature):
    """log Σ exp((z_v - z_first) / τ) over the ids that are not kept, in float64, smallest first."""
    row = np.sort(np.delete(logits.double().numpy(), kept)) - float(logits.max())
    with np.errstate(divide="ignore"):
        return float(np.logaddexp.reduce(row / temperature)) if len(row) else -INF


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_scalars_against_float64(kind, scale):
    logits, labels = normal(12, 400, 5, scale), torch.randint(0, 400, (12,), generator=torch.Generator().manual_seed(6))
    found = select(logits, labels, Selection(kind, 20, 0.7), TEMPERATURES)
    expected = logits.double().log_softmax(1)
    ulp = 2e-7 * float(logits.abs().max()) + 5e-7
    torch.testing.assert_close(found.scalars["first"].double(), expected.amax(1), rtol=0, atol=ulp)
    torch.testing.assert_close(found.scalars["truth"].double(), expected[range(12), labels], rtol=0, atol=ulp)
    assert tuple(found.scalars) == scalars_of(Selection(kind, 20), TEMPERATURES)
    for n in range(12):
        kept = found.ids_NK[n][found.given_NK[n] > -INF].numpy()
        for temperature in TEMPERATURES:
            tail = found.scalars[temperature][n].item()
            # relative precision of a tail's weight is the absolute one of its logarithm
            naive, about = naive_tail(logits[n], kept, temperature), 2 * ulp / min(temperature, 1)
            assert tail == pytest.approx(naive, abs=about) if naive > -87 else tail < -86  # fp32 ends there


def test_truth_is_at_temperature_one_beside_sampled_targets():
    logits, labels = normal(6, 50, 7), torch.arange(6)
    found = select(logits, labels, Selection("sampled", 5, temperature=4.0), TEMPERATURES, random(6, 5, 2))
    assert tuple(found.scalars) == scalars_of(Selection("sampled", 5), TEMPERATURES)
    expected = logits.log_softmax(1)[range(6), labels]
    torch.testing.assert_close(found.scalars["truth"], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_tail_of_a_billionth_keeps_its_relative_precision(temperature):
    """1 - Σ p_kept would give 0 or rounding noise; and at another τ nothing can be recovered from it at all."""
    g = torch.Generator().manual_seed(8)
    logits = torch.cat([torch.randn(4, 10, generator=g), torch.randn(4, 3000, generator=g) - 30], dim=1)
    found = top(logits, 10, temperatures=TEMPERATURES)
    mass = logits.double().softmax(1)[:, 10:].sum(1)
    assert (mass < 1e-9).all()
    for n in range(4):
        tail = found.scalars[temperature][n].double().item()
        expected = naive_tail(logits[n], range(10), temperature)
        assert math.expm1(tail - expected) == pytest.approx(0, abs=2e-5)
    logp_first = logits.double().log_softmax(1).amax(1)
    torch.testing.assert_close((found.scalars[1.0].double() + logp_first).exp(), mass, rtol=1e-5, atol=0)


def test_kept_and_tail_weights_make_the_tempered_distribution():
    """What the tail is stored for: at any of its temperatures, exp(logp / τ) and it sum to the normaliser."""
    logits = normal(5, 200, 9)
    found = top(logits, 15, temperatures=TEMPERATURES)
    for temperature in TEMPERATURES:
        below = found.given_NK.double() / temperature
        total = below.exp().sum(1) + found.scalars[temperature].double().exp()
        expected = (logits.double() / temperature).softmax(1).gather(1, found.ids_NK)
        torch.testing.assert_close(below.exp() / total[:, None], expected, rtol=2e-5, atol=0)


# ------------------------------------------------------------------------------------------------------------ top p


@settings(max_examples=150, deadline=None)
@given(
    case=tied_logits(),
    p=st.floats(1e-3, 1.0) | st.sampled_from([0.25, 0.5, 0.75, 1.0]),
)
def test_top_p_is_the_smallest_set_that_reaches_p(case, p):
    logits, k = case
    found = select(logits, torch.zeros(len(logits), dtype=torch.int64), Selection("top_p", k, p), TEMPERATURES)
    probabilities = logits.double().softmax(1)
    for n, order in enumerate(naive_order(logits)):
        kept = int((found.given_NK[n] > -INF).sum())
        possible = min(k, int((probabilities[n] > 0).sum()))
        assert 1 <= kept <= possible
        assert (found.given_NK[n, :kept] > -INF).all()
        assert found.ids_NK[n, :kept].tolist() == order[:kept]
        mass = probabilities[n, order].cumsum(0)
        # 1e-6: the log-probabilities are fp32, so that a set may miss or pass p by their rounding
        assert kept == possible or mass[kept - 1] >= p - 1e-6
        assert kept == 1 or p == 1 or mass[kept - 2] < p + 1e-6


def test_top_p_of_one_keeps_k_ids_although_rounded_sums_reach_one_early():
    logits = torch.tensor([[20.0, 0.0, -1.0, -2.0, -3.0], [100.0, 0.0, 0.0, 0.0, 0.0]])
    found = select(logits, torch.zeros(2, dtype=torch.int64), Selection("top_p", 4, 1.0))
    assert found.ids_NK.tolist() == [[0, 1, 2, 3]] * 2 and (found.given_NK > -INF).all()


def test_top_p_sums_in_more_than_fp32():
    """A thousand equal ids behind a likely one: each adds a sixtieth of a unit of fp32's last place to the sum."""
    mass = torch.cat([torch.tensor([0.99], dtype=torch.float64), torch.full((1000,), 1e-9, dtype=torch.float64)])
    kept = torch.isfinite(nucleus(mass.log().float()[None], 0.99 + 5e-7))
    assert kept.sum().item() == pytest.approx(501, abs=2)


def test_top_p_stops_at_the_id_that_reaches_p_exactly():
    logp = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for kept, p in enumerate(logp[0].double().exp().cumsum(0).tolist()[:3], 1):
        assert int(torch.isfinite(nucleus(logp, p)).sum()) == kept


def test_what_top_p_leaves_out_of_its_k_belongs_to_the_tail():
    found = select(
        torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]]), torch.tensor([0]), Selection("top_p", 4, 0.6), TEMPERATURES
    )
    assert (found.given_NK > -INF).tolist() == [[True, False, False, False]]
    for temperature in TEMPERATURES:
        expected = math.log(sum(math.exp(-i / temperature) for i in (1, 2, 3, 4)))
        assert found.scalars[temperature].item() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ sampled


@settings(max_examples=80, deadline=None)
@given(tied_logits(), st.integers(1, 255), st.integers(0, 1 << 30), st.sampled_from(TEMPERATURES))
def test_counts_sum_to_the_draws_over_distinct_rising_possible_ids(case, draws, seed, temperature):
    logits, _ = case
    numbers = random(len(logits), draws, seed)
    numbers[:, 0] = 0.0
    numbers[:, -1] = 1 - 2.0**-53  # the ends of the interval
    how = Selection("sampled", draws, temperature=temperature)
    found = select(logits, torch.zeros(len(logits), dtype=torch.int64), how, (), numbers)
    assert found.ids_NK.shape == found.given_NK.shape == (len(logits), draws)
    assert (found.given_NK.sum(1) == draws).all()
    for row, ids, counts in zip(logits.double().tolist(), found.ids_NK.tolist(), found.given_NK.tolist(), strict=True):
        distinct = sum(count > 0 for count in counts)
        assert all(count > 0 for count in counts[:distinct])  # what does not hold comes last
        assert ids[:distinct] == sorted(set(ids[:distinct]))
        assert all(row[i] > -INF for i in ids[:distinct])


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_impossible_ids_at_either_end_are_never_drawn(u):
    """The first id at u = 0, the last at u → 1, and whatever follows where the sum of all rounds below 1."""
    g = torch.Generator().manual_seed(10)
    logits = torch.randn(200, 64, generator=g) * 5
    logits[:, :5] = logits[:, 30:33] = logits[:, 60:] = -INF
    ids, counts = draw(logits, torch.full((200, 4), u, dtype=torch.float64))
    assert (counts[:, 0] == 4).all() and torch.isfinite(logits.gather(1, ids[:, :1])).all()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_marginals_are_the_tempered_distribution(temperature):
    """400,000 draws: Pearson's statistic, of mean V - 1 and variance 2 (V - 1), within 4.5 deviations of its mean."""
    vocabulary, rows, draws = 30, 8000, 50
    logits = normal(1, vocabulary, 11, 0.8)
    logits[0, 4] = -INF
    how = Selection("sampled", draws, temperature=temperature)
    drawn = torch.zeros(vocabulary, dtype=torch.int64)
    for part in random(rows, draws, 12).split(200):  # each draw looks into a block of its own, in float64
        found = select(logits.expand(len(part), -1), torch.zeros(len(part), dtype=torch.int64), how, (), part)
        drawn.scatter_add_(0, found.ids_NK.flatten(), found.given_NK.flatten())
    expected = (logits[0].double() / temperature).softmax(0) * rows * draws
    assert drawn[4] == 0 and expected[expected > 0].min() > 5
    possible = expected > 0
    chi_square = ((drawn - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert abs(chi_square - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_draws_follow_the_inverse_distribution_function():
    """Which uniform gives which id, by hand."""
    numbers = torch.tensor([[0.99, 0.05, 0.3, 0.2, 0.49, 0.51]], dtype=torch.float64)
    ids, counts = draw(torch.tensor([[0.1, 0.0, 0.4, 0.5]]).log(), numbers)
    assert ids[0, :3].tolist() == [0, 2, 3] and counts[0].tolist() == [1, 3, 2, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 3000])
def test_draws_are_those_of_one_cumulated_sum(vocabulary, temperature):
    logits = torch.randn(40, vocabulary, generator=torch.Generator().manual_seed(11)) * 3
    logits[:, vocabulary // 3] = -INF if vocabulary > 1 else 0.0
    u = random(40, 30, 0)
    mass = (logits.double() / temperature).softmax(1).cumsum(1)
    expected = torch.searchsorted(mass, u * mass[:, -1:], right=True).sort(1).values
    ids, counts = draw(logits, u, temperature)
    drawn = torch.stack([i.repeat_interleave(c) for i, c in zip(ids, counts, strict=True)])
    # an id's probability is rounded to fp32, so that a draw may fall on the other side of its edge
    assert (drawn != expected).sum() <= 1 and torch.isfinite(logits.gather(1, drawn)).all()


def test_many_draws_do_not_take_more_memory_than_the_logits_may(monkeypatch):
    """Each draw looks into a block of 256 ids in float64, however few ids there are."""
    monkeypatch.setattr(kernel_select, "CACHED_BYTES", 1 << 20)
    hidden, weight, uniforms = torch.randn(200, 4), torch.randn(300, 4), torch.rand(200, 50, dtype=torch.float64)
    with Largest() as largest:
        drawn = Selection("sampled", 50)
        select_targets(hidden, weight, None, torch.zeros(200).long(), drawn, 0.0, (), uniforms, impl="chunked")
    assert largest.bytes <= 2 << 20
