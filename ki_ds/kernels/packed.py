"""Packed targets: what the loss reads, planes of small integers exactly as they are stored.

N rows, K kept ids a row. A row with count 0 has no target. The teacher's probabilities at temperature τ:

    p_nk ∝ exp(-D(values_nk) / τ)             where D is `ki_ds.targets.quanta.nats_below`; renormalised over the kept
                                              ids, or, with a tail, over these and one outcome more, "any other id"
    p_n,tail ∝ exp(tail_n)                    where tail_n is its log weight at this very τ
    p_nk = values_nk / Σ_k values_nk          where the quantum is 0: counts of draws from the distribution at τ
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ki_ds.targets.quanta import nats_below


@dataclass(frozen=True)
class PackedTargets:
    """Teacher predictions for N rows."""

    ids_NK: Tensor  # int16, the low 16 bits of the id
    high_NK: Tensor | None  # uint8, the bits above; None where the vocabulary fits in 16 bits
    values_NK: Tensor  # uint8, how far below the row's most probable id; or counts
    count_N: Tensor  # int32, entries of the row that hold
    quantum: float  # nats; 0: the values are counts
    tail_N: Tensor | None = None  # float32, log of the tail's weight over the most probable id's; -inf: no tail

    def __len__(self) -> int:
        return self.ids_NK.shape[0]

    @property
    def counts(self) -> bool:
        """Whether the values are counts of draws, and not log-probabilities."""
        return self.quantum == 0

    def check(self, rows: int) -> None:
        """Check that all planes belong to so many rows of one length.

        Raises:
            ValueError: they do not.
        """
        planes = {"ids": self.ids_NK, "high": self.high_NK, "values": self.values_NK}
        whole = (rows, *self.ids_NK.shape[1:2])
        for name, found, expected in [
            *((name, plane, whole) for name, plane in planes.items()),
            *((name, column, (rows,)) for name, column in (("count", self.count_N), ("tail", self.tail_N))),
        ]:
            if found is not None and found.shape != expected:
                raise ValueError(f"targets: {name} of shape {tuple(found.shape)}; expected {expected}")

    def rows(self, rows: slice) -> PackedTargets:
        """A run of rows, without copying."""
        high = None if self.high_NK is None else self.high_NK[rows]
        tail = None if self.tail_N is None else self.tail_N[rows]
        return PackedTargets(self.ids_NK[rows], high, self.values_NK[rows], self.count_N[rows], self.quantum, tail)

    def to(self, device: torch.device | str) -> PackedTargets:
        """The same targets on a device."""
        high = None if self.high_NK is None else self.high_NK.to(device, non_blocking=True)
        tail = None if self.tail_N is None else self.tail_N.to(device, non_blocking=True)
        ids, values, count = (x.to(device, non_blocking=True) for x in (self.ids_NK, self.values_NK, self.count_N))
        return PackedTargets(ids, high, values, count, self.quantum, tail)

    def ids(self) -> Tensor:
        """int64 [N, K]; 0 where an entry does not hold."""
        ids = self.ids_NK.to(torch.int64) & 0xFFFF
        if self.high_NK is not None:
            ids = ids | (self.high_NK.to(torch.int64) << 16)
        return ids.masked_fill(~self.kept(), 0)

    def kept(self) -> Tensor:
        """bool [N, K]: which entries hold."""
        return torch.arange(self.ids_NK.shape[1], device=self.count_N.device)[None, :] < self.count_N[:, None]

    def log_probabilities(self, temperature: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """[N, K] of the kept entries (section 3), and [N] of the tail where there is one; -inf where nothing holds."""
        values = self.values_NK.to(dtype)
        weights = values.log() if self.counts else nats_below(values, -self.quantum / temperature)
        weights = weights.masked_fill(~self.kept(), -torch.inf)
        some = self.count_N > 0
        if self.tail_N is None:
            return torch.where(some[:, None], weights.log_softmax(dim=1), weights), None
        tail = self.tail_N.to(dtype).masked_fill(~some, -torch.inf)
        normaliser = torch.logaddexp(weights.logsumexp(dim=1), tail).masked_fill(~some, 0)
        return weights - normaliser[:, None], tail - normaliser
