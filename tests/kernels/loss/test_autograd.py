"""The loss as a part of an autograd graph: what it keeps, what it leaves alone, and whose gradients it makes."""

import itertools

import pytest
import torch
from helpers.loss_problems import (
    DEVICE,
    FORMS,
    LEAVES,
    MODES,
    Largest,
    gradients,
    laid_out,
    leaves,
    poisoned_memory,
    problem,
)
from helpers.marks import INTERPRETED
from torch.utils.checkpoint import checkpoint

from ki_ds.kernels import ki_loss
from ki_ds.kernels.loss import chunked

ALL = [("reference", "cpu"), ("chunked", "cpu"), pytest.param("triton", DEVICE, marks=INTERPRETED)]
FAST = ALL[1:]
# the interpreter computes in numpy, which warns of what stays behind a mask
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def example(device, mode="tail", rows=14, **more):
    return problem(rows, 4, 30, 5, 21, mode, torch.float32, device=device, **(FORMS["everything"] | more))


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)  # 16 rows, or as many as divide all evenly


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("mode", MODES)
def test_inputs_unchanged(impl, device, mode):
    inputs = example(device, mode)
    given = inputs | vars(inputs["targets"])
    copies = {k: v.detach().clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    gradients(impl, inputs, 2.0)
    assert all(torch.equal(given[k].nan_to_num(9), v.nan_to_num(9)) for k, v in copies.items())


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("mode", MODES)
def test_no_number_comes_from_memory_that_nobody_wrote(impl, device, mode):
    for rows, temperature, more in ((20, 2.0, {}), (20, 4.0, {"bias": False}), (9, 1.0, {"padding": 0}), (0, 2.0, {})):
        inputs = example(device, mode, rows, **more)
        clean = gradients(impl, inputs, temperature)
        with poisoned_memory():
            torch.testing.assert_close(gradients(impl, inputs, temperature), clean, rtol=0, atol=0)


@pytest.mark.parametrize(("impl", "device"), FAST)
@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("mode", MODES)
def test_strides_change_nothing(impl, device, layout, mode):
    """Targets are often columns of something wider."""
    inputs = example(device, mode)
    moved = laid_out(inputs, layout)
    assert not moved["hidden_ND"].is_contiguous() and not moved["targets"].ids_NK.is_contiguous()
    torch.testing.assert_close(gradients(impl, moved, 2.0), gradients(impl, inputs, 2.0))


@pytest.mark.parametrize(("impl", "device"), FAST)
def test_two_runs_give_the_same_bits(impl, device):
    inputs = example(device, rows=40)
    torch.testing.assert_close(gradients(impl, inputs, 2.0), gradients(impl, inputs, 2.0), rtol=0, atol=0)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_second_backward_pass_gives_the_same_again(impl, device):
    """What the first one scaled must not be what the second one scales."""
    inputs = example(device)
    loss = ki_loss(**inputs, temperature=2.0, impl=impl).loss
    first, second = (torch.autograd.grad(loss, leaves(inputs), torch.tensor(3.0, device=device), True) for _ in "ab")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (loss * 3).backward()
    for leaf, wanted in zip(leaves(inputs), first, strict=True):
        torch.testing.assert_close(leaf.grad, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("impl", "device"), FAST)
def test_gradient_of_an_expanded_loss(impl, device):
    """Its gradient comes back as a sum, or as a view of stride 0."""
    inputs = example(device)
    wanted = gradients(impl, inputs, 2.0, scale=3.0)[1]
    loss = ki_loss(**inputs, temperature=2.0, impl=impl).loss
    ones = torch.ones((), device=device).expand(3)
    torch.testing.assert_close(torch.autograd.grad(loss.expand(3), leaves(inputs), ones), wanted)


@pytest.mark.parametrize(("impl", "device"), FAST)
@pytest.mark.parametrize("wanted", [some for n in range(4) for some in itertools.combinations(LEAVES, n)])
def test_only_what_needs_a_gradient_gets_one(impl, device, wanted):
    inputs = example(device)
    full = dict(zip(LEAVES, gradients(impl, inputs, 2.0)[1], strict=True))
    some = inputs | {name: inputs[name].detach().requires_grad_(name in wanted) for name in LEAVES}
    result = ki_loss(**some, temperature=2.0, impl=impl)
    assert result.loss.requires_grad == bool(wanted) and not result.ce.requires_grad and not result.kl.requires_grad
    if wanted:
        result.loss.backward()
    for name in LEAVES:
        assert (some[name].grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(some[name].grad, full[name], rtol=0, atol=0)


@pytest.mark.parametrize(("impl", "device"), FAST)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_without_gradients_the_loss_is_the_same_and_nothing_is_made_for_them(
    impl, device, mode, temperature, monkeypatch
):
    inputs = example(device, mode)
    wanted = ki_loss(**inputs, temperature=temperature, impl=impl)
    monkeypatch.setattr(chunked, "add_product", None)  # a call would raise
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        found = ki_loss(**inputs, temperature=temperature, impl=impl)
    assert not kept and found.loss.grad_fn is None
    torch.testing.assert_close(found, tuple(x.detach() for x in wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("impl", "device"), FAST)
@pytest.mark.parametrize("reentrant", [True, False])
def test_head_inside_a_checkpoint(impl, device, reentrant):
    inputs = example(device)
    wanted = gradients(impl, inputs, 2.0, scale=3.0)
    rest = {name: x for name, x in inputs.items() if name not in LEAVES}

    def head(*given):
        return ki_loss(*given, **rest, temperature=2.0, impl=impl).loss

    loss = checkpoint(head, *leaves(inputs), use_reentrant=reentrant)
    (loss * 3).backward()
    torch.testing.assert_close((loss, [x.grad for x in leaves(inputs)]), (wanted[0].loss, list(wanted[1])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    """The products run in the type that the head has, not in the one that the rest of the model runs in."""
    inputs = example("cpu")
    with torch.autocast("cpu", dtype):
        found = gradients("chunked", inputs, 2.0)
    torch.testing.assert_close(found, gradients("chunked", inputs, 2.0), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_no_tensor_of_all_logits_exists(monkeypatch, mode):
    """No tensor made inside the chunked loss is larger than a chunk of logits or than the gradients themselves."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 50 * 300 * 4)
    inputs = problem(1000, 8, 300, 20, 8, mode, torch.float32)
    with Largest() as largest:
        gradients("chunked", inputs, 2.0)
    # the buffer's rows are padded to 304
    assert largest.bytes <= 4 * max(50 * 304, 1000 * 20)


@pytest.mark.parametrize(("impl", "device"), FAST)
def test_a_second_derivative_is_refused_and_not_silently_constant(impl, device):
    inputs = example(device)
    result = ki_loss(**inputs, temperature=2.0, impl=impl)
    with pytest.raises(RuntimeError, match=r'no second derivative.*impl="reference"'):
        torch.autograd.grad(result.loss, leaves(inputs), create_graph=True)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_the_loss_may_be_scaled_in_place(impl, device):
    inputs = example(device)
    _, wanted = gradients(impl, inputs, 2.0, 0.125)
    loss = ki_loss(**inputs, temperature=2.0, impl=impl).loss
    loss /= 8
    torch.testing.assert_close(torch.autograd.grad(loss, leaves(inputs)), wanted)
