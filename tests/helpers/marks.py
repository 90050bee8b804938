"""What a test needs of the machine."""

import importlib.util

import pytest
import torch

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]
# the Triton kernels on helpers.loss_problems.DEVICE: proof of a GPU where there is one, interpreted elsewhere
ON_DEVICE = (pytest.mark.gpu, NEEDS_TRITON)
# what the interpreter takes long for, and test_triton_loss.py proves of any shape, waits for a GPU or the slow tests
INTERPRETED = (*ON_DEVICE, *([] if torch.cuda.is_available() else [pytest.mark.slow]))
