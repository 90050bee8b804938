"""Tensors on the host that a GPU reads and writes beside its computation: in pinned memory, where there is a GPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def host_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor on the host: where there is a GPU in pinned memory, from which it is copied without waiting.

    numpy copies, not torch: the threads that call this must not start a second pool of threads.
    """
    if not torch.cuda.is_available():
        return torch.from_numpy(np.ascontiguousarray(array))
    found = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, pin_memory=True)
    found.numpy()[...] = array
    return found


def copied(tensor: Tensor) -> Tensor:
    """A tensor's copy on the host, which is whole once the device has come to it; a tensor of the host itself."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
