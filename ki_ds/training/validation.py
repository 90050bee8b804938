"""Validation: the mean cross-entropy over the fixed rows of a held-out part, shared among the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ki_ds.corpus.masking import VALIDATION_VIEW, Viewer
from ki_ds.engine.engine import Engine
from ki_ds.launch import distributed, heartbeat
from ki_ds.pinned import host_tensor
from ki_ds.progress import Progress
from ki_ds.training.run import Every, TrainRun


class Validation:
    """Validation perplexity on every corpus of a run, every so many of its steps."""

    def __init__(self, run: TrainRun, micro_batch: int):
        """`micro_batch`: sequences a rank computes at once."""
        self.parts, self.micro_batch = run.validation, micro_batch
        self.due = Every(run.train.evaluation_steps, run.train.steps).due

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Perplexity by corpus; every rank calls this."""
        engine.eval()
        found = {
            name: validate(engine, tokens, viewer, self.micro_batch, engine.device).perplexity
            for name, (tokens, viewer) in self.parts.items()
        }
        engine.train()
        return found


@dataclass(frozen=True)
class Validated:
    """The cross-entropy over a validation part."""

    nats_T: np.ndarray  # float64: the sum of each sequence
    rows: int

    @property
    def nats(self) -> float:
        """The mean of a row; not a number where there is none."""
        return float(self.nats_T.sum()) / self.rows if self.rows else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where it overflows."""
        try:
            return math.exp(self.nats)
        except OverflowError:
            return math.inf


@torch.no_grad()
def validate(
    model: Callable[..., Any],
    tokens: np.ndarray,
    viewer: Viewer,
    micro_batch: int,
    device: torch.device,
    progress: Progress | None = None,
) -> Validated:
    """Cross-entropy over a validation part under its fixed view; every rank calls this.

    Every rank makes the same number of forward passes, since ZeRO-3 gathers parameters in each.

    Args:
        model: a LanguageModel, or the engine around it, in evaluation mode.
        tokens: [T, S], T sequences.
    """
    world = distributed.world_size()
    nats_T, count = torch.zeros(len(tokens), dtype=torch.float64, device=device), 0
    for start in range(0, len(tokens), micro_batch * world):
        begin = start + distributed.rank() * micro_batch
        sequences = np.arange(begin, min(begin + micro_batch, len(tokens)))
        heartbeat.report(f"validating, sequence {begin} of {len(tokens)}")
        mine = len(sequences) > 0
        if not mine:
            sequences = np.zeros(1, np.int64)  # a forward pass that counts for nothing
        view = viewer(tokens[sequences], sequences, np.full(len(sequences), VALIDATION_VIEW))
        rows = np.flatnonzero(view.loss_mask_BS)
        given = (view.inputs_BS.astype(np.int64), rows, view.labels_BS.reshape(-1)[rows].astype(np.int64))
        inputs_BS, rows_N, labels_N = (host_tensor(array).to(device, non_blocking=True) for array in given)
        ce_N = model(inputs_BS, rows_N, labels_N).ce_N.double()
        if mine:
            spread = ce_N.new_zeros(inputs_BS.numel())
            spread[rows_N] = ce_N
            nats_T[sequences[0] : sequences[-1] + 1] = spread.view(inputs_BS.shape).sum(dim=1)
            count += len(rows)
        if progress is not None:
            progress.advance(min(micro_batch * world, len(tokens) - start))
    total = distributed.all_reduce(torch.cat([nats_T, nats_T.new_full((1,), count)])).cpu().numpy()
    return Validated(total[:-1], int(total[-1]))
