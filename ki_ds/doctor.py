"""What this machine has for the pipeline, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.util
import platform
import shlex
import shutil
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ki_ds.engine import apex, ops
from ki_ds.errors import UserError
from ki_ds.progress import say

MONITORS = ("wandb", "comet_ml")
PROGRAMS = {
    "g++": "needed where DeepSpeed compiles ops (CPU offload): apt-get install g++",
    "nvcc": "needed on a GPU where DeepSpeed compiles ops (FusedAdam, CPU offload): install the CUDA toolkit",
    "pdsh": "starts ranks on several nodes over ssh: apt-get install pdsh",
    "mpirun": "another way to start ranks on several nodes: apt-get install openmpi-bin",
    "numactl": "binds ranks to cores (--bind_cores_to_rank): apt-get install numactl",
}
LEAST_DISK_GB = 2.0


def examine(workdir: Path) -> bool:
    """Print the findings; whether everything that is needed is there."""
    say(f"python {platform.python_version()} on {platform.platform()}")
    if not _packages():
        return False
    for name in MONITORS:
        if importlib.util.find_spec(name) is not None:
            say(f"monitor {name}: there")
    _apex()
    _accelerators()
    _locks()
    launcher = shutil.which("deepspeed")
    say(f"deepspeed launcher: {launcher or 'not on PATH; ki-ds starts it as python -m deepspeed.launcher.runner'}")
    for name, purpose in PROGRAMS.items():
        say(f"{name}: {shutil.which(name) or 'not there; ' + purpose}")
    return _disk(workdir)


def _packages() -> bool:
    """Whether every package that ki_ds requires is there; its own metadata, made of setup.cfg, say which these are."""
    try:
        requirements = [Requirement(line) for line in metadata.requires("ki_ds") or ()]
        extras = metadata.metadata("ki_ds").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        say("MISSING: ki_ds itself is not installed, only its source is here; run: pip install -e . in its folder")
        return False
    needed = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    there = {one.name: _version(one.name) for one in needed}
    say("packages: " + ", ".join(f"{name} {found}" for name, found in there.items() if found))
    if lacking := _lacking(needed):
        say(f"MISSING: {_listed(lacking)}; run: pip install {shlex.join(lacking)}")
        return False
    for extra in extras:
        added = [one for one in requirements if one.marker is not None and one.marker.evaluate({"extra": extra})]
        lacking = _lacking(added)
        say(f"extra {extra}: " + (f"lacks {_listed(lacking)}; pip install 'ki_ds[{extra}]'" if lacking else "there"))
    return True


def _lacking(requirements: list[Requirement]) -> dict[str, str | None]:
    """What is not met, and the version that is there instead."""
    there = {one: _version(one.name) for one in requirements}
    return {
        f"{one.name}{one.specifier}": version
        for one, version in there.items()
        if version is None or not one.specifier.contains(version, prereleases=True)
    }


def _listed(lacking: dict[str, str | None]) -> str:
    return ", ".join(f"{name} (found {version})" if version else name for name, version in lacking.items())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accelerators() -> None:
    import torch

    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        say(
            f"cuda:{index}: {found.name}, {found.total_memory / 2**30:.0f} GiB, "
            f"compute capability {found.major}.{found.minor}"
        )
    if not torch.cuda.is_available():
        say(
            f"no CUDA device (torch {torch.__version__}): "
            f"training runs on the CPU with {torch.get_num_threads()} threads"
        )
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    say(f"deepspeed accelerator: {get_accelerator().device_name()}")
    ready: list[str] = []
    others: list[str] = []
    for name, builder in ALL_OPS.items():
        try:
            compatible = builder.is_compatible(verbose=False)
        except Exception:  # a builder may fail in any way on a machine without its tool chain
            compatible = False
        (ready if compatible else others).append(name)
    say(f"deepspeed ops that can be compiled here: {', '.join(ready) or 'none'}; not: {', '.join(others) or 'none'}")


def _apex() -> None:
    try:
        apex.module("optimizers", '"ApexAdam"')
        say("optional NVIDIA apex: there")
    except UserError as error:
        say(f"optional NVIDIA apex: {error}")


def _locks() -> None:
    """Builds of operators that were killed, for which later ones would wait."""
    for lock in ops.locks():
        busy = "a build is going on" if ops.held(lock) else "nobody on this machine builds; if no other does, remove it"
        say(f"{lock}: {busy}")


def _disk(workdir: Path) -> bool:
    folder = next(one for one in (workdir.absolute(), *workdir.absolute().parents) if one.exists())
    free = shutil.disk_usage(folder).free / 1e9
    say(f"disk: {free:,.1f} GB free under {folder}")
    if free < LEAST_DISK_GB:
        say(f"MISSING: at least {LEAST_DISK_GB:g} GB of disk; choose another --workdir")
        return False
    return True
