"""Which implementation runs, and why another one cannot."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Literal

import torch

Impl = Literal["auto", "reference", "chunked", "triton"]
IMPLEMENTATIONS = ("reference", "chunked", "triton")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def without_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on such hidden states; None where they can."""
    if dtype not in TRITON_DTYPES:
        return f"they compute in float32, the hidden states are {str(dtype).removeprefix('torch.')}"
    if not _installed():
        return 'triton is not installed (pip install "ki_ds[gpu]")'
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"they run on CUDA devices, the hidden states are on {device.type} (or set TRITON_INTERPRET=1)"
    return None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def chosen(device: torch.device | str, dtype: torch.dtype) -> str:
    """What `auto` takes on such hidden states, and why not Triton: "triton", "chunked (not on a GPU)"."""
    reason = _why_chunked(torch.device(device), dtype)
    return "triton" if reason is None else f"chunked ({reason})"


def choose(function: str, impl: Impl, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the implementation that runs; `auto` takes Triton on a GPU and chunks elsewhere.

    Raises:
        ValueError: no such implementation, or it cannot run here.
    """
    if impl == "auto":
        reason = _why_chunked(device, dtype)
        if reason is not None and device.type == "cuda":
            _warn(function, reason)
        return "triton" if reason is None else "chunked"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{function}: impl={impl!r}: expected auto, {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton" and (reason := without_triton(device, dtype)) is not None:
        raise ValueError(f'{function}: impl="triton" cannot run: {reason}')
    return impl


def _why_chunked(device: torch.device, dtype: torch.dtype) -> str | None:
    return without_triton(device, dtype) if device.type == "cuda" else "not on a GPU"


@cache
def _warn(function: str, reason: str) -> None:
    """Once: a GPU without the kernels made for it."""
    logging.getLogger("ki_ds").warning("%s runs: chunked (%s)", function, reason)
