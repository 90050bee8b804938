"""How many sequences a teacher computes at once: a fixed number, or found by doubling while that pays."""

from __future__ import annotations

import torch

from ki_ds.errors import UserError

MICRO_BATCH = 16  # sequences
WORTH = 1.05  # so much faster must twice the micro-batch be, to be kept
REMEDY = (
    'Expected more memory, or in "inference" of the experiment file: "precision": "bf16", or "tensor_parallel": 2 or '
    'more, or "engine": a DeepSpeed JSON with ZeRO stage 3'
)


class MicroBatchFinder:
    """How many sequences are computed at once: a fixed number, or found by doubling."""

    def __init__(self, size: int, growing: bool, halving: bool):
        self.size, self.growing, self.halving = size, growing, halving
        self.rates: dict[int, float] = {}  # sequences a second, the best of two
        self.seen = 0

    def took(self, sequences: int, seconds: float) -> None:
        """Hear how long a micro-batch took, and double the size while that pays."""
        if not self.growing or sequences < self.size:
            return
        self.rates[self.size] = max(self.rates.get(self.size, 0.0), sequences / max(seconds, 1e-9))
        self.seen += 1
        if self.seen < 2:  # the first of a size may pay for what later ones find ready
            return
        self.seen = 0
        if self.size // 2 in self.rates and self.rates[self.size] < WORTH * self.rates[self.size // 2]:
            self.size, self.growing = self.size // 2, False
        else:
            self.size *= 2

    def failed(self, sequences: int, place: str) -> None:
        """Hear that memory was short for so many sequences; the next try is for half of them.

        Raises:
            UserError: there is nothing to halve.
        """
        if not self.halving:
            raise UserError(
                f"{place}: memory was short for {sequences} sequences at once. Expected a smaller "
                "inference.micro_batch_size"
            )
        if sequences == 1:
            raise UserError(f"{place}: memory was short for a single sequence. {REMEDY}")
        self.size, self.growing = sequences // 2, False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
