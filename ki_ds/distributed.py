"""Rank, world size and the few collective operations; the only reader of the launcher's environment."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from ki_ds.errors import UserError


def under_launcher() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def initialise() -> torch.device:
    """Join the process group through DeepSpeed; a plain process becomes the one rank of a world of its own."""
    if not under_launcher():
        os.environ |= {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip
    quiet()
    import deepspeed
    import deepspeed.ops

    # a shared-memory all-reduce for inference, compiled at start in every process; gloo does what is needed here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(verbose=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def end_with(parent: int) -> None:
    """End this process when the one that started its launcher is gone: ranks must not go on unattended."""

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(0.2)

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


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def all_sum(values: Tensor) -> Tensor:
    """Elementwise sum over the ranks; a new tensor."""
    total = values.clone()
    if world_size() > 1:
        torch.distributed.all_reduce(total)
    return total


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def agree(what: str, digest: str) -> None:
    """Check that all ranks run the same thing.

    Raises:
        UserError: naming the ranks that differ from rank 0.
    """
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, digest)
    different = [str(other) for other, value in enumerate(found) if value != found[0]]
    if different:
        raise UserError(
            f"rank {', '.join(different)}: another {what} than rank 0. Give every node the same files and versions."
        )
