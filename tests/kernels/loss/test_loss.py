"""The loss: the reference against the formula by hand and autograd in float64, the chunked one against it."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.loss_problems import (
    DEVICE,
    FORMS,
    MODES,
    QUANTUM,
    TEMPERATURES,
    by_hand,
    gradients,
    laid_out,
    problem,
    widened,
)
from helpers.marks import ON_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.kernels import LogitTransform, PackedTargets, ki_loss
from ki_ds.kernels.loss import chunked

# the interpreter computes in numpy, which warns of what stays behind a mask
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
IMPLS = ("reference", "chunked")
IN_FP32 = [(impl, "cpu") for impl in IMPLS] + [pytest.param("triton", DEVICE, marks=ON_DEVICE)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_reference_is_the_formula(temperature, mode, form):
    inputs = problem(40, 5, 23, 6, 0, mode, **FORMS[form])
    found = ki_loss(**inputs, temperature=temperature, impl="reference")
    assert [x.item() for x in found[:3]] == pytest.approx(by_hand(inputs, temperature), rel=1e-12)


@pytest.mark.parametrize(("impl", "device"), IN_FP32)
def test_ce_and_kl_of_each_row_are_those_of_the_row_alone(impl, device):
    inputs = problem(9, 4, 13, 5, 3, dtype=torch.float32, device=device)
    found = ki_loss(**inputs, temperature=2.0, impl=impl)
    assert not found.ce_N.requires_grad and not found.kl_N.requires_grad
    head = {name: inputs[name] for name in ("weight_VD", "bias_V")}
    for n in range(9):
        one = slice(n, n + 1)
        rows = {name: inputs[name][one] for name in ("hidden_ND", "labels_N", "alpha_N")}
        alone = ki_loss(**head, **rows, targets=inputs["targets"].rows(one), temperature=2.0, impl="reference")
        torch.testing.assert_close((found.ce_N[n], found.kl_N[n]), alone[1:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_reference_is_the_formula_where_every_id_is_kept(mode, form):
    inputs = problem(20, 5, 9, 9, 1, mode, **FORMS[form])
    assert (inputs["targets"].count_N == 9).any()
    found = ki_loss(**inputs, temperature=2.0, impl="reference")
    assert [x.item() for x in found[:3]] == pytest.approx(by_hand(inputs, 2.0), rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("temperature", "k", "form"),
    [
        *((temperature, 4, form) for temperature in TEMPERATURES for form in FORMS),
        (2.0, 9, "plain"),
        (2.0, 4, "scaled"),
        (1.0, 1, "capped"),
    ],
)
def test_gradient_at_any_temperature(impl, mode, temperature, k, form):
    other = {"scaled": LogitTransform(1.7, 0.0), "capped": LogitTransform(1.0, 2.5)}
    more = FORMS | {name: {"logit_transform": transform} for name, transform in other.items()}
    inputs = problem(7, 3, 9, k, 2, mode, **more[form])
    given = (inputs.pop("hidden_ND"), inputs.pop("weight_VD"), inputs.pop("bias_V"))

    def loss(hidden, weight, bias):
        return ki_loss(hidden, weight, bias, **inputs, temperature=temperature, impl=impl).loss

    assert torch.autograd.gradcheck(loss, given, fast_mode=False)


TRANSFORMS = st.sampled_from(
    [
        LogitTransform(),
        LogitTransform(0.25, 0.0),
        LogitTransform(3.0, 0.0),
        LogitTransform(1.0, 2.0),
        LogitTransform(0.7, 5.0),
    ]
)


@given(
    rows=st.integers(0, 70),
    hidden=st.integers(1, 9),
    vocabulary=st.integers(2, 90),
    seed=st.integers(0, 1 << 30),
    mode=st.sampled_from(MODES),
    temperature=st.sampled_from(TEMPERATURES),
    bias=st.booleans(),
    padding=st.sampled_from([0, 0, 1, 30]),
    logit_transform=TRANSFORMS,
    layout=st.sampled_from(["dense", "transposed", "strided"]),
    chunk_rows=st.integers(16, 40),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_chunked_equals_reference(rows, vocabulary, temperature, layout, chunk_rows, data, **more):
    k = data.draw(st.integers(1, vocabulary))
    inputs = problem(rows=rows, vocabulary=vocabulary, k=k, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK_BYTES", chunk_rows * vocabulary * 8)
        one, grads_one = gradients("reference", inputs, temperature, scale=3.0)
        two, grads_two = gradients("chunked", laid_out(inputs, layout), temperature, scale=3.0)
    assert all(torch.isfinite(x).all() for x in (*one, *grads_one))
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads_two, grads_one, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [16, 17, 31, 32, 33, 48])
def test_chunks_whose_ends_meet_the_last_row(rows, mode, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)  # the least: 16 rows
    inputs = problem(rows, 4, 12, 5, rows, mode, **FORMS["everything"])
    torch.testing.assert_close(*(gradients(impl, inputs, 2.0) for impl in IMPLS), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_padding_have_no_influence_and_no_gradient(impl, mode):
    """Not even as many as fill a block; their logits would take all probability, and more than fp32 can hold."""
    inputs = problem(20, 4, 11, 3, 13, mode, padding=50)
    huge = {"weight_VD": 1e200, "bias_V": 1e300}
    other = inputs | {name: inputs[name].detach().clone() for name in huge}
    for name, value in huge.items():
        other[name][11:] = value
        other[name].requires_grad_()
    short = inputs | {"vocabulary": None} | {name: inputs[name].detach()[:11].requires_grad_() for name in huge}
    wanted, (hidden, *head) = gradients(impl, short, 2.0)
    for padded in (inputs, other):
        found, (hidden_found, *head_found) = gradients(impl, padded, 2.0)
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
        torch.testing.assert_close(hidden_found, hidden, rtol=1e-12, atol=1e-14)
        for mine, true in zip(head_found, head, strict=True):
            torch.testing.assert_close(mine[:11], true, rtol=1e-12, atol=1e-14)
            assert mine.shape[0] == 61 and not mine[11:].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("inside", [True, False])
def test_true_token_among_the_kept_ids_and_not(inside, k, mode):
    """Among them its gradient is written by the KL as well as by the cross-entropy."""
    inputs = problem(20, 4, 13, k, 15, mode)
    ids = inputs["targets"].ids()
    free = [next(i for i in range(13) if i not in row) for row in ids.tolist()]
    inputs["labels_N"] = ids[:, 0] if inside else torch.tensor(free)
    inputs["alpha_N"] = torch.linspace(0.1, 1, 20)
    truth = by_hand(inputs, 2.0)
    for impl in IMPLS:
        assert [x.item() for x in ki_loss(**inputs, temperature=2.0, impl=impl)[:3]] == pytest.approx(truth, rel=1e-12)
    torch.testing.assert_close(*(gradients(impl, inputs, 2.0) for impl in IMPLS), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("impl", "device"), IN_FP32)
@pytest.mark.parametrize("gap", [60.0, 150.0, 1e4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_a_student_that_leaves_the_other_ids_no_probability_in_fp32_still_hears_of_the_tail(
    impl, device, gap, temperature
):
    """exp(-gap / τ) is 0 in fp32, which must not make the KL infinite or cut it off at log(tiny), nor silence the
    pull towards the other ids. The truth: KL ≈ p_tail · gap / τ, and p_tail on the others by their own proportions."""
    g = torch.Generator().manual_seed(4)
    ids, values = torch.tensor([[3, 7, 20]], dtype=torch.int16), torch.tensor([[16, 0, 8]], dtype=torch.uint8)
    tail = torch.tensor([-0.5])
    targets = PackedTargets(ids, None, values, torch.tensor([3], dtype=torch.int32), QUANTUM, tail)
    logits = torch.randn(1, 50, generator=g)
    logits[0, ids[0].long()] += gap
    hidden = logits.to(device).requires_grad_()
    label, alpha, head = (x.to(device) for x in (torch.tensor([7]), torch.ones(1), torch.eye(50)))
    result = ki_loss(hidden, head, None, label, targets.to(device), alpha, temperature, impl=impl)
    gradient = torch.autograd.grad(result.loss, [hidden])[0].cpu()
    logq = (logits.detach().double() / temperature).log_softmax(1)[0]
    kept = ids[0].long()
    logp_kept, logp_tail = targets.log_probabilities(temperature, torch.float64)
    rest = logq.clone().index_fill_(0, kept, -torch.inf)
    kl = (logp_kept[0].exp() * (logp_kept[0] - logq[kept])).sum() + logp_tail.exp() * (logp_tail - rest.logsumexp(0))
    pull = logq.exp() - rest.softmax(0) * logp_tail.exp()
    pull[kept] = logq[kept].exp() - logp_kept[0].exp()
    assert torch.isfinite(result.loss)
    unit = 6e-8 * gap / min(temperature, 1) + 1e-6  # half of the last place of the largest scaled logit
    assert result.kl.item() == pytest.approx(kl.item(), rel=2e-6)
    torch.testing.assert_close(gradient[0].double() / temperature, pull, rtol=0, atol=unit)
    assert gradient[0].sum().abs() < unit * temperature
    others = torch.ones(50, dtype=torch.bool).index_fill_(0, kept, False)
    assert (gradient[0, others] < 0).all()


@pytest.mark.parametrize(("impl", "device"), IN_FP32)
@pytest.mark.parametrize("mode", ["renormalised", "counts"])
def test_a_student_that_leaves_kept_ids_no_probability_in_fp32_stays_finite(impl, device, mode):
    inputs = problem(1, 20, 20, 4, 12, mode, torch.float32, bias=False, device=device)
    logits = torch.zeros(1, 20, device=device)
    logits[0, next(i for i in range(20) if i not in inputs["targets"].ids()[0])] = 1e4
    inputs |= {"hidden_ND": logits.requires_grad_(), "weight_VD": torch.eye(20, device=device).requires_grad_()}
    inputs |= {"alpha_N": torch.ones(1, device=device), "labels_N": torch.zeros_like(inputs["labels_N"])}
    result, grads = gradients(impl, inputs, 2.0)
    truth, true_grads = gradients("reference", widened(inputs), 2.0)
    assert result.kl.item() == pytest.approx(5000, rel=1e-3) and result.loss.item() == pytest.approx(truth.loss.item())
    torch.testing.assert_close(grads[0].double(), true_grads[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_tail_beside_rows_with_one(impl):
    """Each row by itself gives what it gives among the others; without a tail it is the renormalised mode."""
    inputs = problem(12, 4, 15, 5, 5, "tail") | {"alpha_N": torch.full((12,), 0.7)}
    targets = inputs["targets"]
    missing = torch.isneginf(targets.tail_N)
    assert missing.any() and torch.isfinite(targets.tail_N).any()
    _, (whole, *_) = gradients(impl, inputs, 2.0)
    for n in range(12):
        here = slice(n, n + 1)
        part = targets.rows(here)
        if missing[n]:
            part = PackedTargets(part.ids_NK, part.high_NK, part.values_NK, part.count_N, part.quantum)
        single = inputs | {"hidden_ND": inputs["hidden_ND"].detach()[here].requires_grad_()}
        single |= {"labels_N": inputs["labels_N"][here], "alpha_N": inputs["alpha_N"][here], "targets": part}
        _, (alone, *_) = gradients(impl, single, 2.0)
        torch.testing.assert_close(alone, whole[here], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_without_target_or_alpha_are_plain_cross_entropy_and_rows_without_label_nothing(impl, mode):
    inputs = problem(60, 4, 11, 3, 6, mode)
    plain = (inputs["targets"].count_N == 0) | (inputs["alpha_N"] == 0)
    ignored = inputs["labels_N"] < 0
    assert plain.any() and ignored.any() and (inputs["alpha_N"] == 0).any()
    _, (found, *_) = gradients(impl, inputs, 2.0)
    _, (expected, *_) = gradients(impl, inputs | {"targets": None, "alpha_N": None}, 2.0)
    torch.testing.assert_close(found[plain], expected[plain], rtol=1e-12, atol=1e-14)
    assert (found[ignored] == 0).all()


def test_no_target_in_batch_is_plain_cross_entropy():
    inputs = problem(9, 4, 11, 3, seed=4) | {"targets": None, "alpha_N": None}
    inputs["labels_N"] = inputs["labels_N"].clamp(min=-1)
    expected = torch.nn.functional.cross_entropy(
        inputs["hidden_ND"] @ inputs["weight_VD"].T + inputs["bias_V"],
        inputs["labels_N"],
        ignore_index=-1,
        reduction="sum",
    )
    for impl in IMPLS:
        result = ki_loss(**inputs, temperature=2.0, impl=impl)
        torch.testing.assert_close(result.loss, expected)
        assert result.kl == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_all_rows_ignored_keeps_the_graph_alive(impl, mode):
    inputs = problem(5, 4, 11, 3, 5, mode, **FORMS["everything"]) | {"labels_N": torch.full((5,), -100)}
    result, grads = gradients(impl, inputs, 2.0)
    assert result.loss == 0 and result.loss.requires_grad and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kept", [10, 6])
def test_student_equal_to_teacher_has_no_divergence_and_no_pull(impl, kept):
    """With the student's logits set to the teacher's own, KL and the gradient at α = 1 vanish: renormalised where all
    ids are kept; with a tail, which may be split among the others in any way, where some are not."""
    values = torch.arange(0, 5 * kept, 5, dtype=torch.uint8)[None, :]
    ids = torch.arange(kept, dtype=torch.int16)[None, :]
    others = torch.tensor([-1.0, -3.0, 0.5, -2.0], dtype=torch.float64)[: 10 - kept]
    tail = (others / 2.0).logsumexp(0)[None].float() if kept < 10 else None
    targets = PackedTargets(ids, None, values, torch.tensor([kept], dtype=torch.int32), QUANTUM, tail)
    weight = torch.cat([-QUANTUM * values[0].double(), others])[:, None].requires_grad_()
    hidden = torch.ones(1, 1, dtype=torch.float64)
    result = ki_loss(hidden, weight, None, torch.tensor([3]), targets, torch.ones(1).double(), 2.0, impl=impl)
    (gradient,) = torch.autograd.grad(result.loss, [weight])
    tolerance = 1e-12 if tail is None else 1e-7  # the tail is held in fp32
    assert abs(result.kl) < tolerance and gradient.abs().max() < tolerance


@pytest.mark.parametrize("mode", MODES)
def test_ids_beyond_sixteen_bits(mode):
    inputs = problem(4, 3, 70_000, 50, 6, mode)
    assert inputs["targets"].ids().max() > 1 << 16
    one, two = (gradients(impl, inputs, 2.0) for impl in IMPLS)
    torch.testing.assert_close(one, two)
    if mode != "tail":  # with α = 1 the pull goes to the kept ids, none of them taken for its low 16 bits
        inputs |= {"alpha_N": torch.ones(4, dtype=torch.float64), "labels_N": torch.zeros(4, dtype=torch.int64)}
        (bias,) = gradients("chunked", inputs, 2.0)[1][2:]
        taught = inputs["targets"].ids()[inputs["targets"].kept()]
        assert set(torch.nonzero(bias < 0).flatten().tolist()) <= {0, *taught.tolist()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, r"labels of shape \(3,\); expected \(9,\)"),
        ({"temperature": 0.0}, "temperature"),
        ({"impl": "trition"}, "impl"),
        ({"temperature": float("nan")}, "temperature"),
        ({"weight_VD": torch.zeros(11, 5)}, "hidden size 4"),
        ({"weight_VD": torch.zeros(11, 4, dtype=torch.float16)}, "weight is torch.float16, the hidden states are"),
        ({"bias_V": torch.zeros(11)}, "bias is torch.float32"),
        ({"alpha_N": torch.ones(8)}, r"alpha of shape \(8,\)"),
        (
            {"alpha_N": torch.ones(9, 1)},
            r"alpha of shape \(9, 1\); expected \(9,\)",
        ),
        ({"labels_N": torch.zeros(9, dtype=torch.int32)}, "labels are torch.int32; expected torch.int64"),
        ({"targets": problem(8, 4, 11, 3, 9)["targets"]}, r"targets: ids of shape \(8, 3\); expected \(9, 3\)"),
        (
            {"targets": replace(problem(9, 4, 11, 3, 9)["targets"], values_NK=torch.zeros(9, 2, dtype=torch.uint8))},
            r"targets: values of shape \(9, 2\); expected \(9, 3\)",
        ),
        ({"vocabulary": 12}, "a vocabulary of 12, but the head has 11 rows"),
        ({"vocabulary": 0}, "a vocabulary of 0"),
        ({"logit_transform": LogitTransform(scale=0.0)}, "a finite scale above 0"),
        ({"logit_transform": LogitTransform(cap=math.inf)}, "a finite cap"),
        ({"logit_transform": LogitTransform(scale=float("nan"))}, "a finite scale above 0"),
        ({"logit_transform": LogitTransform(cap=-1.0)}, "a finite cap of 0 or more"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ki_loss(**(problem(9, 4, 11, 3, seed=9) | change))
