"""From hidden states to packed predictions: every implementation against float64, bit for bit where logits are exact.

Most hidden states and heads hold small integers, so that a product is exact in every type, and full of ties.
"""

import math

import pytest
import torch
from helpers.loss_problems import DEVICE
from helpers.marks import NEEDS_TRITON, ON_DEVICE
from helpers.precision import Logits, check_draws, check_selection, recorded_products, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.kernels import IDENTITY, LogitTransform
from ki_ds.kernels.select import eager as select
from ki_ds.kernels.select.eager import draw, select_targets
from ki_ds.kernels.select.pack import Predictions
from ki_ds.targets.scalars import scalars_of
from ki_ds.targets.selection import Selection

# the interpreter computes in numpy, which warns of what stays behind a mask
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
IMPLS = [("reference", "cpu"), ("chunked", "cpu"), pytest.param("triton", DEVICE, marks=ON_DEVICE)]
EVERY = pytest.mark.parametrize(("impl", "device"), IMPLS)
HALVES = (torch.float16, torch.bfloat16, torch.float32)
TEMPERATURES = (1.0, 2.0, 3.0)
QUANTUM = 1 / 16
INF, NAN = math.inf, math.nan


def constant(row, rows=1, dtype=torch.float32, label=0):
    """A model that predicts these logits whatever it sees."""
    offset = torch.as_tensor(row, dtype=dtype)
    return (
        torch.zeros(rows, 1, dtype=dtype),
        torch.zeros(len(offset), 1, dtype=dtype),
        offset,
        torch.full((rows,), label),
    )


def run(impl, device, arguments, selection, quantum=QUANTUM, temperatures=TEMPERATURES, **more):
    """`select_targets` on a device, its results back on the host."""
    given = [None if x is None else x.to(device) for x in arguments]
    more = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
    found = select_targets(*given, selection, quantum, temperatures, impl=impl, **more)
    high = None if found.high_NK is None else found.high_NK.cpu()
    scalars = {name: x.cpu() for name, x in found.scalars.items()}
    rest = (x.cpu() for x in (found.values_NK, found.count_N))
    return Predictions(found.ids_NK.cpu(), high, *rest, scalars, found.distortion_N.cpu())


