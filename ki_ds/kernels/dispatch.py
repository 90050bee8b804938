"""Which implementation runs, and why another one cannot."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Collection
from functools import cache

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "chunked", "triton")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def without_triton(hidden: Tensor) -> str | None:
    """Why the Triton kernels cannot run on such a tensor; None where they can."""
    if hidden.dtype not in TRITON_DTYPES:
        return f"they compute in float32, the hidden states are {str(hidden.dtype).removeprefix('torch.')}"
    if not _installed():
        return 'triton is not installed (pip install "ki_ds[gpu]")'
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not hidden.is_cuda and not interpreted:
        return f"they run on CUDA devices, the hidden states are on {hidden.device.type} (or set TRITON_INTERPRET=1)"
    return None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(function: str, impl: str, hidden: Tensor, known: Collection[str] = IMPLEMENTATIONS) -> str:
    """The name of the implementation that runs; `auto` takes Triton on a GPU and chunks elsewhere.

    Raises:
        ValueError: no such implementation, or it cannot run here.
    """
    if impl == "auto":
        reason = without_triton(hidden) if hidden.is_cuda else "not on a GPU"
        _say(function, reason, logging.WARNING if hidden.is_cuda and reason else logging.INFO)
        return "chunked" if reason else "triton"
    if impl not in known:
        raise ValueError(f"{function}: impl={impl!r}: expected auto, {', '.join(known)}")
    if impl == "triton" and (reason := without_triton(hidden)) is not None:
        raise ValueError(f'{function}: impl="triton" cannot run: {reason}')
    return impl


@cache
def _say(function: str, reason: str | None, level: int) -> None:
    """Once for each choice; a GPU without the kernels made for it is worth a warning."""
    chosen = "triton" if reason is None else f"chunked ({reason})"
    logging.getLogger("ki_ds").log(level, "%s runs: %s", function, chosen)
