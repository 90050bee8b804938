"""Shared fixtures. Tests run beside each other on few cores: one thread each, and no third-party noise."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers.commands import LAUNCHER

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from ki_ds.launch import distributed

torch.set_num_threads(1)
distributed.quiet()

# what a shell's background jobs and nohup inherit as ignored, ki-ds leaves so
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(scope="module", autouse=True)
def launcher_variables():
    """A test that joined a process group in this process leaves none of its variables to what is started later."""
    before = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    yield
    after = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    os.environ.update(before)
    assert after == before, "a test of this module has left a launcher's variables in the environment otherwise"


def pytest_collection_modifyitems(items):
    """Where a GPU is in sight only what is marked for it runs: the others compare bits, count processes and give
    tensors as on a machine without one."""
    if torch.cuda.is_available():
        elsewhere = pytest.mark.skip(reason="expects no GPU: CUDA_VISIBLE_DEVICES= pytest")
        for item in items:
            if item.get_closest_marker("gpu") is None:
                item.add_marker(elsewhere)
