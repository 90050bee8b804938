"""Rank, world size and the few collective operations; the only reader of the launcher's environment."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import threading
import warnings
import zlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ki_ds.errors import UserError
from ki_ds.launch import heartbeat

# Where a launcher tells a process its place: deepspeed and torchrun, Open MPI's mpirun, Slurm's srun; the first that is
# set counts. Slurm's batch script has a SLURM_PROCID too, but belongs to no step: it is a plain process.
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


SERVED = "TORCHELASTIC_USE_AGENT_STORE"  # says that the server at MASTER_ADDR and MASTER_PORT is there
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_servers: list[torch.distributed.TCPStore] = []  # of this process, as long as it lives


def _told(names: tuple[str, ...], otherwise: int) -> int:
    found = next((os.environ[name] for name in names if name in os.environ), "")
    return int(found) if found.isdecimal() else otherwise


def check_environment() -> None:
    """Check what this process's launcher told it.

    Raises:
        UserError: a number that is none, or that does not fit the others.
    """
    for names in (RANK, WORLD_SIZE, LOCAL_RANK):
        name = next((name for name in names if name in os.environ), "")
        if name and not os.environ[name].isdecimal():
            raise UserError(f"{name}={os.environ[name]} in the environment; expected a whole number, or to be unset")
    if under_launcher() and rank() >= world_size():
        raise UserError(f"rank {rank()} of {world_size()} in the environment; expected one of 0 … {world_size() - 1}")


def under_launcher() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return _told(RANK, -1) >= 0 and _told(WORLD_SIZE, 0) > 0


def rank() -> int:
    """This process's number among all ranks; 0 without a launcher."""
    return _told(RANK, 0)


def local_rank() -> int:
    """This process's number among the ranks of its node; 0 without a launcher."""
    return _told(LOCAL_RANK, 0)


def world_size() -> int:
    """The number of ranks; 1 without a launcher."""
    return _told(WORLD_SIZE, 1)


def complete_environment() -> None:
    """Say in the variables that torch and DeepSpeed read what this process's launcher told it in its own.

    A plain process is told that it is alone. Under mpirun DeepSpeed asks MPI for the address of rank 0.

    Raises:
        UserError: nothing here can find the address of rank 0.
    """
    e = os.environ
    if not under_launcher():
        e |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        e |= {"MASTER_ADDR": loopback(), "MASTER_PORT": str(free_port())}
        return
    e |= {"RANK": str(rank()), "LOCAL_RANK": str(local_rank()), "WORLD_SIZE": str(world_size())}
    if {"MASTER_ADDR", "MASTER_PORT"} <= e.keys():
        return
    if "OMPI_COMM_WORLD_RANK" in e:
        if importlib.util.find_spec("mpi4py") is None:
            raise UserError(
                "mpirun: mpi4py is not installed, and tells the ranks where rank 0 is; run: pip install 'ki_ds[mpi]', "
                "or say it: mpirun -x MASTER_ADDR=… -x MASTER_PORT=…"
            )
        e.setdefault("MASTER_PORT", _port_of(e.get("PMIX_NAMESPACE", "")))
    elif "SLURM_STEP_NODELIST" in e:
        if "MASTER_ADDR" not in e:
            e["MASTER_ADDR"] = _first_host(e["SLURM_STEP_NODELIST"])
        e.setdefault("MASTER_PORT", _port_of(f"{e.get('SLURM_JOB_ID')}.{e.get('SLURM_STEP_ID')}"))
    else:
        raise UserError(
            f"RANK={e['RANK']} and WORLD_SIZE={e['WORLD_SIZE']} are set, MASTER_ADDR and MASTER_PORT are not; expected "
            "all of them, from a launcher (deepspeed, torchrun, mpirun, srun), or none"
        )


def _port_of(job: str) -> str:
    """The same port on all ranks, and another for another job; below the ports that systems give away."""
    return str(20_000 + zlib.crc32(job.encode()) % 10_000)


def _first_host(nodes: str) -> str:
    """The first of the nodes of a Slurm step (`a[1-3,7],b`): the one with task 0."""
    if not shutil.which("scontrol"):
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes}: there is no scontrol here to name its first host; set MASTER_ADDR"
        )
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    if done.returncode or not done.stdout.split():
        said = done.stderr.strip() or "nothing"
        raise UserError(f"scontrol show hostnames {nodes}: exit code {done.returncode}: {said}; set MASTER_ADDR")
    return done.stdout.split()[0]


