"""How a global batch falls to ranks and micro-batches, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchLayout:
    """How the stream is cut: sequences a step, over all ranks, and at once on one rank."""

    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    @property
    def per_rank(self) -> int:
        return self.batch_size // self.world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches a step and rank."""
        return self.per_rank // self.micro_batch_size

    def samples(self, step: int) -> np.ndarray:
        """Stream samples of this rank at a step: int64 [per_rank]."""
        start = step * self.batch_size + self.rank * self.per_rank
        return np.arange(start, start + self.per_rank)
