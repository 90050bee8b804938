"""The training loop.  It reads like equation 3 of the paper.

L_t = (1 - α_t) CE + α_t τ² KL(teacher ‖ student), a mean over all rows of the step's global batch
"""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ki_ds.corpus.hashing import derive_key
from ki_ds.engine.engine import Engine
from ki_ds.experiment.schedules import learning_rate
from ki_ds.launch import distributed, heartbeat
from ki_ds.pinned import host_tensor
from ki_ds.progress import Progress
from ki_ds.training.batches import Batch
from ki_ds.training.divergence import DivergenceWatch, SkippedSteps, overflow
from ki_ds.training.loader import Loader
from ki_ds.training.records import CorpusMeans, Records, StepResult
from ki_ds.training.run import Checkpoints, TrainRun
from ki_ds.training.validation import Validation


def train(
    engine: Engine, loader: Loader, run: TrainRun, folder: Path, state: dict[str, Any], trusted: bool = False
) -> None:
    """Train to the last step, from the latest checkpoint where there is one; the loader is closed in the end.

    Args:
        folder: of the model: checkpoints, metrics.jsonl and TensorBoard are written to it.
        state: names the run in its checkpoints.
        trusted: checkpoints are gone on from whoever wrote them.

    Raises:
        UserError: the loss is not finite for several steps, or at every loss scale of fp16; a target is damaged or
            misaligned; the metrics up to the checkpoint are not whole; the disk is full.
        Stopped: a signal asked for it; a checkpoint is saved.
    """
    steps, label = run.train.steps, f"train {run.name}"
    checkpoints = Checkpoints(folder / "checkpoints", run, state, trusted)
    validation = Validation(run, loader.layout.micro_batch_size)
    first, skipped = checkpoints.resume(engine), SkippedSteps(run)
    progress = Progress(label, steps, "steps", first, distributed.rank() == 0)
    engine.train()  # a loaded model comes in evaluation mode, without dropout
    with closing(loader), Records(run, loader, folder, first) as records, progress:
        if first == 0:
            engine.record(records.begin(validation(engine)))
        watch = DivergenceWatch(run, records.first_perplexity)
        for step in range(first, steps):
            heartbeat.report(f"{label}: step {step}")
            with records.timed():
                result = update(engine, loader(step), run)
            skipped.count(result)
            perplexity = validation(engine) if validation.due(result.done) else None
            watch(result, perplexity)
            engine.record(records.write(result, perplexity))
            if checkpoints.due(result.done) or result.asked_to_stop:
                records.sync()
                checkpoints.save(engine, result.done)
            progress.advance(1, result.words)
            if result.asked_to_stop and result.done < steps:
                raise heartbeat.Stopped


def update(engine: Engine, batch: Batch, run: TrainRun) -> StepResult:
    """One step.

    Where a dynamic loss scale lets fp16 overflow, the same step is tried again on the same batch, until the scale is
    low enough: α, learning rate, dropout and stream stand still.

    Raises:
        UserError: it overflows at the lowest loss scale too.
    """
    rate, scale = learning_rate(run.train, batch.step), engine.loss_scale
    tried: list[float] = []
    while True:
        tried.append(scale.value if scale else 1.0)
        sums_on_device = accumulate(engine, batch, run)
        applied, norm = engine.step(rate)
        if applied or scale is None or scale.lowest is None:
            break
        if tried[-1] <= scale.lowest:
            loss = Sums.of(sums_on_device, run).loss
            raise overflow(run, batch.step, tried, finite_loss=math.isfinite(loss))
    sums = Sums.of(sums_on_device, run)
    return StepResult(
        batch.step, batch.alpha, *sums.means, run.temperature, sums.means_by_corpus, rate, norm, applied,
        loss_scale=tried[-1] if scale else None, skipped=len(tried) - 1, asked_to_stop=sums.asked_to_stop > 0,
    )  # fmt: skip


class Sums(NamedTuple):
    """Over the global batch of a step; as one tensor loss, CE, KL, `asked_to_stop`, rows, taught, in this order."""

    loss: float  # nats
    ce: dict[str, float]  # by corpus
    kl: dict[str, float]
    asked_to_stop: float  # ranks; all must stop after the same step
    rows: dict[str, float]
    taught: dict[str, float]  # rows that inherit

    @classmethod
    def of(cls, sums: Tensor, run: TrainRun) -> Sums:
        """From the device; waits for it."""
        values, names = iter(sums.tolist()), list(run.train.on)

        def by_corpus() -> dict[str, float]:
            return {name: next(values) for name in names}

        return cls(next(values), by_corpus(), by_corpus(), next(values), by_corpus(), by_corpus())

    @property
    def means(self) -> tuple[float, float, float | None]:
        """Loss and CE of a row, KL of a row that inherits."""
        ce, kl, rows, taught = (sum(of.values()) for of in (self.ce, self.kl, self.rows, self.taught))
        return self.loss / max(rows, 1), ce / max(rows, 1), kl / taught if taught else None

    @property
    def means_by_corpus(self) -> dict[str, CorpusMeans]:
        """CE and KL alike; None where a corpus has no such row in this step."""
        return {
            name: CorpusMeans(
                self.ce[name] / rows if rows else None,
                self.kl[name] / self.taught[name] if self.taught[name] else None,
            )
            for name, rows in self.rows.items()
        }


def accumulate(engine: Engine, batch: Batch, run: TrainRun) -> Tensor:
    """Forward and backward passes of a step: its `Sums` over all ranks, float64, left on the device."""
    device, count, corpora = engine.device, len(batch.micro_batches), len(run.train.on)
    counts_2C = batch.counts(corpora)
    rows = distributed.all_reduce(torch.full((), int(counts_2C[0].sum()), dtype=torch.float64, device=device))
    # DeepSpeed divides by micro-batches and averages over ranks; the mean wanted is over all rows
    share = torch.full_like(rows, distributed.world_size() * count) / rows.clamp(min=1)
    # dropout is a function of (seed, step, rank), so that a resumed run needs no saved random state
    torch.manual_seed(derive_key("dropout", run.seed, batch.step, distributed.rank()) & ((1 << 63) - 1))
    loss, sums_2C = rows.new_zeros(()), rows.new_zeros(2, corpora)  # CE and KL by corpus
    numbers_C1 = torch.arange(corpora, device=device)[:, None]
    for number, micro in enumerate(batch.micro_batches, 1):
        heartbeat.count()
        result = engine(*micro.to(device), run.temperature)
        engine.backward(result.loss * share.to(result.loss.dtype), last=number == count)
        loss += result.loss.detach().double()
        in_corpus_CN = micro.corpus_N.to(device, non_blocking=True) == numbers_C1
        found_2N = torch.stack([result.ce_N, result.kl_N]).double()
        sums_2C += torch.where(in_corpus_CN, found_2N[:, None], 0).sum(dim=2)  # a NaN stays in its corpus
    known = host_tensor(np.array([heartbeat.asked_to_stop(), *counts_2C.flat], np.float64))
    return distributed.all_reduce(torch.cat([loss[None], sums_2C.flatten(), known.to(device, non_blocking=True)]))
