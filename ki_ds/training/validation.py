"""Validation: the mean cross-entropy over the fixed rows of a held-out part, shared among the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ki_ds.corpus.masking import VALIDATION_VIEW, Viewer
from ki_ds.engine.engine import Engine
from ki_ds.launch import distributed, heartbeat
from ki_ds.progress import Progress
from ki_ds.training.batches import host_tensor
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
            name: perplexity(*validate(engine, tokens, viewer, self.micro_batch, engine.device))
            for name, (tokens, viewer) in self.parts.items()
        }
        engine.train()
        return found


@torch.no_grad()
def validate(
    model: Callable[..., Any],
    tokens: np.ndarray,
    viewer: Viewer,
    micro_batch: int,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[float, int]:
    """Cross-entropy over a validation part under its fixed view; every rank calls this.

    Every rank makes the same number of forward passes, since ZeRO-3 gathers parameters in each.

    Args:
        model: a LanguageModel, or the engine around it, in evaluation mode.
        tokens: [sequences, S].

    Returns:
        (sum in nats, number of rows) over all ranks.
    """
    world = distributed.world_size()
    nats, count = torch.zeros((), dtype=torch.float64, device=device), 0
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
        result = model(*(host_tensor(array).to(device, non_blocking=True) for array in given))
        if mine:
            nats += result.ce.double()
            count += len(rows)
        if progress is not None:
            progress.advance(min(micro_batch * world, len(tokens) - start))
    total, rows_of_all = distributed.all_reduce(torch.stack([nats, torch.full_like(nats, count)])).tolist()
    return total, int(rows_of_all)


def perplexity(nats: float, rows: int) -> float:
    """exp of the mean cross-entropy; infinite where it overflows, not a number where there is no row."""
    if not rows:
        return math.nan
    try:
        return math.exp(nats / rows)
    except OverflowError:
        return math.inf
