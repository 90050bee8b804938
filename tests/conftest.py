"""Shared fixtures. Tests run beside each other on few cores: one thread each, and no third-party noise."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs inherit it, and ki-ds leaves it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from ki_ds.launch import distributed

torch.set_num_threads(1)
distributed.quiet()
