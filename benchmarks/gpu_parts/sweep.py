"""Which block sizes, warps and rows of a chunk are fastest here: the numbers that stand in the code, and others.

They are constants of the modules, set for the time of a row; nothing is chosen while a model trains. A row's best is
what the code should say; the page shows it beside what the code says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from loss_contenders import Case, Inputs, backward, inputs, losses, select_contenders
from timing import left_out, timed

from gpu_parts.loss_speed import implementation
from gpu_parts.part import Figures, Row

TURNS = 7
BLOCKS = [(2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32), (16384, 32)]  # columns at a time, warps
CHUNKS = [(1024, 1024), (2048, 2048), (2048, 4096), (2816, 2816), (4096, 4096), (8192, 8192)]  # rows: least, most
SELECTIONS = [(2048, 1024, 4), (2048, 1024, 8), (4096, 1024, 8), (4096, 2048, 8), (4096, 1024, 16), (8192, 1024, 16)]


def rows(device: str, tiny: bool) -> Iterator[Row]:
    """The loss's blocks by vocabulary, its chunks by width, the selection's lanes, tiles and warps."""
    n, k = (4, 8) if tiny else (8192, 100)
    for vocabulary in (320,) if tiny else (50_265, 128_256, 32_000):
        case = Case(n, 16 if tiny else 768, vocabulary, k, "bfloat16")
        yield f"blocks of the loss, {case.name}", partial(loss_blocks, case, device, tiny)
    for width, vocabulary in ((16, 320),) if tiny else ((768, 50_265), (4096, 128_256)):
        case = Case(n, width, vocabulary, k, "bfloat16")
        yield f"rows of a chunk, {case.name}", partial(chunk_sizes, case, device, tiny)
    for vocabulary in (320,) if tiny else (50_265, 128_256):
        case = Case(n, 16 if tiny else 768, vocabulary, k, "bfloat16")
        yield f"selection, {case.name}", partial(selections, case, device, tiny)


@contextmanager
def constants(module: ModuleType, **values: Any) -> Iterator[None]:
    """A module's constants at other values, for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def compared(settings: dict[str, dict[str, Any]], module: ModuleType, call: Callable[[], Any], device: str,
             tiny: bool, now: str) -> Figures:  # fmt: skip
    """Seconds of a call under each setting, in turns; which is the fastest, and which the code has."""

    def under(values: dict[str, Any]) -> None:
        with constants(module, **values):
            call()

    calls = {name: partial(under, values) for name, values in settings.items()}
    failed = left_out(calls)
    seconds = timed(calls, 1 if tiny else TURNS, device)
    best = min(seconds, key=seconds.__getitem__)
    found: Figures = {"seconds": seconds, "left out": failed, "best": best, "in the code": now}
    return found | ({"in the code / best": seconds[now] / seconds[best]} if now in seconds else {})


def loss_blocks(case: Case, device: str, tiny: bool) -> Figures:
    """Columns at a time and warps, for every row alike."""
    from ki_ds.kernels.loss import triton_loss

    bytes_of_a_row = case.vocabulary * 2
    now = triton_loss.WIDE if bytes_of_a_row > triton_loss.WIDE_BYTES else triton_loss.NARROW
    settings = {f"{b} columns, {w} warps": {"NARROW": (b, w), "WIDE": (b, w)} for b, w in dict.fromkeys([*BLOCKS, now])}
    x = inputs(case, device)
    return compared(settings, triton_loss, ki(case, x, tiny), device, tiny, f"{now[0]} columns, {now[1]} warps")


def chunk_sizes(case: Case, device: str, tiny: bool) -> Figures:
    """Rows of a chunk: the least and the most, between which the code takes 2 D."""
    from ki_ds.kernels.loss import chunked

    now = (chunked.LEAST_ROWS, chunked.MOST_ROWS)
    settings = {f"{least} to {most} rows": {"LEAST_ROWS": least, "MOST_ROWS": most}
                for least, most in dict.fromkeys([*CHUNKS, now])}  # fmt: skip
    x = inputs(case, device)
    return compared(settings, chunked, ki(case, x, tiny), device, tiny, f"{now[0]} to {now[1]} rows")


def selections(case: Case, device: str, tiny: bool) -> Figures:
    """Lanes, columns of a tile and warps of the teacher's kernel."""
    from ki_ds.kernels.select import triton_select

    now = (triton_select.LANES, triton_select.TILE, triton_select.WARPS)
    settings = {f"{lanes} lanes, {tile} columns, {warps} warps": {"LANES": lanes, "TILE": tile, "WARPS": warps}
                for lanes, tile, warps in dict.fromkeys([*SELECTIONS, now])}  # fmt: skip
    x = inputs(case, device)
    call = select_contenders(case, x, implementation(tiny))["select"]
    return compared(settings, triton_select, call, device, tiny,
                    f"{now[0]} lanes, {now[1]} columns, {now[2]} warps")  # fmt: skip


def ki(case: Case, x: Inputs, tiny: bool) -> Callable[[], None]:
    """Forward and backward pass of the loss."""
    return backward(x, losses(case, x, implementation(tiny), compiled=False)["ki"])
