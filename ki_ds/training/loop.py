"""Stage: tokens + targets → model.  The loop reads like equation 3 of the paper.

L_t = (1 - α_t) CE + α_t τ² KL(teacher ‖ student), a mean over all rows of the step's global batch
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ki_ds.corpus.hashing import derive_key
from ki_ds.corpus.masking import Viewer
from ki_ds.engine import checkpoints
from ki_ds.engine.engine import Engine
from ki_ds.errors import UserError
from ki_ds.experiment.schedules import alpha
from ki_ds.experiment.schema import Inherit, Train
from ki_ds.launch import distributed, heartbeat
from ki_ds.metrics import Metrics
from ki_ds.progress import Progress
from ki_ds.training.batches import Loader, MicroBatch
from ki_ds.training.validation import perplexity, validate

MOST_SKIPPED = 10  # steps in a row


@dataclass(frozen=True)
class TrainRun:
    """What a model is trained on and how."""

    train: Train
    inherit: Inherit | None
    seed: int
    sequence_length: int
    validation: dict[str, tuple[np.ndarray, Viewer]]  # of each corpus: tokens [sequences, S]


def learning_rate(train: Train, step: int) -> float:
    """Of step 0 … T - 1: linear from lr / warm-up steps to lr, then linear to lr / remaining steps, never zero."""
    warmup = round(train.warmup * train.steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    return train.learning_rate * (train.steps - step) / (train.steps - warmup)


def run(
    engine: Engine, loader: Loader, course: TrainRun, folder: Path, state: dict[str, Any], device: torch.device
) -> None:
    """Train to the last step, from the latest checkpoint where there is one.

    Raises:
        UserError: the loss is not finite for several steps, or at every loss scale of fp16; a target is damaged or
            misaligned; the disk is full.
        Stopped: a signal asked for it; a checkpoint is saved.
    """
    train, inherit = course.train, course.inherit
    saved = folder / "checkpoints"
    first = checkpoints.resume(engine.deepspeed, saved, state)
    main = distributed.rank() == 0
    metrics = Metrics(folder, first) if main else None
    seconds, skipped = metrics.seconds if metrics else 0.0, 0
    engine.deepspeed.train()  # a loaded model comes in evaluation mode, without dropout
    try:
        with Progress(f"train {folder.name}", train.steps, "steps", first, main) as progress:
            step = first
            while step < train.steps:
                heartbeat.report(f"train {folder.name}: step {step}")
                began = time.monotonic()
                a = alpha(inherit, step, train.steps)
                batch = loader(step, a, alpha(inherit, step + 1, train.steps))
                updated = update(engine, batch, course, step, folder.name, device)
                stop = updated.pop("stop")
                seconds += time.monotonic() - began
                skipped = 0 if updated["applied"] else skipped + 1
                if skipped > MOST_SKIPPED:
                    raise not_finite(course, step, folder.name, updated["loss_scale"])
                step += 1
                record = updated | {
                    "step": step, "tokens": step * train.batch_size * course.sequence_length, "seconds": seconds,
                    "alpha": a,
                    "tokens_per_second": train.batch_size * course.sequence_length / (time.monotonic() - began),
                    "reading_seconds": loader.reading_s, "waited_seconds": loader.waited_s,
                }  # fmt: skip
                if step % train.evaluation_steps == 0 or step == train.steps:
                    record["validation"] = evaluate(engine.deepspeed, course, loader.layout.micro_batch_size, device)
                if metrics:
                    metrics.write(record)
                engine.record(record)
                if step % train.checkpoint_steps == 0 or step == train.steps or stop:
                    if metrics:
                        metrics.sync()
                    checkpoints.save(engine.deepspeed, saved, step, train.keep_checkpoints, state)
                progress.advance(1, f"loss {record['loss']:.3f}" + (f", alpha {a:.2f}" if inherit else ""))
                if stop and step < train.steps:
                    raise heartbeat.Stopped
    finally:
        loader.close()
        if metrics:
            metrics.close()


def update(
    engine: Engine, batch: list[MicroBatch], course: TrainRun, step: int, name: str, device: torch.device
) -> dict[str, Any]:
    """One step: its record, with how often it was tried in vain (`skipped`) and the loss scale that it took.

    Where a dynamic loss scale lets fp16 overflow, the same step is tried again on the same batch, until the scale is
    low enough: α, learning rate, dropout and stream stand still.

    Raises:
        UserError: it overflows at the lowest loss scale too.
    """
    rate, scale = learning_rate(course.train, step), engine.loss_scale
    tried: list[float] = []
    while True:
        tried.append(scale.value if scale else 1.0)
        sums = accumulate(engine, batch, course, step, device)
        applied, norm = engine.step(rate)
        if applied or scale is None or scale.lowest is None:
            return sums | {
                "learning_rate": rate, "gradient_norm": norm, "applied": applied,
                "loss_scale": tried[-1] if scale else None, "skipped": len(tried) - 1,
            }  # fmt: skip
        if tried[-1] <= scale.lowest:
            raise overflow(course, step, name, tried, finite_loss=math.isfinite(sums["loss"] or 0.0))


def accumulate(
    engine: Engine, batch: list[MicroBatch], course: TrainRun, step: int, device: torch.device
) -> dict[str, Any]:
    """Forward and backward passes of one step; the means of loss, CE and KL over the global batch, and whether any
    rank was asked to stop (all must do it after the same step)."""
    world = distributed.world_size()
    own_rows, taught_rows = sum(len(micro.labels_N) for micro in batch), sum(micro.taught for micro in batch)
    counts = torch.tensor([own_rows, taught_rows, heartbeat.asked_to_stop()])
    rows, taught, stop = distributed.all_reduce(counts.to(device)).tolist()
    temperature = course.inherit.temperature if course.inherit else 1.0
    # dropout is a function of (seed, step, rank), so that a resumed run needs no saved random state
    torch.manual_seed(derive_key("dropout", course.seed, step, distributed.rank()) & ((1 << 63) - 1))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for micro in batch:
        heartbeat.count()
        result = engine.deepspeed(*micro.to(device), temperature)
        # DeepSpeed divides by micro-batches and averages over ranks; the mean wanted is over all rows
        engine.deepspeed.backward(result.loss * (world * len(batch) / max(rows, 1)))
        if micro is not batch[-1]:
            engine.deepspeed.step()
        sums += torch.stack([result.loss.detach(), result.ce, result.kl]).double()
    loss, ce, kl = distributed.all_reduce(sums).tolist()
    means = {"loss": loss / max(rows, 1), "ce": ce / max(rows, 1), "kl": kl / taught if taught else None}
    return means | {"stop": stop > 0}


def evaluate(model: Callable[..., Any], course: TrainRun, micro_batch: int, device: torch.device) -> dict[str, float]:
    """Validation perplexity on every corpus of the course."""
    engine: Any = model
    engine.eval()
    found = {
        name: perplexity(*validate(engine, tokens, viewer, micro_batch, device))
        for name, (tokens, viewer) in course.validation.items()
    }
    engine.train()
    return found


def counts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the records of a whole run say of steps that were not applied, as facts of its manifest."""
    return {
        "skipped_steps": sum(not line["applied"] for line in lines),  # passed over
        "skipped_tries": sum(line["skipped"] for line in lines),  # done again at a lower loss scale
        "loss_scale": lines[-1]["loss_scale"],  # of the last step
    }