def equal(one, two):
    """Bit for bit."""
    for name in ("ids_NK", "high_NK", "values_NK", "count_N", "distortion_N"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    assert tuple(one.scalars) == tuple(two.scalars)
    assert all(torch.equal(one.scalars[name].nan_to_num(7), two.scalars[name].nan_to_num(7)) for name in one.scalars)


def agrees(found, arguments, selection, transform=IDENTITY, step=0):
    """With the definition, of logits that float64 holds exactly."""
    check_selection(found, Logits.exact(arguments, transform), arguments[3], selection, QUANTUM, TEMPERATURES, step)


def tiles(monkeypatch, **sizes):
    """Other sizes of the kernel's, where it is interpreted."""
    if DEVICE == "cpu" and not NEEDS_TRITON.args[0]:
        from ki_ds.kernels.select import triton_select

        for name, size in sizes.items():
            monkeypatch.setattr(triton_select, name, size)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles a row (of TILE / 4 columns, at three temperatures), and a list that soon overflows."""
    tiles(monkeypatch, LANES=32, TILE=256, LISTED=16)


@pytest.fixture
def large_tiles(monkeypatch):
    """As few tiles as there may be, in large problems."""
    tiles(monkeypatch, LANES=1 << 14, TILE=1 << 16)


# ----------------------------------------------------------------------------------------------- against the definition


@st.composite
def cases(draw):
    """Arguments, selection and logit transform."""
    vocabulary, dtype = draw(st.integers(1, 150)), draw(st.sampled_from(HALVES))
    arguments = whole_numbers(
        draw(st.integers(0, 3)), 3, vocabulary, draw(st.integers(0, 999)), dtype, draw(st.booleans())
    )
    kind, k = draw(st.sampled_from(["top_k", "top_p"])), draw(st.integers(1, 8) | st.integers(1, vocabulary))
    return (
        arguments,
        Selection(kind, min(k, vocabulary), draw(st.sampled_from([0.30001, 0.90001, 1.0]))),
        draw(st.sampled_from([IDENTITY, LogitTransform(0.5), LogitTransform(0.5, 4.0)])),
    )


@EVERY
@pytest.mark.usefixtures("small_tiles")
def test_random_problems(impl, device):
    @settings(max_examples=12 if device == "cpu" and impl == "triton" else 150, deadline=None)
    @given(cases())
    def check(case):
        arguments, selection, transform = case
        found = run(impl, device, arguments, selection, logit_transform=transform)
        # tanh in float32 moves a logit, and a row's mass over the edge of a nucleus, a little
        if transform.cap and selection.kind == "top_p":
            selection = Selection("top_k", selection.k)
            found = run(impl, device, arguments, selection, logit_transform=transform)
        agrees(found, arguments, selection, transform, step=1 if transform.cap else 0)

    check()


@EVERY
@pytest.mark.parametrize("dtype", HALVES)
def test_gaussian_logits_at_full_tiles(impl, device, dtype):
    g = torch.Generator().manual_seed(1)
    arguments = [torch.randn(2, 8, generator=g), torch.randn(9000, 8, generator=g), torch.randn(9000, generator=g)]
    arguments = [x.to(dtype) for x in arguments] + [torch.tensor([0, 8999])]
    with recorded_products() as products:
        found = run(impl, device, arguments, Selection("top_k", 100))
    labels = arguments[3].to(device)
    check_selection(found, Logits.of_chunks(products), labels, Selection("top_k", 100), QUANTUM, TEMPERATURES, step=1)


@EVERY
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["top_k", "top_p"])
@pytest.mark.parametrize("k", [1, 31, 33, 100])
def test_k_from_one_to_the_vocabulary(impl, device, kind, k):
    arguments, selection = whole_numbers(2, 3, 100, 2), Selection(kind, k, 0.95001)
    agrees(run(impl, device, arguments, selection), arguments, selection)


@EVERY
@pytest.mark.usefixtures("small_tiles")
def test_all_logits_equal(impl, device):
    """More ties than a list holds: the lowest ids win."""
    found = run(impl, device, constant([2.5] * 500), Selection("top_k", 7))
    assert found.ids_NK.tolist() == [[0, 1, 2, 3, 4, 5, 6]] and not found.values_NK.any()
    assert found.scalars[2.0].item() == pytest.approx(math.log(493), abs=1e-5)


@EVERY
@pytest.mark.usefixtures("small_tiles")
def test_most_probable_ids_all_in_one_lane(impl, device):
    """Which overflows a list of 16, so that the row is searched whole."""
    g = torch.Generator().manual_seed(3)
    row = torch.randint(-8, 0, (640,), generator=g).float()
    row[::32] = torch.randint(0, 9, (20,), generator=g).float()
    arguments, selection = constant(row), Selection("top_k", 3)
    agrees(run(impl, device, arguments, selection), arguments, selection)


@EVERY
def test_zeros_of_both_signs_tie(impl, device):
    arguments = constant([-1.0, 0.0, -0.0, 0.0, -0.0])
    assert run(impl, device, arguments, Selection("top_k", 3)).ids_NK.tolist() == [[1, 2, 3]]


@EVERY
@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("vocabulary", [65_536, 65_537])
def test_ids_of_more_than_16_bits(impl, device, vocabulary):
    row = torch.zeros(vocabulary)
    top = [1, 255, 256, 32_770, 65_533, 65_534, vocabulary - 1]
    row[top] = torch.arange(1.0, 8.0)
    arguments, selection = constant(row, label=vocabulary - 1), Selection("top_k", 7)
    agrees(run(impl, device, arguments, selection), arguments, selection)


@EVERY
@pytest.mark.parametrize("transform", [LogitTransform(0.5), LogitTransform(2.0, 5.0)])
def test_padding_of_the_head_is_not_seen(impl, device, transform):
    states, weight, offset, labels = whole_numbers(2, 3, 40, 5)
    padded = (states, torch.cat([weight, torch.full((9, 3), 50.0)]), torch.cat([offset, torch.full((9,), INF)]), labels)
    one = run(impl, device, (states, weight, offset, labels), Selection("top_k", 6), logit_transform=transform)
    equal(run(impl, device, padded, Selection("top_k", 6), logit_transform=transform, vocabulary=40), one)


@EVERY
@pytest.mark.parametrize("kind", ["top_k", "top_p", "sampled"])
def test_strides_do_not_matter(impl, device, kind):
    arguments, selection = whole_numbers(3, 4, 50, 6), Selection(kind, 6, 0.8)
    how = dict(quantum=0.0 if kind == "sampled" else QUANTUM, uniforms_NK=uniforms(3, 6) if kind == "sampled" else None)
    states, weight = (x.t().contiguous().t() for x in arguments[:2])
    given = (states.repeat_interleave(2, 0)[::2], weight.repeat_interleave(3, 1)[:, ::3], *arguments[2:])
    equal(run(impl, device, given, selection, **how), run(impl, device, arguments, selection, **how))


# ------------------------------------------------------------------------------------------- what is not a plain number


@EVERY
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("possible", [[7], [3, 40, 99], list(range(30, 42))])
def test_impossible_ids_are_not_kept(impl, device, possible):
    row = torch.full((100,), -INF)
    row[possible] = torch.arange(len(possible)).float()
    for kind in ("top_k", "top_p"):
        found = run(impl, device, constant(row, label=possible[0]), Selection(kind, 10, 1.0))
        held = min(len(possible), 10)
        assert found.count_N.tolist() == [held] and found.ids_NK[0, :held].tolist() == possible[-held:]
        assert not found.ids_NK[0, held:].any() and not found.values_NK[0, held:].any()
        rest = sum(math.exp(i - len(possible) + 1) for i in range(len(possible) - held))
        assert found.scalars[1.0].item() == pytest.approx(math.log(rest) if rest else -INF, abs=1e-5)


@EVERY
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "row",
    [[1.0, NAN, 2.0] * 20, [NAN] * 60, [-INF] * 60, [1.0, -NAN] + [2.0] * 58, [INF, 0.0] * 30, [0.0] * 59 + [INF]],
)
def test_what_is_not_finite_says_so(impl, device, row):
    """The row's truth is no number; nothing is read or written elsewhere, and the ids are ids."""
    for kind in ("top_k", "top_p", "sampled"):
        how = dict(quantum=0.0, uniforms_NK=uniforms(2, 4)) if kind == "sampled" else {}
        found = run(impl, device, constant(row, 2, label=1), Selection(kind, 4, 0.9), **how)
        assert torch.isnan(found.scalars["truth"]).all()
        assert (found.ids_NK >= 0).all() and (found.ids_NK < 60).all() and (found.count_N <= 4).all()


@EVERY
@pytest.mark.usefixtures("small_tiles")
def test_forbidden_ids_are_no_fault(impl, device):
    """Most ids at -inf, the true one among them in the second row."""
    for kind in ("top_k", "top_p", "sampled"):
        how = dict(quantum=0.0, uniforms_NK=uniforms(2, 4)) if kind == "sampled" else {}
        arguments = constant([-INF] * 20 + [1.0, 3.0] + [-INF] * 38, 2, label=21)
        arguments[3][1] = 0
        found = run(impl, device, arguments, Selection(kind, 4, 1.0), **how)
        expected = [3 - math.log(math.exp(3) + math.exp(1)), -INF]
        assert found.scalars["truth"].tolist() == pytest.approx(expected, abs=1e-5)
        assert all(set(ids[:n]) <= {20, 21} for ids, n in zip(found.ids_NK.tolist(), found.count_N, strict=True))


@EVERY
@pytest.mark.parametrize("label", [-1, -100, 40, 1 << 40])
def test_label_outside_the_vocabulary(impl, device, label):
    arguments = whole_numbers(2, 3, 40, 7)
    one = run(impl, device, arguments, Selection("top_k", 5))
    arguments[3][1] = label
    two = run(impl, device, arguments, Selection("top_k", 5))
    assert torch.isnan(two.scalars["truth"]).tolist() == [False, True]
    two.scalars["truth"][1] = one.scalars["truth"][1]
    equal(one, two)


@EVERY
@pytest.mark.parametrize("kind", ["top_k", "top_p", "sampled"])
def test_no_rows(impl, device, kind):
    how = dict(quantum=0.0, uniforms_NK=uniforms(0, 5)) if kind == "sampled" else {}
    found = run(impl, device, whole_numbers(0, 3, 20, 8), Selection(kind, 5, 0.9), **how)
    assert found.ids_NK.shape == found.values_NK.shape == (0, 5) and found.count_N.shape == (0,)
    assert set(found.scalars) == set(scalars_of(Selection(kind, 5), TEMPERATURES))


# --------------------------------------------------------------------------------------------------- how it is computed


def uniforms(rows, draws, seed=0):
    return torch.rand(rows, draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@EVERY
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["top_k", "top_p", "sampled"])
def test_chunks_decide_nothing_and_scratch_is_written_before_it_is_read(impl, device, kind, monkeypatch):
    arguments, selection = whole_numbers(5, 3, 90, 9, bias=False), Selection(kind, 9, 0.9)
    how = dict(quantum=0.0 if kind == "sampled" else QUANTUM, uniforms_NK=uniforms(5, 9) if kind == "sampled" else None)
    whole = run(impl, device, arguments, selection, **how)
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *shape, **more):
        made = new_empty(self, *shape, **more)
        return made.fill_(NAN if made.is_floating_point() else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(select, "LOGIT_BYTES", dict.fromkeys(select.LOGIT_BYTES, 2 * 90 * 4))
    monkeypatch.setattr(select, "CACHED_BYTES", 90 * 4)
    equal(run(impl, device, arguments, selection, **how), whole)


@EVERY
def test_inputs_unchanged_and_no_graph(impl, device):
    arguments = [x.to(device) for x in whole_numbers(2, 3, 30, 10)]
    before = [x.clone() for x in arguments]
    arguments[1].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        found = select_targets(*arguments, Selection("top_k", 5), QUANTUM, impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))
    assert not any(x.requires_grad for x in (found.distortion_N, *found.scalars.values()))


