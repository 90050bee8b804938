"""Starts engine stages under the deepspeed launcher, in a process group of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_ds.distributed import free_port
from ki_ds.errors import UserError
from ki_ds.graph import Stage

LAUNCHED = ("teach", "train", "evaluate")
GRACE_S = 10.0


@dataclass(frozen=True)
class Launch:
    """How engine stages are started: the arguments that name the experiment, and where the ranks run."""

    arguments: list[str]
    processes: int
    hostfile: Path | None


def launched(launch: Launch, group: list[Stage]) -> int:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"]
    if launch.hostfile:
        command += ["--hostfile", str(launch.hostfile)]
    else:
        # an empty host file keeps a machine-wide one (/job/hostfile) out of a single-node run
        command += ["--hostfile", os.devnull, "--master_addr", "127.0.0.1", *_resources(launch.processes)]
    command += ["--master_port", str(free_port()), "--module", "ki_ds.cli", "worker", ",".join(LAUNCHED)]
    command += [*launch.arguments, *(part for stage in group for part in ("--name", f"{stage.kind}:{stage.name}"))]
    if launch.hostfile is None:
        command += ["--parent", str(os.getpid())]
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(cores // launch.processes, 1)))
    environment.setdefault("PYTHONWARNINGS", "ignore")
    if launch.hostfile is None and _no_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def stop(number: int, _frame: Any) -> None:
        _end(process)
        raise SystemExit(1)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end(process)  # ranks must not outlive their launcher


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


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop everything in the process group: politely, then for good."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        limit = time.monotonic() + patience
        while time.monotonic() < limit:
            process.poll()  # reap the leader, so that the group can end
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
