"""Operators that are compiled: locks left behind, and what is missing."""

import os
import subprocess
import sys
import time

import pytest

from ki_ds.engine import ops
from ki_ds.errors import UserError


@pytest.fixture
def lock(tmp_path):
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    (folder / "build.ninja").write_text("")
    (folder / "lock").write_text("")
    return folder / "lock"


def age(folder, seconds):
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def test_old_lock_that_nobody_holds_is_removed(lock, capfd):
    age(lock.parent, ops.QUIET_S + 1)
    ops.clear(lock)
    assert not lock.exists()
    assert "left behind by a build that was interrupted" in "".join(capfd.readouterr())
    ops.clear(lock)  # none there: nothing to do


def test_locks_are_found_for_the_doctor(lock, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parent.parent))
    assert ops.locks() == [lock]
    lock.unlink()
    assert ops.locks() == []


def test_young_lock_that_nobody_holds_is_named(lock):
    age(lock.parent, ops.QUIET_S + 1)
    (lock.parent / "adam.o").write_text("just written")
    with pytest.raises(UserError, match=r"lock: a build was interrupted here, or another machine.*remove this file"):
        ops.clear(lock)
    assert lock.exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are looked up in /proc")
def test_lock_of_a_running_build_is_left_alone(lock):
    age(lock.parent, ops.QUIET_S + 1)
    code = f"import os; os.open({str(lock)!r}, os.O_RDONLY); print('open', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"open\n"
        ops.clear(lock)
        assert lock.exists()
    finally:
        holder.communicate(b"\n")
    ops.clear(lock)
    assert not lock.exists()


@pytest.mark.slow
def test_operator_that_cannot_be_compiled(tmp_path, monkeypatch):
    """A compiler that does not work, as where there is none."""
    from deepspeed.ops.op_builder import builder

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builder.OpBuilder, "_loaded_ops", {})
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match=r"optimizer: DeepSpeed.s cpu_adam cannot be compiled.*needs g\+\+"):
        ops.load("CPUAdamBuilder", "optimizer")


@pytest.mark.parametrize("use", [ops.check, ops.load])
def test_operator_that_deepspeed_has_not_for_this_device(use, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    unbuilt = type("NotImplementedBuilder", (), {})
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: unbuilt())
    with pytest.raises(UserError, match=r"zero_quantized_weights: DeepSpeed has no Quantizer for a c\w+; leave it out"):
        use("QuantizerBuilder", "zero_quantized_weights")
