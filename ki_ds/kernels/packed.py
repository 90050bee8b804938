"""Packed targets: what the loss reads, planes of small integers exactly as they are stored.

N positions, K kept ids a position.  log p_NK = const_N - quantum · steps_NK; a row with count 0 has no target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTargets:
    """Teacher predictions for N positions."""

    ids_NK: Tensor  # int16, the low 16 bits of the id
    high_NK: Tensor | None  # uint8, the bits above; None where the vocabulary fits in 16 bits
    steps_NK: Tensor  # uint8, quanta below the row's first log-probability
    count_N: Tensor  # int32, entries of the row that hold
    quantum: float  # nats

    def __len__(self) -> int:
        return self.ids_NK.shape[0]

    def rows(self, rows: slice) -> PackedTargets:
        """A run of rows, without copying."""
        high = None if self.high_NK is None else self.high_NK[rows]
        return PackedTargets(self.ids_NK[rows], high, self.steps_NK[rows], self.count_N[rows], self.quantum)

    def to(self, device: torch.device | str) -> PackedTargets:
        """The same targets on a device."""
        high = None if self.high_NK is None else self.high_NK.to(device, non_blocking=True)
        ids, steps, count = (x.to(device, non_blocking=True) for x in (self.ids_NK, self.steps_NK, self.count_N))
        return PackedTargets(ids, high, steps, count, self.quantum)

    def ids(self) -> Tensor:
        """int64 [N, K]; 0 where an entry does not hold."""
        ids = self.ids_NK.to(torch.int64) & 0xFFFF
        if self.high_NK is not None:
            ids = ids | (self.high_NK.to(torch.int64) << 16)
        return ids.masked_fill(~self.kept(), 0)

    def kept(self) -> Tensor:
        """bool [N, K]: which entries hold."""
        return torch.arange(self.ids_NK.shape[1], device=self.count_N.device)[None, :] < self.count_N[:, None]

    def log_probabilities(self, temperature: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]: tempered and renormalised over the kept entries (section 3); -inf where an entry does not hold."""
        scaled = self.steps_NK.to(dtype) * (-self.quantum / temperature)
        scaled = scaled.masked_fill(~self.kept(), -torch.inf)
        return torch.where(self.count_N[:, None] > 0, scaled.log_softmax(dim=1), scaled)