@EVERY
def test_draws_through_the_planes(impl, device):
    arguments, u = whole_numbers(4, 3, 20, 12), uniforms(4, 50)
    found = run(impl, device, arguments, Selection("sampled", 50, temperature=2.0), 0.0, uniforms_NK=u)
    assert found.ids_NK.shape == (4, 20)  # no row has more than V
    check_draws(found, Logits.exact(arguments), arguments[3], Selection("sampled", 50, temperature=2.0), u)
    if device == "cpu":  # another device may round a sum otherwise
        ids, counts = draw(torch.nn.functional.linear(*arguments[:3]), u, 2.0)
        assert (found.count_N == (counts > 0).sum(1)).all()
        assert torch.equal(found.ids_NK.long(), ids[:, :20]) and torch.equal(found.values_NK.long(), counts[:, :20])
    assert tuple(found.scalars) == ("truth",) and not found.distortion_N.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, "labels has 3 rows"),
        ({"weight_VD": torch.zeros(30, 5)}, "hidden size 3"),
        ({"quantum": 0.0}, "a quantum of 0.0 nats for top_k"),
        ({"selection": Selection("top_k", 0)}, "k = 0"),
        ({"selection": Selection("sampled", 9)}, "a quantum of .* nats for sampled: expected 0"),
        ({"selection": Selection("sampled", 256), "quantum": 0.0}, "at most 255 draws"),
        ({"selection": Selection("sampled", 9), "quantum": 0.0}, r"uniforms of shape \(2, 9\)"),
        ({"vocabulary": 31}, "a vocabulary of 31"),
        ({"logit_transform": LogitTransform(-1.0)}, "a finite scale above 0"),
        ({"impl": "trition"}, "impl='trition'"),
        ({"selection": Selection("top-k", 9)}, "'top-k'; expected top_k, top_p or sampled"),
        ({"temperatures": (2.0, 0.0)}, "expected finite ones above 0"),
        ({"weight_VD": torch.zeros(30, 3).half()}, "weight is torch.float16 .* expected torch.float32"),
        ({"bias_V": torch.zeros(29)}, r"bias is torch.float32 of shape \(29,\); .* \(30,\)"),
        (
            {"selection": Selection("sampled", 9), "quantum": 0.0, "uniforms_NK": torch.zeros(2, 9)},
            r"float64 uniforms of shape \(2, 9\)",
        ),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    names = ("hidden_ND", "weight_VD", "bias_V", "labels_N")
    given = dict(zip(names, whole_numbers(2, 3, 30, 13), strict=True), selection=Selection("top_k", 5), quantum=QUANTUM)
    with pytest.raises(ValueError, match=message):
        select_targets(**(given | change))