def rendezvous() -> str:
    """A name for this run that all its ranks know before they have met: where rank 0 is to be found.

    Raises:
        UserError: nothing here can find the address of rank 0.
    """
    complete_environment()
    return f"{os.environ.get('MASTER_ADDR', 'mpi')}-{os.environ['MASTER_PORT']}"


def loopback() -> str:
    """The address by which this machine reaches itself and nobody else does; some have IPv6's alone."""
    try:
        _bound("127.0.0.1", 0).close()
    except OSError:
        return "::1"
    return "127.0.0.1"


def free_port() -> int:
    """A TCP port that is free now."""
    with _bound(loopback(), 0) as probe:
        return int(probe.getsockname()[1])


def _bound(address: str, port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((address, port))
    except OSError:
        found.close()
        raise
    return found


@contextlib.contextmanager
def _meeting_on_loopback() -> Iterator[None]:
    """Where all ranks are on one machine, have them meet where no other machine can come: torch's own server listens on
    every interface. It is told that there is one already, as torchrun's ranks are.

    Raises:
        UserError: the port is taken.
    """
    e = os.environ
    if e.get("MASTER_ADDR") not in LOOPBACK or e.get(SERVED) == "True":
        yield
        return
    e["MASTER_ADDR"] = loopback()
    if "lo" in (name for _, name in socket.if_nameindex()):
        e.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank() == 0:
        address, port = e["MASTER_ADDR"], int(e["MASTER_PORT"])
        try:
            listening = _bound(address, port)
        except OSError as error:
            raise UserError(f"MASTER_PORT={port}: {error.strerror}; choose another, or start again") from None
        listening.listen()
        _servers.append(
            torch.distributed.TCPStore(
                address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        )
    e[SERVED] = "True"
    try:
        yield
    finally:
        del e[SERVED]  # what this process starts is to meet elsewhere


def init_distributed() -> torch.device:
    """Join the process group through DeepSpeed; a plain process becomes the one rank of a world of its own.

    Returns the device of this rank.

    Raises:
        UserError: nothing here can find the address of rank 0, or its port is taken.
    """
    complete_environment()
    quiet()
    import deepspeed
    import deepspeed.ops

    # a shared-memory all-reduce for inference, compiled at start in every process; gloo does what is needed here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.distributed.is_initialized():
        # the heartbeat is to be the first to notice, since it can say which rank is missing
        limit = timedelta(seconds=heartbeat.PATIENCE * heartbeat.THIS_RANK.timeout_s + 60)
        port = int(os.environ["MASTER_PORT"])
        with _meeting_on_loopback():
            deepspeed.init_distributed(verbose=False, timeout=limit, distributed_port=port)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def end_with_input() -> None:
    """End this process when its standard input does, a pipe that the process which started its launcher holds open:
    ranks must not go on unattended. A process's number says less: one that is not reaped keeps it, and another may get
    it later.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch").start()


def quiet() -> None:
    """Keep third-party start-up notices from drowning the program's own words."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def barrier() -> None:
    """Wait until all ranks have come here."""
    if world_size() > 1:
        with heartbeat.waiting_for_others():
            torch.distributed.barrier()


def all_reduce(values: Tensor) -> Tensor:
    """Elementwise sum over the ranks; a new tensor, the same on every rank."""
    total = values.clone()
    if world_size() > 1:
        with heartbeat.waiting_for_others():
            torch.distributed.all_reduce(total)
    return total


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with heartbeat.waiting_for_others():
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with heartbeat.waiting_for_others():
        torch.distributed.all_gather_object(found, value)
    return found


def agree(facts: dict[str, Any]) -> None:
    """Check that all ranks run the same thing.

    Raises:
        UserError: naming the ranks that differ from rank 0, and in what.
    """
    found = all_gather_object((socket.gethostname(), facts))
    lines = []
    for other, (host, theirs) in enumerate(found):
        for name, value in found[0][1].items():
            if theirs.get(name) != value:
                lines.append(f"rank {other} (host {host}): {name} is {theirs.get(name)}; rank 0 has {value}")
    if lines:
        raise UserError("\n".join([*lines[:5], "Give every node the same files and the same versions of libraries."]))
