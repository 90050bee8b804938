"""Products that add up in fp32: what is believed of a device, and what is made of one that cannot."""

import pytest
import torch

from ki_ds.kernels.loss import products
from ki_ds.kernels.loss.products import add_product

CPU = torch.device("cpu")


def stand_in(result):
    """For `torch.addmm` on a GPU, of which torch on a CPU has no `out_dtype`."""

    def addmm(into, a, b, *, out_dtype, beta, out):
        return out.copy_(result(into.clone(), (a.float() @ b.float()).to(out_dtype), beta))

    return addmm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("result", "believed"),
    [
        (lambda into, product, beta: beta * into + product, True),
        (lambda into, product, beta: product, False),  # what was there is lost
        (lambda into, product, beta: (beta * into + product).half().float(), False),
        (lambda into, product, beta: (beta * into + product).bfloat16().float(), False),
    ],
)
def test_a_device_that_does_not_add_up_in_fp32_is_not_believed(monkeypatch, result, believed, dtype):
    monkeypatch.setattr(torch, "addmm", stand_in(result))
    assert products._tried(CPU, dtype, torch.float32) == believed


@pytest.mark.parametrize("error", [RuntimeError, TypeError, NotImplementedError])
def test_a_device_that_refuses_is_not_believed(monkeypatch, error):
    def addmm(*_given, **_named):
        raise error("no such overload")

    monkeypatch.setattr(torch, "addmm", addmm)
    assert not products._tried(CPU, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_was_there_is_added_to_or_replaced(dtype):
    a, b = (torch.randint(-2, 3, size).to(dtype) for size in ((5, 7), (7, 3)))
    exact = a.double() @ b.double()
    into = torch.full((5, 3), torch.nan)
    add_product(into, a, b, first=True)
    assert torch.equal(into.double(), exact)
    add_product(into, a, b, first=False)
    assert torch.equal(into.double(), 2 * exact)
