"""The loss: the reference against autograd and the formula in float64, the chunked one against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.kernels import PackedTargets, chunked, ki_loss

QUANTUM = 1 / 16


def problem(rows, hidden, vocabulary, k, seed, dtype=torch.float64, bias=True):
    """Random inputs: some rows without a label, some without a target, some partly filled."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocabulary, generator=g)[:k] for _ in range(rows)]) if rows else torch.zeros(0, k)
    steps = torch.randint(0, 256, (rows, k), generator=g).sort(dim=1).values.to(torch.uint8)
    count = torch.randint(0, k + 1, (rows,), generator=g, dtype=torch.int32)
    high = (ids.to(torch.int64) >> 16).to(torch.uint8) if vocabulary > 1 << 16 else None
    low = (ids.to(torch.int64) & 0xFFFF).to(torch.int32).to(torch.int16)
    labels = torch.randint(-1, vocabulary, (rows,), generator=g)
    alpha = torch.rand(rows, generator=g) * (torch.rand(rows, generator=g) > 0.3)
    return dict(
        hidden_ND=torch.randn(rows, hidden, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        weight_VD=torch.randn(vocabulary, hidden, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        bias_V=torch.randn(vocabulary, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None,
        labels_N=labels,
        targets=PackedTargets(low, high, steps, count, QUANTUM),
        alpha_N=alpha.to(dtype),
    )


def gradients(impl, inputs, temperature, scale=1.0):
    leaves = [x for x in (inputs["hidden_ND"], inputs["weight_VD"], inputs["bias_V"]) if x is not None]
    result = ki_loss(**inputs, temperature=temperature, impl=impl)
    return result, torch.autograd.grad(result.loss * scale, leaves)


def by_hand(inputs, temperature):
    """The formula, in Python floats, row by row and entry by entry."""
    loss = 0.0
    targets = inputs["targets"]
    z = (inputs["hidden_ND"] @ inputs["weight_VD"].T + inputs["bias_V"]).tolist()
    for n, label in enumerate(inputs["labels_N"].tolist()):
        if label < 0:
            continue
        lse = math.log(sum(math.exp(v) for v in z[n]))
        lse_t = math.log(sum(math.exp(v / temperature) for v in z[n]))
        count = int(targets.count_N[n])
        alpha = float(inputs["alpha_N"][n]) if count else 0.0
        scores = [-QUANTUM * int(s) / temperature for s in targets.steps_NK[n][:count]]
        norm = sum(math.exp(s) for s in scores)
        kl = 0.0
        for s, token in zip(scores, targets.ids()[n].tolist(), strict=False):
            p = math.exp(s) / norm
            kl += p * (math.log(p) - (z[n][token] / temperature - lse_t)) if p else 0.0
        loss += (1 - alpha) * (lse - z[n][label]) + alpha * temperature**2 * kl
    return loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_reference_is_the_formula(temperature):
    inputs = problem(7, 5, 23, 6, seed=0)
    assert ki_loss(**inputs, temperature=temperature, impl="reference").loss.item() == pytest.approx(
        by_hand(inputs, temperature), rel=1e-12
    )


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_gradient_at_any_temperature(impl, temperature):
    inputs = problem(6, 4, 17, 5, seed=1)
    leaves = (inputs.pop("hidden_ND"), inputs.pop("weight_VD"), inputs.pop("bias_V"))

    def loss(hidden, weight, bias):
        return ki_loss(hidden, weight, bias, **inputs, temperature=temperature, impl=impl).loss

    assert torch.autograd.gradcheck(loss, leaves)


@given(
    rows=st.integers(0, 70),
    hidden=st.integers(1, 9),
    vocabulary=st.integers(2, 90),
    seed=st.integers(0, 1 << 30),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    bias=st.booleans(),
    chunk_rows=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_chunked_equals_reference(rows, hidden, vocabulary, seed, temperature, bias, chunk_rows, data):
    k = data.draw(st.integers(1, vocabulary))
    inputs = problem(rows, hidden, vocabulary, k, seed, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK_BYTES", chunk_rows * vocabulary * 8)
        one, grads_one = gradients("reference", inputs, temperature, scale=3.0)
        two, grads_two = gradients("chunked", inputs, temperature, scale=3.0)
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads_two, grads_one, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64_is_at_most_twice_that_of_eager_code(dtype):
    narrow = problem(300, 64, 1000, 20, seed=3, dtype=dtype)
    narrow["hidden_ND"] = (narrow["hidden_ND"].detach() / 8).requires_grad_()
    wide = {
        k: v.detach().double().requires_grad_() if k in ("hidden_ND", "weight_VD", "bias_V") else v
        for k, v in narrow.items()
    }
    truth, true_gradients = gradients("reference", wide, 2.0)
    eager, eager_gradients = gradients("reference", narrow, 2.0)
    ours, our_gradients = gradients("chunked", narrow, 2.0)
    assert abs(ours.loss - truth.loss) <= 2 * abs(eager.loss - truth.loss) + 1e-6 * truth.loss
    for mine, theirs, true in zip(our_gradients, eager_gradients, true_gradients, strict=True):
        assert (mine.double() - true).norm() <= 2 * (theirs.double() - true).norm()


def test_no_target_in_batch_is_plain_cross_entropy():
    inputs = problem(9, 4, 11, 3, seed=4) | {"targets": None, "alpha_N": None}
    expected = torch.nn.functional.cross_entropy(
        inputs["hidden_ND"] @ inputs["weight_VD"].T + inputs["bias_V"],
        inputs["labels_N"],
        ignore_index=-1,
        reduction="sum",
    )
    for impl in ("reference", "chunked"):
        result = ki_loss(**inputs, temperature=2.0, impl=impl)
        torch.testing.assert_close(result.loss, expected)
        assert result.kl == 0


def test_all_rows_ignored_keeps_the_graph_alive():
    inputs = problem(5, 4, 11, 3, seed=5) | {"labels_N": torch.full((5,), -100)}
    result, grads = gradients("chunked", inputs, 2.0)
    assert result.loss == 0 and result.loss.requires_grad and all((g == 0).all() for g in grads)


def test_student_equal_to_teacher_has_no_divergence_and_no_pull():
    """With the student's logits set to the teacher's own (K = V), KL and the gradient at α = 1 vanish."""
    steps = torch.arange(0, 50, 5, dtype=torch.uint8)[None, :]
    ids = torch.arange(10, dtype=torch.int16)[None, :]
    targets = PackedTargets(ids, None, steps, torch.tensor([10], dtype=torch.int32), QUANTUM)
    weight = (-QUANTUM * steps.double()).T.contiguous().requires_grad_()
    hidden = torch.ones(1, 1, dtype=torch.float64)
    for impl in ("reference", "chunked"):
        result = ki_loss(hidden, weight, None, torch.tensor([3]), targets, torch.ones(1).double(), 2.0, impl)
        (gradient,) = torch.autograd.grad(result.loss, [weight])
        assert abs(result.kl) < 1e-12 and gradient.abs().max() < 1e-12


def test_ids_beyond_sixteen_bits():
    inputs = problem(4, 3, 70_000, 50, seed=6)
    assert inputs["targets"].ids().max() > 1 << 16
    one, two = (gradients(impl, inputs, 2.0) for impl in ("reference", "chunked"))
    torch.testing.assert_close(one, two)


def test_inputs_unchanged():
    inputs = problem(20, 4, 11, 3, seed=7)
    copies = {k: v.detach().clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    steps = inputs["targets"].steps_NK.clone()
    gradients("chunked", inputs, 2.0)
    assert all(torch.equal(inputs[k], v) for k, v in copies.items()) and torch.equal(inputs["targets"].steps_NK, steps)


def test_no_tensor_of_all_logits_exists(monkeypatch):
    """No tensor made inside the chunked loss is larger than a chunk of logits or than the gradients themselves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    monkeypatch.setattr(chunked, "CHUNK_BYTES", 50 * 300 * 4)
    inputs = problem(1000, 8, 300, 20, seed=8, dtype=torch.float32)
    with Watch():
        gradients("chunked", inputs, 2.0)
    assert largest <= max(50 * 300, 1000 * 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, "labels has 3 rows"),
        ({"temperature": 0.0}, "temperature"),
        ({"impl": "trition"}, "impl"),
        ({"weight_VD": torch.zeros(11, 5)}, "hidden size 4"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ki_loss(**(problem(9, 4, 11, 3, seed=9) | change))
