"""How near the loss and its gradients come to float64: at most twice as far off as eager code in the same type."""

import pytest
import torch
from helpers.loss_problems import DEVICE, FORMS, MODES, gradients, problem, widened
from helpers.marks import INTERPRETED

from ki_ds.kernels import LogitTransform

MANY = 8192  # rows that a loss is the mean over
FAST = [("chunked", "cpu"), pytest.param("triton", DEVICE, marks=INTERPRETED)]
# the interpreter computes in numpy, which warns of what stays behind a mask
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def factor(impl, dtype):
    """Of the eager code's error. Where a GPU rounds a number to the nearest in bf16, Triton's interpreter cuts it off:
    the mean square of that error is four times as large."""
    return 4 if (impl, DEVICE, dtype) == ("triton", "cpu", torch.bfloat16) else 2


@pytest.mark.parametrize(("impl", "device"), FAST)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_error_against_float64_is_at_most_twice_that_of_eager_code(impl, device, dtype, mode, temperature, form):
    rows = 200 if impl == "chunked" or device == "cuda" else 12
    narrow = problem(rows, 64, 1000, 20, 3, mode, dtype, device=device, **FORMS[form])
    narrow["hidden_ND"] = (narrow["hidden_ND"].detach() / 8).requires_grad_()
    truth, true_gradients = gradients("reference", widened(narrow), temperature)
    eager, eager_gradients = gradients("reference", narrow, temperature)
    ours, our_gradients = gradients(impl, narrow, temperature)
    assert abs(ours.loss - truth.loss) <= 2 * abs(eager.loss - truth.loss) + 1e-6 * truth.loss
    for mine, theirs, true in zip(our_gradients, eager_gradients, true_gradients, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - true).norm() <= factor(impl, dtype) * (theirs.double() - true).norm()


def means(device, mode, flat):
    """Rows of a mean over MANY of them. `flat`: a student that knows nothing yet."""
    form = {} if flat else {"logit_transform": LogitTransform(0.6, 4.0)}
    rows = 48 if device == "cuda" else 24
    inputs = problem(rows, 16, 1200, 20, 3, mode, torch.float16, device=device, **form)
    if flat:
        inputs["hidden_ND"] = (inputs["hidden_ND"].detach() / 64).requires_grad_()
        inputs["bias_V"] = torch.zeros_like(inputs["bias_V"], requires_grad=True)
    return inputs


@pytest.mark.parametrize(("impl", "device"), FAST)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("flat", "temperature"), [(True, 1.0), (False, 4.0)])
def test_fp16_gradients_at_any_loss_scale(impl, device, flat, mode, temperature):
    """At 2^16, where plain eager code neither overflows nor loses small numbers, its precision; at 1, where it loses
    them, no more than what fp16 cannot say of the true gradients."""
    inputs = means(device, mode, flat)
    _, truth = gradients("reference", widened(inputs), temperature, 1 / MANY)
    _, eager = gradients("reference", inputs, temperature, 2.0**16 / MANY)
    _, scaled = gradients(impl, inputs, temperature, 2.0**16 / MANY)
    _, plain = gradients(impl, inputs, temperature, 1 / MANY)
    for true, theirs, large, small in zip(truth, eager, scaled, plain, strict=True):
        error = (theirs.double() / 2**16 - true).norm()
        assert torch.isfinite(theirs).all() and error < 1e-3 * true.norm()
        assert (large.double() / 2**16 - true).norm() <= 2 * error
        assert (small.double() - true).norm() <= (true.half().double() - true).norm() + 2 * error


@pytest.mark.parametrize(("impl", "device"), FAST)
@pytest.mark.parametrize("mode", MODES)
def test_small_probabilities_are_not_lost_in_fp16(impl, device, mode):
    """1/1200 of a row that counts for 1/8192 is 1e-7, less than what fp16 can hold more than one bit of; together they
    are half of the gradient."""
    inputs = means(device, mode, flat=True)
    true = gradients("reference", widened(inputs), 2.0, 1 / MANY)[1][0]
    mine, eager = (gradients(name, inputs, 2.0, 1 / MANY)[1][0].double() for name in (impl, "reference"))
    assert (mine - true).norm() < 1e-3 * true.norm()
    assert (eager - true).norm() > 1e-2 * true.norm()


@pytest.mark.parametrize(("impl", "device"), FAST)
@pytest.mark.parametrize("mode", MODES)
def test_fp16_overflows_where_the_true_gradient_does_and_only_there(impl, device, mode):
    """A sum, not a mean, at a loss scale of 2^16 and 2^24: infinite, and so a step that is skipped, but never NaN."""
    inputs = problem(24, 16, 400, 20, 3, mode, torch.float16, device=device)
    _, truth = gradients("reference", widened(inputs), 2.0)
    _, eager = gradients("reference", inputs, 2.0)
    for scale in (2.0**16, 2.0**24):
        _, found = gradients(impl, inputs, 2.0, scale)
        for mine, theirs, true in zip(found, eager, truth, strict=True):
            slack = 2 * (theirs.double() - true).abs().max() * scale
            largest = torch.finfo(torch.float16).max
            over, under = true.abs() * scale > largest + slack, true.abs() * scale < largest - slack
            assert over.any() and (under.any() or scale > 2**16)  # there, of the hidden states', all overflow
            assert (mine[true == 0] == 0).all()  # of rows that are left out
            assert torch.isinf(mine[over]).all() and (mine[over] > 0).equal(true[over] > 0)
            assert torch.isfinite(mine[under]).all() and not mine.isnan().any()


@pytest.mark.parametrize(("impl", "device"), FAST)
@pytest.mark.parametrize("mode", [None, *MODES])
def test_an_offset_common_to_all_logits_costs_no_digit(impl, device, mode):
    """Logits of 2^14 + [0, 8) are exact in fp32 to 2^-9; softmax does not see the offset, and neither do its errors."""
    rows = 40 if impl == "chunked" or device == "cuda" else 12
    inputs = problem(rows, 8, 60, 6, 5, mode or "tail", torch.float32, device=device)
    inputs["hidden_ND"] = (inputs["hidden_ND"].detach() * 0).requires_grad_()
    steps = torch.randint(0, 8 * 512, (60,), generator=torch.Generator().manual_seed(6)).to(device) / 512
    inputs["bias_V"] = (steps + 2.0**14).requires_grad_()
    if mode is None:
        inputs |= {"targets": None, "alpha_N": None}
    for temperature in (1.0, 2.0, 3.0):
        truth, (_, _, true_bias) = gradients("reference", widened(inputs), temperature)
        found, (_, _, bias) = gradients(impl, inputs, temperature)
        assert [x.item() for x in found[:3]] == pytest.approx([x.item() for x in truth[:3]], rel=3e-6)
        assert (bias.double() - true_bias).norm() <= 3e-6 * true_bias.norm()
