"""Which implementation runs, what is said of it, and what is refused."""

import logging

import pytest
import torch
from helpers.loss_problems import problem
from helpers.marks import NEEDS_TRITON

from ki_ds.kernels import dispatch, ki_loss, select_targets
from ki_ds.targets.selection import Selection

CUDA = torch.device("cuda")


def calls(dtype=torch.float32):
    """Both public functions on small problems of a type, the implementation left open."""
    inputs = problem(4, 4, 30, 3, 13, dtype=dtype)
    head = [inputs[name].detach() for name in ("hidden_ND", "weight_VD", "bias_V")]
    selection = (inputs["labels_N"], Selection("top_k", 2), 1 / 16)
    return [lambda **how: ki_loss(**inputs, **how), lambda **how: select_targets(*head, *selection, **how)]


def test_float64_is_refused_by_triton():
    for call in calls(torch.float64):
        with pytest.raises(ValueError, match=r'impl="triton" cannot run: .*float32, the hidden states are float64'):
            call(impl="triton")


@NEEDS_TRITON
def test_a_cpu_without_the_interpreter_is_refused_by_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in calls():
        with pytest.raises(ValueError, match=r"cannot run: .*CUDA devices, the hidden states are on cpu"):
            call(impl="triton")


def test_a_machine_without_triton_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    for call in calls():
        with pytest.raises(ValueError, match=r'triton is not installed \(pip install "ki_ds\[gpu\]"\)'):
            call(impl="triton")
    assert torch.isfinite(calls()[0]().loss)


def test_auto_takes_chunks_on_a_cpu_and_says_why():
    assert dispatch.chosen("cpu", torch.float32) == "chunked (not on a GPU)"
    assert dispatch.choose("ki_loss", "auto", torch.device("cpu"), torch.float32) == "chunked"
    loss, _ = calls()
    first, second = loss(), loss()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, loss(impl="chunked"), rtol=0, atol=0)


@NEEDS_TRITON
def test_a_gpu_without_triton_is_worth_one_warning(monkeypatch, caplog):
    dispatch._warn.cache_clear()
    assert dispatch.choose("ki_loss", "auto", CUDA, torch.bfloat16) == "triton"
    assert dispatch.chosen("cuda", torch.bfloat16) == "triton"
    assert not caplog.records
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    assert [dispatch.choose("ki_loss", "auto", CUDA, torch.bfloat16) for _ in range(2)] == ["chunked"] * 2
    (record,) = caplog.records
    assert "ki_loss runs: chunked (triton is not installed (pip install" in record.getMessage()
    assert record.levelno == logging.WARNING
    assert dispatch.chosen("cuda", torch.bfloat16).startswith("chunked (triton is not installed (pip install")
    assert "float64" in dispatch.chosen("cuda", torch.float64)
