"""Which ranks ask a teacher together: who chooses the next shard, and whether the next forward pass is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ki_ds.launch import distributed, heartbeat


class Replicated:
    """A rank with a whole copy of the teacher: it decides for itself, and takes over work of others."""

    leads = backs_up = adapts = True

    def task(self, find: Callable[[], int | None]) -> int | None:
        """The shard to compute next; None: there is none."""
        return find()

    def goes_on(self, wanted: bool) -> bool:
        """Before every forward pass: whether it is to be made, `wanted` by this rank.

        Raises:
            Stopped: it was asked for.
        """
        heartbeat.stop_if_asked()
        return wanted


class TensorParallel:
    """Ranks that each hold a part of every layer: the first decides, and all make the same forward passes."""

    backs_up, adapts = True, False

    def __init__(self, group: Any, first: int):
        self.group, self.first = group, first
        self.leads = distributed.rank() == first

    def task(self, find: Callable[[], int | None]) -> int | None:
        found = find() if self.leads else None
        number = self._said(-1 if found is None else found)
        return None if number < 0 else number

    def goes_on(self, wanted: bool) -> bool:
        word = self._said(-1 if heartbeat.asked_to_stop() else int(wanted))
        if word < 0:
            raise heartbeat.Stopped
        return bool(word)

    def _said(self, number: int) -> int:
        box = torch.tensor([number], device=_device())
        torch.distributed.broadcast(box, src=self.first, group=self.group)
        return int(box.item())


class Partitioned:
    """Ranks that hold a part of every parameter: each has a shard of its own, but all make their forward passes at the
    same time, those without a shard on a single sequence, until all are done."""

    leads, backs_up, adapts = True, False, False

    def __init__(self, idle: Callable[[], Any]):
        self.idle = idle

    def task(self, find: Callable[[], int | None]) -> int | None:
        found = find()
        while found is None and self._round(busy=False):
            self.idle()
        return found

    def goes_on(self, wanted: bool) -> bool:
        return self._round(busy=True)

    def _round(self, busy: bool) -> bool:
        signs = torch.tensor([int(busy), int(heartbeat.asked_to_stop())], device=_device())
        if not busy:
            heartbeat.report("helping other ranks with their shards")
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(signs, torch.distributed.ReduceOp.MAX)
        anyone, stop = signs.tolist()
        if stop:
            raise heartbeat.Stopped
        return bool(anyone)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
