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
        chosen = "triton" if hidden.is_cuda and without_triton(hidden) is None else "chunked"
        _say(function, chosen, without_triton(hidden))
        return chosen
    if impl not in known:
        raise ValueError(f"{function}: impl={impl!r}: expected auto, {', '.join(known)}")
    if impl == "triton" and (reason := without_triton(hidden)) is not None:
        raise ValueError(f'{function}: impl="triton" cannot run: {reason}')
    return impl


@cache
def _say(function: str, chosen: str, reason: str | None) -> None:
    """Once for each choice."""
    why = f" (no Triton kernels: {reason})" if chosen != "triton" and reason is not None else ""
    logging.getLogger("ki_ds").info("%s runs the %s implementation%s", function, chosen, why)
