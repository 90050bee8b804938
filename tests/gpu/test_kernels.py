"""The compiled kernels on the device: a case of each kind against float64, and how often they are compiled. All cases:
`python -m benchmarks.gpu_parts.correctness`."""

import pytest
import torch
from helpers.loss_problems import DEVICE, MODES, gradients, leaves, problem
from helpers.marks import NEEDS_GPU, NEEDS_TRITON
from helpers.precision import (
    Logits,
    check_draws,
    check_loss,
    check_selection,
    recorded_products,
    same_bits,
    whole_numbers,
)

from ki_ds.kernels import LogitTransform, dispatch, ki_loss, select_targets
from ki_ds.kernels.loss import products
from ki_ds.targets.selection import Selection

pytestmark = [*NEEDS_GPU, NEEDS_TRITON]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TYPICAL, LARGEST = (50_265, 151_936) if DEVICE == "cuda" else (300, 500)
MANY = 8192 if DEVICE == "cuda" else 20
TEMPERATURES = (1.0, 2.0)


def inputs_of(rows, vocabulary, mode, dtype, **more):
    found = problem(rows, 64, vocabulary, 150, 1, mode or "tail", dtype, device=DEVICE, draw_on=DEVICE, **more)
    found["hidden_ND"] = (found["hidden_ND"].detach() / 4).requires_grad_()
    return found | ({} if mode else {"targets": None, "alpha_N": None})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "temperature", "form"), [
    ("renormalised", 3.0, {}),
    ("tail", 2.0, dict(padding=5, logit_transform=LogitTransform(1.0, 30.0))),
    ("counts", 1.0, dict(padding=5)),
    (None, 2.0, dict(logit_transform=LogitTransform(0.6, 4.0))),
])  # fmt: skip
def test_loss_and_gradients_against_float64(mode, temperature, form, dtype):
    inputs = inputs_of(77, TYPICAL, mode, dtype, **form)
    check_loss(inputs, temperature)
    same_bits(lambda: gradients("triton", inputs, temperature))


@pytest.mark.parametrize("mode", [None, *MODES])
def test_more_logits_than_two_to_the_thirtieth(mode):
    """In three or four chunks of rows."""
    inputs = inputs_of(MANY, LARGEST, mode, torch.bfloat16)
    check_loss(inputs, 2.0)
    same_bits(lambda: gradients("triton", inputs, 2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["top_k", "top_p"])
def test_choice_by_definition(kind, dtype):
    """Of whole numbers, full of ties, and of what the device's product makes of Gaussian ones."""
    selection = Selection(kind, 100, 0.9)
    ties = whole_numbers(77, 16, TYPICAL, 1, dtype, device=DEVICE)
    g = torch.Generator(DEVICE).manual_seed(1)
    shapes = ((77, 64), (TYPICAL, 64), (TYPICAL,))
    gaussian = [torch.randn(shape, generator=g, device=DEVICE).to(dtype) for shape in shapes]
    for arguments, step in ((ties, 0), ((gaussian[0] / 4, *gaussian[1:], ties[3]), 1)):
        with recorded_products() as kept:
            found = select_targets(*arguments, selection, 1 / 16, TEMPERATURES, impl="triton")
        logits = Logits.exact(arguments) if step == 0 else Logits.of_chunks(kept)
        check_selection(found, logits, arguments[3], selection, 1 / 16, TEMPERATURES, step, edge=1e-6)


def test_draws_by_definition():
    arguments = whole_numbers(77, 16, TYPICAL, 1, torch.bfloat16, device=DEVICE)
    g = torch.Generator(DEVICE).manual_seed(1)
    uniforms = torch.rand(77, 50, dtype=torch.float64, generator=g, device=DEVICE)
    selection = Selection("sampled", 50, temperature=2.0)
    found = select_targets(*arguments, selection, 0.0, (), uniforms, impl="triton")
    check_draws(found, Logits.exact(arguments), arguments[3], selection, uniforms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_takes_triton_and_adds_up_in_fp32(dtype):
    """Where torch is recent enough; else a chunk's product is rounded, or widened, first."""
    assert dispatch.chosen(DEVICE, dtype) == "triton"
    recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    if dtype != torch.float32 and recent and torch.cuda.get_device_capability() >= (8, 0):
        assert products._adds_wide(torch.device(DEVICE, torch.cuda.current_device()), dtype, torch.float32)


def test_one_loss_kernel_serves_all_sizes():
    from ki_ds.kernels.loss.triton_loss import ki_loss_rows

    def kernels():
        return len(ki_loss_rows.device_caches[torch.cuda.current_device()][0])

    def run(rows, k, vocabulary):
        inputs = problem(rows, 8, vocabulary, k, 14, "tail", torch.bfloat16, device="cuda")
        torch.autograd.grad(ki_loss(**inputs, temperature=2.0, impl="triton").loss, leaves(inputs))

    run(64, 16, 1000)
    before = kernels()
    for rows, k, vocabulary in ((1, 1, 1000), (63, 7, 999), (5000, 100, 1003), (16, 16, 1024)):
        run(rows, k, vocabulary)
    assert kernels() == before


def test_one_selection_kernel_serves_all_sizes():
    from ki_ds.kernels.select.triton_select import select_kernel

    compiled = set()
    for rows, vocabulary, k in [(1, 50, 1), (3, 16, 16), (7, 5000, 17), (40, 50_265, 100), (16, 1024, 512)]:
        hidden, weight = (torch.randn(n, 8, device="cuda") for n in (rows, vocabulary))
        labels = torch.zeros(rows, dtype=torch.int64, device="cuda")
        select_targets(hidden, weight, None, labels, Selection("top_k", k), 1 / 16, impl="triton")
        compiled.add(len(select_kernel.device_caches[torch.cuda.current_device()][0]))
    assert len(compiled) == 1
