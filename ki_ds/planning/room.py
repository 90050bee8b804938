"""The memory that is there for a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ki_ds.planning import memory

GIB = 1 << 30
USABLE = 0.9  # of what is there: communication buffers, fragmentation and the device's own context take the rest
PROCESS = 0.7 * GIB  # host memory of a rank without a model: the interpreter, torch, DeepSpeed, transformers


@dataclass(frozen=True)
class Room:
    """Memory that is there for a rank, bytes; None: unknown. Without a GPU the device is host memory."""

    gpu: bool
    device: float | None = None
    host: float | None = None  # beside the GPU's
    source: str = ""
    here: bool = False  # on this machine

    def holds(self, need: memory.Estimate) -> bool:
        """Whether so much fits; what is unknown counts as endless."""
        device, host = need.device, need.host + PROCESS
        if not self.gpu:
            device, host = device + host, 0.0
        return device <= USABLE * (self.device or math.inf) and host <= USABLE * (self.host or math.inf)


def room_for(ranks: int, gib: float | None, elsewhere: bool) -> Room:
    """What a rank finds: `gib` of GPU memory where given, nothing known `elsewhere`, else a share of this machine."""
    import psutil
    import torch

    if gib is not None:
        return Room(True, gib * GIB, None, f"{gib:g} GiB a rank, as given")
    devices = torch.cuda.device_count()
    if elsewhere or (devices and ranks > devices):
        return Room(devices > 0)
    share = psutil.virtual_memory().available / ranks
    if not devices:
        return Room(False, share, None, f"{share / GIB:.1f} GiB of this machine's free memory a rank", True)
    least = min((torch.cuda.get_device_properties(index) for index in range(ranks)), key=lambda one: one.total_memory)
    return Room(True, least.total_memory, share, f"{least.name}, {least.total_memory / GIB:.0f} GiB", True)
