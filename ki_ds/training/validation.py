"""Validation: the mean cross-entropy over the fixed rows of a held-out part, shared among the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ki_ds.corpus.masking import VALIDATION_VIEW, Viewer
from ki_ds.launch import distributed, heartbeat
from ki_ds.progress import Progress


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
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(tokens), micro_batch * world):
        begin = start + distributed.rank() * micro_batch
        sequences = np.arange(begin, min(begin + micro_batch, len(tokens)))
        heartbeat.report(f"validating, sequence {begin} of {len(tokens)}")
        mine = len(sequences) > 0
        if not mine:
            sequences = np.zeros(1, np.int64)  # a forward pass that counts for nothing
        view = viewer(tokens[sequences], sequences, np.full(len(sequences), VALIDATION_VIEW))
        rows = np.flatnonzero(view.loss_mask_BS)
        labels = torch.from_numpy(view.labels_BS.reshape(-1)[rows]).long()
        result = model(
            torch.from_numpy(view.inputs_BS).long().to(device), torch.from_numpy(rows).to(device), labels.to(device)
        )
        if mine:
            total += torch.tensor([float(result.ce), len(rows)], dtype=torch.float64)
        if progress is not None:
            progress.advance(min(micro_batch * world, len(tokens) - start))
    on_device = total.to(device) if device.type != "cpu" else total
    nats, all_rows = distributed.all_reduce(on_device).tolist()
    return nats, int(all_rows)


def perplexity(nats: float, rows: int) -> float:
    """exp of the mean cross-entropy; infinite where it overflows, not a number where there is no row."""
    if not rows:
        return math.nan
    try:
        return math.exp(nats / rows)
    except OverflowError:
        return math.inf
