"""How ranks are to be started, what of it is refused, and the deepspeed launcher's command line for it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ki_ds.errors import UserError
from ki_ds.launch.call import write_call
from ki_ds.launch.distributed import free_port
from ki_ds.launch.hosts import hosts, unreachable

# DeepSpeed's launchers for several nodes, and the program by which it knows that one is installed.
LAUNCHERS = {"pdsh": "pdsh", "openmpi": "ompi_info", "mpich": "mpirun", "slurm": "sinfo"}
DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Launch:
    """How engine stages are started: the arguments that name the experiment, and where the ranks run."""

    arguments: list[str]
    processes: int
    control: Path  # where the ranks give signs of life, on a file system that all nodes see
    hostfile: Path | None = None
    launcher: str = "pdsh"  # for several nodes
    launcher_args: str = ""
    restarts: int = 0
    timeout_s: float = DEFAULT_TIMEOUT_S


def check(launch: Launch) -> None:
    """Refuse what cannot be started.

    Raises:
        UserError: a launcher that is unknown or not installed, names that no host can have, nodes that ssh does not
            reach, what a shell on the way would misread, or an option that nothing reads.
    """
    if launch.launcher not in LAUNCHERS:
        raise UserError(f"--launcher: found {launch.launcher}; allowed: {', '.join(LAUNCHERS)}")
    try:
        shlex.split(launch.launcher_args)
    except ValueError as error:
        raise UserError(
            f"--launcher-args {launch.launcher_args}: {error}; expected words as a shell has them"
        ) from None
    if launch.hostfile is None:
        if launch.launcher_args:
            raise UserError("--launcher-args belong to several nodes: give --hostfile too")
        return
    program = LAUNCHERS[launch.launcher]
    if not shutil.which(program):
        raise UserError(
            f"--launcher {launch.launcher}: the program {program} is not on PATH. Install it (see docs/cluster.md), "
            f"or choose another of {', '.join(LAUNCHERS)}"
        )
    names = list(hosts(launch.hostfile))
    if launch.launcher != "pdsh":
        return
    _check_shells()
    if silent := unreachable(names):
        raise UserError(
            f"{launch.hostfile}: ssh does not reach {', '.join(silent)} without a password. Try "
            f"`ssh {silent[0]} true`; ssh-copy-id brings a key there; see docs/cluster.md"
        )


def _check_shells() -> None:
    """Check what DeepSpeed hands to a shell on each node besides the arguments of the ranks, which travel in a file.

    Raises:
        UserError: naming what the shell would read as something else.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher.runner import DEEPSPEED_ENVIRONMENT_NAME, DEEPSPEED_ENVIRONMENT_PATHS, EXPORT_ENVS

    for what, word in (("the current folder", os.path.abspath(".")), ("the Python interpreter", sys.executable)):
        if re.search(r"[^\w@+=:,./-]", word):
            raise UserError(f"{what}, {word!r}: pdsh takes it through a shell; expected letters, digits, @+=:,./-_")
    exported = {k: v for k, v in os.environ.items() if k.startswith((*EXPORT_ENVS, *get_accelerator().export_envs()))}
    for file in (Path(folder, DEEPSPEED_ENVIRONMENT_NAME) for folder in DEEPSPEED_ENVIRONMENT_PATHS):
        if file.is_file():
            pairs = (line.partition("=") for line in file.read_text(errors="replace").splitlines())
            exported |= {f"{name.strip()} in {file}": value for name, _, value in pairs}
    for name, value in exported.items():
        if not re.fullmatch(r"\w+", name.partition(" in ")[0]) or re.search(r'["$`\\\n]', value):
            raise UserError(
                f"the variable {name}, {value!r}: pdsh takes it to the nodes through a shell; expected NAME=value "
                'without any of "$`\\'
            )


def command_line(launch: Launch, stages: Sequence[str], control: Path) -> list[str]:
    """What starts the ranks of these stages ("train:student"), whose control folder is `control`.

    Raises:
        UserError: this machine has not the devices that were asked for, or the control folder cannot be written.
    """
    # what it logs at a lower level, an error of a rank among it, the ranks and `launcher` say themselves
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
    program = ["--module", "ki_ds.cli"]
    if launch.hostfile:
        runner += ["--hostfile", str(launch.hostfile), "--launcher", launch.launcher, "--force_multi"]
        if launch.launcher != "pdsh":  # they start ranks by other means than ssh
            runner += ["--no_ssh_check", "--master_addr", next(iter(hosts(launch.hostfile)))]
        if launch.launcher_args:
            runner += [f"--launcher_args={launch.launcher_args}"]  # one word: it may begin with a dash
        if launch.launcher == "slurm":
            program = [str(Path(__file__).parent / "rank.py")]  # DeepSpeed starts no modules there
    else:
        # an empty host file keeps a machine-wide one (/job/hostfile) out of a single-node run
        runner += ["--hostfile", os.devnull, "--master_addr", "127.0.0.1", *_devices(launch.processes)]
    kinds = dict.fromkeys(stage.partition(":")[0] for stage in stages)
    arguments = ["worker", ",".join(kinds), *launch.arguments]
    arguments += ["--control", str(control), "--timeout", str(launch.timeout_s / 60)]
    arguments += [part for stage in stages for part in ("--name", stage)]
    arguments += [] if launch.hostfile else ["--watch-input"]
    call = write_call(control, arguments)
    return [*runner, "--master_port", str(free_port()), *program, "worker-told", call]


def launcher_environment(launch: Launch) -> dict[str, str]:
    """The environment of the launcher, and so of the ranks on this machine; what the user has set stays."""
    given = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given.setdefault("OMP_NUM_THREADS", str(max(cores // launch.processes, 1)))
    given.setdefault("PYTHONWARNINGS", "ignore")
    if launch.hostfile is None and not _cuda():
        given.setdefault("DS_ACCELERATOR", "cpu")
    return given


def _devices(processes: int) -> list[str]:
    """The launcher's choice of devices: those of CUDA_VISIBLE_DEVICES, which --num_gpus would ignore.

    Raises:
        UserError: there are fewer GPUs than processes, or they are not named by number.
    """
    devices = _gpus()
    if devices and processes > devices:
        raise UserError(f"--processes {processes}: this machine shows {devices} GPUs; expected at most that many")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not devices or not visible:
        return ["--num_gpus", str(processes)]
    named = visible.split(",")[:processes]
    if not all(name.strip().isdecimal() for name in named):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: the launcher takes devices by number, for instance 0,1")
    return ["--include", "localhost:" + ",".join(name.strip() for name in named)]


def _cuda() -> bool:
    """Whether a GPU can be used, which there being one does not say."""
    import torch

    return torch.cuda.is_available()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
