"""Starts engine stages under the deepspeed launcher, watches their ranks, and stops everything that it started.

The launcher's exit code alone proves nothing: it is 0 when its own child was killed. What counts is the ranks' signs of
life (`heartbeat`), the process group, which is this module's own, and in the end the sealed folders.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import Literal

from ki_ds.errors import UserError
from ki_ds.launch.distributed import free_port
from ki_ds.launch.heartbeat import REQUEUE, SIGNALS
from ki_ds.launch.monitor import Monitor
from ki_ds.progress import say

LAUNCHERS = {
    "pdsh": "pdsh",
    "openmpi": "ompi_info",
    "mpich": "mpirun",
    "slurm": "sinfo",
}  # and its program
LOOK_S = 0.5
GRACE_S = 10.0
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


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    code: int
    how: Literal["ended", "silent", "stopped"]  # by itself; because ranks fell silent; after saving, as asked
    asked: bool  # whether a signal wanted it to end


def check(launch: Launch) -> None:
    """Refuse what cannot be started.

    Raises:
        UserError: a launcher that is unknown or not installed, nodes that ssh does not reach, or an option that nothing
            reads.
    """
    if launch.launcher not in LAUNCHERS:
        raise UserError(f"--launcher: found {launch.launcher}; allowed: {', '.join(LAUNCHERS)}")
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
    if launch.launcher == "pdsh" and (silent := _unreachable(list(hosts(launch.hostfile)))):
        raise UserError(
            f"{launch.hostfile}: ssh does not reach {', '.join(silent)} without a password. Try "
            f"`ssh {silent[0]} true`; ssh-copy-id brings a key there; see docs/cluster.md"
        )


def _unreachable(names: list[str]) -> list[str]:
    """Hosts on which ssh cannot run a command."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={GRACE_S:.0f}"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    tries = [(name, subprocess.Popen([*command, name, "true"], **quiet)) for name in names]  # type: ignore[call-overload]
    return [name for name, process in tries if process.wait()]


def launched(launch: Launch, stages: Sequence[str]) -> Outcome:
    """Run stages ("train:student") in ranks of their own, to the end."""
    launch.control.mkdir(parents=True, exist_ok=True)
    control = Path(mkdtemp(dir=launch.control))  # its own: what an earlier launch was told is not for these ranks
    monitor = Monitor(control, launch.processes, launch.timeout_s)
    process: subprocess.Popen[bytes] | None = None
    word, asked = "run", False

    def save(_number: int, _frame: FrameType | None) -> None:
        nonlocal word, asked
        if asked:  # a second signal: no time to save
            leave(_number, _frame)
        asked, word = True, "save"
        say("asked to stop: saving")

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(1)

    handlers = dict.fromkeys(SIGNALS, save) | {signal.SIGINT: leave, signal.SIGHUP: leave}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    silent = ""
    try:
        process = subprocess.Popen(_command(launch, stages, control), env=_environment(launch), start_new_session=True)
        while process.poll() is None and not silent:
            word = "save" if monitor.asked else word
            monitor.say(word)
            silent = monitor.look()
            time.sleep(LOOK_S)
    finally:
        if process is not None:
            _stop(process, monitor, launch)
        for number, handler in before.items():
            signal.signal(number, handler)
    code, ended = process.returncode, monitor.ended()
    if not (launch.hostfile and monitor.living()):  # who comes back from a network that was away is to find "stop"
        shutil.rmtree(control, ignore_errors=True)
        with contextlib.suppress(OSError):
            launch.control.rmdir()
    if silent:
        say(f"error: {silent}; everything is stopped")
        return Outcome(1, "silent", asked)
    # ranks that a launcher ends because another has failed may call it a stop, too
    saved = asked and "stopped" in ended and "failed" not in ended and code not in (0, 2)
    return Outcome(code, "stopped" if code == REQUEUE or saved else "ended", asked)


def _stop(process: subprocess.Popen[bytes], monitor: Monitor, launch: Launch) -> None:
    """Ranks must not outlive this: those on other nodes are told, what runs here is killed."""
    monitor.say("stop")
    limit = time.monotonic() + GRACE_S
    while launch.hostfile and monitor.living() and time.monotonic() < limit:
        time.sleep(LOOK_S)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        limit = time.monotonic() + GRACE_S
        while time.monotonic() < limit:
            process.poll()  # reap the leader, so that the group can end
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def _command(launch: Launch, stages: Sequence[str], control: Path) -> list[str]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"]
    program = ["--module", "ki_ds.cli"]
    if launch.hostfile:
        command += ["--hostfile", str(launch.hostfile), "--launcher", launch.launcher, "--force_multi"]
        if launch.launcher != "pdsh":  # they start ranks by other means than ssh
            command += ["--no_ssh_check", "--master_addr", next(iter(hosts(launch.hostfile)))]
        if launch.launcher_args:
            command += ["--launcher_args", launch.launcher_args]
        if launch.launcher == "slurm":
            program = [str(Path(__file__).parent / "rank.py")]  # DeepSpeed starts no modules there
    else:
        # an empty host file keeps a machine-wide one (/job/hostfile) out of a single-node run
        command += ["--hostfile", os.devnull, "--master_addr", "127.0.0.1", *_resources(launch.processes)]
    arguments = [*launch.arguments, "--control", str(control), "--timeout", str(launch.timeout_s / 60)]
    arguments += [part for stage in stages for part in ("--name", stage)]
    if launch.hostfile is None:
        arguments += ["--parent", str(os.getpid())]
    elif launch.launcher == "pdsh":
        # a shell on each node reads them once more; DeepSpeed quotes those with a space, and only those
        arguments = [argument if " " in argument else shlex.quote(argument) for argument in arguments]
    kinds = ",".join(dict.fromkeys(stage.partition(":")[0] for stage in stages))
    return [*command, "--master_port", str(free_port()), *program, "worker", kinds, *arguments]


def _environment(launch: Launch) -> dict[str, str]:
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(cores // launch.processes, 1)))
    environment.setdefault("PYTHONWARNINGS", "ignore")
    if launch.hostfile is None and _no_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def _resources(processes: int) -> list[str]:
    """The launcher's choice of devices: those of CUDA_VISIBLE_DEVICES, which --num_gpus would ignore.

    Raises:
        UserError: there are fewer GPUs than processes, or they are not named by number.
    """
    import torch

    devices = torch.cuda.device_count()
    if devices and processes > devices:
        raise UserError(f"--processes {processes}: this machine shows {devices} GPUs; expected at most that many")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not devices or not visible:
        return ["--num_gpus", str(processes)]
    named = visible.split(",")[:processes]
    if not all(name.strip().isdecimal() for name in named):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: the launcher takes devices by number, for instance 0,1")
    return ["--include", "localhost:" + ",".join(name.strip() for name in named)]


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def hosts(hostfile: Path) -> dict[str, int]:
    """The nodes of a DeepSpeed host file, and how many ranks each takes: lines `host slots=N`.

    Raises:
        UserError: it cannot be read, or names no host.
    """
    found: dict[str, int] = {}
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{hostfile}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        if len(fields) != 2 or not fields[1].removeprefix("slots=").isdecimal():
            raise UserError(f"{hostfile}:{number}: found {line.strip()!r}; expected `hostname slots=N`")
        found[fields[0]] = int(fields[1].removeprefix("slots="))
    if not sum(found.values()):
        raise UserError(f"{hostfile}: names no host; expected lines `hostname slots=N`")
    return found
