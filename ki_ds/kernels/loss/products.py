"""Matrix products of half-precision tensors that end, and add up, in fp32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def add_product(into: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """into += a · b, or into = a · b where `first`; nothing of the size of `into` is allocated where the device's
    library adds up in the wider type itself (CUDA), or where there is one type only.

    Elsewhere a product of bf16 tensors is rounded before it is added; fp16 ones, which might overflow, are widened.
    """
    beta = 0 if first else 1
    if a.dtype == into.dtype:
        torch.addmm(into, a, b, beta=beta, out=into)
    elif _adds_wide(a.device, a.dtype, into.dtype):
        torch.addmm(into, a, b, out_dtype=into.dtype, beta=beta, out=into)
    else:
        product = a.to(into.dtype) @ b.to(into.dtype) if a.dtype == torch.float16 else a @ b
        if first:
            into.copy_(product)
        else:
            into.add_(product)


@cache
def _adds_wide(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether `addmm` here adds a product of `dtype` to a `wide` matrix; asked of the device itself, once."""
    return device.type == "cuda" and _tried(device, dtype, wide)


def _tried(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """What comes of it: 16 + 2^-10 in all digits, which neither half type has."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    into = torch.full((16, 16), 2.0**-10, dtype=wide, device=device)
    try:
        torch.addmm(into, ones, ones, out_dtype=wide, beta=1, out=into)
    except (RuntimeError, TypeError, NotImplementedError):  # torch before 2.9
        return False
    return bool((into == 16 + 2.0**-10).all())
