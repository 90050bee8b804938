"""DeepSpeed's operators that are compiled when they are first used."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError, reason
from ki_ds.launch import distributed
from ki_ds.progress import say

QUIET_S = 600.0  # a build that has written nothing for so long is over; its longest files take three minutes
NEEDS = {"AsyncIOBuilder": "libaio: apt-get install libaio-dev", "CPUAdamBuilder": "g++: apt-get install g++"}


def load(name: str, asked: str) -> Any:
    """An operator of DeepSpeed by the name of its builder; all ranks call this. `asked`: the setting that needs it.

    Raises:
        UserError: it cannot be compiled here, or an interrupted build is in the way.
    """
    from torch.utils.cpp_extension import _get_build_directory

    builder = _builder(name, asked)
    folder = Path(_get_build_directory(builder.name, False))  # made where it is missing
    if distributed.local_rank() == 0:
        clear(folder / "lock")
    distributed.barrier()  # from here on, a lock is one of this run's
    if not any(folder.glob("*.so")) and distributed.local_rank() == 0:
        say(f"compiling DeepSpeed's {builder.name}, once, into {folder} …")
    try:
        return builder.load(verbose=False)
    except Exception as error:  # whatever a tool chain that does not work makes it raise
        raise _refusal(name, builder, asked, reason(error)) from None


def check(name: str, asked: str) -> None:
    """Check that what `load` compiles an operator with is there, where it did not come compiled; nothing is compiled.

    Raises:
        UserError: naming what is missing.
    """
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    builder = _builder(name, asked)
    if installed_ops.get(builder.name):
        return
    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise _refusal(name, builder, asked, f"there is no compiler {compiler}")
    if not is_ninja_available():
        raise _refusal(name, builder, asked, "there is no ninja: pip install ninja")
    try:
        compatible = builder.is_compatible(verbose=False)
    except Exception as error:  # a builder may fail in any way on a machine without its tool chain
        raise _refusal(name, builder, asked, reason(error)) from None
    if not compatible:
        raise _refusal(name, builder, asked, "what it is made of is missing")


def _builder(name: str, asked: str) -> Any:
    """What compiles an operator for this machine's device.

    Raises:
        UserError: DeepSpeed has none.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    if builder is None or type(builder).__name__ == "NotImplementedBuilder":
        device = get_accelerator().device_name()
        raise UserError(f"{asked}: DeepSpeed has no {name.removesuffix('Builder')} for a {device}; leave it out")
    return builder


def _refusal(name: str, builder: Any, asked: str, why: str) -> UserError:
    missing = f"; it needs {NEEDS[name]}" if name in NEEDS else ""
    return UserError(f"{asked}: DeepSpeed's {builder.name} cannot be compiled or loaded here ({why}){missing}")


def locks() -> list[Path]:
    """The locks in the folder of compiled operators."""
    from torch.utils.cpp_extension import get_default_build_root

    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return sorted(Path(named).glob("*/lock") if named else Path(get_default_build_root()).glob("*/*/lock"))


def clear(lock: Path) -> None:
    """Remove the lock of a build that was killed: every later build would wait for it, silently and for ever.

    Raises:
        UserError: no process of this machine holds it, but one of another that shares the folder might.
    """
    try:
        newest = max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir()))
    except FileNotFoundError:
        return
    if held(lock):
        return
    if time.time() - newest < QUIET_S:
        raise UserError(
            f"{lock}: a build was interrupted here, or another machine is building in the same folder. "
            f"If none is, remove this file; else wait until it is done"
        )
    say(f"{lock}: left behind by a build that was interrupted; removed")
    lock.unlink(missing_ok=True)


def held(file: Path) -> bool:
    """Whether a process of this machine has the file open, as a running build has its lock."""
    if not Path("/proc/self/fd").is_dir():
        return False
    there = os.path.realpath(file)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == there:
                return True
        except OSError:  # gone, or of another user
            continue
    return False