def not_finite(course: TrainRun, step: int, name: str, scale: float | None) -> UserError:
    """The error of a run that diverged; `scale`: the fixed loss scale of fp16."""
    size = course.train.batch_size
    fixed = "" if scale is None else f"Leave fp16.loss_scale (now {scale:g}) out of the engine JSON: it adapts then. "
    return UserError(
        f"models.{name}: loss or gradient was not finite in {MOST_SKIPPED + 1} steps in a row, the last being step "
        f"{step}, samples {(step - MOST_SKIPPED) * size} to {(step + 1) * size}. {fixed}Lower "
        f"train.learning_rate (now {course.train.learning_rate:g}), or look at these sequences; the last checkpoint is "
        "from before."
    )


def overflow(course: TrainRun, step: int, name: str, tried: list[float], finite_loss: bool) -> UserError:
    """The error of a step that overflows fp16 at every loss scale; those that were tried."""
    size, last = course.train.batch_size, tried[-1]
    what = "the gradient overflows" if finite_loss else "the loss itself is not finite"
    least = "Lower fp16.min_loss_scale in the engine JSON. " if last > 1 and finite_loss else ""
    return UserError(
        f"models.{name}: step {step}, samples {step * size} to {(step + 1) * size}: {what} in fp16, also at "
        f"the lowest loss scale, {last:g} ({len(tried)} tries, the first at {tried[0]:g}). {least}Use an engine JSON "
        f"with bf16 or fp32, lower train.learning_rate (now {course.train.learning_rate:g}), or look at these "
        "sequences; the last checkpoint is from before."
    )
