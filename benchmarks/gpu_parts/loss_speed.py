"""The loss beside its bare products and beside peers: seconds and memory, all in turns on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from loss_contenders import Case, Inputs, backward, inputs, losses, products, select_contenders
from timing import left_out, timed

from gpu_parts.part import Figures, Row
from ki_ds.kernels import dispatch
from ki_ds.kernels.dispatch import Impl
from ki_ds.kernels.logit_transform import IDENTITY, logits_buffer
from ki_ds.kernels.loss import chunked
from ki_ds.kernels.loss.reference import Rows

TURNS = 9
SIZES = [(1024, 50_265), (768, 50_265), (4096, 128_256), (1024, 128_256), (1024, 151_936), (4096, 50_265),
         (768, 128_256), (768, 151_936), (4096, 151_936)]  # fmt: skip
COMPILED = SIZES[:3]  # torch.compile takes its time


def rows(device: str, tiny: bool) -> Iterator[Row]:
    """N = 8,192 in bf16, K = 100 at τ = 2, by width and vocabulary; then the kernel's other variants at one size."""
    sizes = [(16, 320)] if tiny else SIZES
    n, k = (4, 8) if tiny else (8192, 100)
    for width, vocabulary in sizes:
        case = Case(n, width, vocabulary, k, "bfloat16")
        yield f"loss, {case.name}", partial(loss_row, case, device, tiny, tiny or (width, vocabulary) in COMPILED)
    width, vocabulary = sizes[0]
    variants = [Case(n, width, vocabulary, k, "bfloat16", temperature=t, tail=tail)
                for t, tail in ((2.0, True), (1.0, False), (3.0, False))]  # fmt: skip
    for case in [*variants, Case(n, width, vocabulary, k, "float16"), Case(n, width, vocabulary, k, "float32")]:
        yield f"loss, {case.name}", partial(loss_row, case, device, tiny, False)
    for width, vocabulary in sizes[:4]:
        case = Case(n, width, vocabulary, k, "bfloat16")
        yield f"selection, {case.name}", partial(select_row, case, device, tiny)


def implementation(tiny: bool) -> Impl:
    """Triton, on a CPU too, where it is interpreted."""
    return "triton" if tiny else "auto"


def loss_row(case: Case, device: str, tiny: bool, compiled: bool) -> Figures:
    """Seconds, peak bytes and the loss of every contender."""
    torch._dynamo.reset()
    x = inputs(case, device)
    how = "triton" if tiny else dispatch.chosen(device, x.hidden_ND.dtype)
    chosen = losses(case, x, implementation(tiny), compiled)
    size = chunked.chunk_rows(case.rows, case.vocabulary, x.hidden_ND)
    calls: dict[str, Callable[[], Any]] = {"products": products(x, case.rows), "products by chunks": products(x, size)}
    calls |= {name: backward(x, loss) for name, loss in chosen.items()}
    failed = left_out(calls, needed=("products", "ce", "ki"))
    seconds = timed(calls, 1 if tiny else TURNS, device)
    found: Figures = {
        "implementation": how,
        "seconds": seconds,
        "left out": failed,
        "peak bytes": {name: peak(x, calls[name]) for name in chosen if name in calls} if device == "cuda" else {},
        "loss": {name: float(chosen[name]().detach()) for name in chosen if name in calls},
        "head / products": seconds["ce"] / seconds["products"],
        "ki / ce": seconds["ki"] / seconds["ce"],
    }
    if device == "cuda":
        found["TFLOP/s of the products"] = 6 * case.rows * case.hidden * case.vocabulary / seconds["products"] / 1e12
        if how == "triton":
            found["the pass over the logits, of a device copy's rate"] = bandwidth(case, x)
    return found


def peak(x: Inputs, call: Callable[[], Any]) -> int:
    """The most bytes at a time above what there was before; gradients that come out are part of it."""
    x.hidden_ND.grad = x.weight_VD.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bandwidth(case: Case, x: Inputs) -> float:
    """Share of a device copy's rate that the kernel reaches, where a logit is read once and written once."""
    from ki_ds.kernels.loss.triton_loss import chunk_loss

    size = chunked.chunk_rows(case.rows, case.vocabulary, x.hidden_ND)
    product = logits_buffer(size, case.vocabulary, x.hidden_ND).normal_()
    some = Rows.of(x.labels_N, x.targets, x.alpha_N, torch.float32).part(slice(0, size))
    one, other = (torch.zeros(size * case.vocabulary, dtype=product.dtype, device="cuda") for _ in range(2))
    found = timed(
        {
            "copy": lambda: other.copy_(one),
            "pass": lambda: chunk_loss(product, some, case.temperature, IDENTITY, 1.0, True),
        },
        20, "cuda",
    )  # fmt: skip
    return found["copy"] / found["pass"]


def select_row(case: Case, device: str, tiny: bool) -> Figures:
    """The teacher's side: seconds of choosing and packing beside the bare product, and beside log_softmax and topk."""
    x = inputs(case, device)
    calls = select_contenders(case, x, implementation(tiny))
    failed = left_out(calls, needed=("head product", "select"))
    seconds = timed(calls, 1 if tiny else TURNS, device)
    return {
        "seconds": seconds,
        "left out": failed,
        "select / head product": seconds["select"] / seconds["head product"],
    }
