"""Stage: tokens + targets → model.  The loop reads like equation 3 of the paper.

L_t = (1 - α_t) CE + α_t τ² KL(teacher ‖ student), a mean over all target positions of the step's global batch
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ki_ds import checkpoints, distributed
from ki_ds.batches import Loader, MicroBatch
from ki_ds.corpus.hashing import derive_key
from ki_ds.corpus.masking import Viewer
from ki_ds.engine import Engine
from ki_ds.errors import UserError
from ki_ds.experiment import Inherit, Train
from ki_ds.inherit import alpha
from ki_ds.perplexity import perplexity, validate
from ki_ds.progress import Metrics, Progress

MOST_SKIPPED = 10  # steps in a row


@dataclass(frozen=True)
class Course:
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
    engine: Engine, loader: Loader, course: Course, folder: Path, state: dict[str, Any], device: torch.device
) -> None:
    """Train to the last step, from the latest checkpoint where there is one.

    Raises:
        UserError: the loss is not finite for several steps; a target is damaged or misaligned; the disk is full.
    """
    train, inherit = course.train, course.inherit
    saved = folder / "checkpoints"
    first = checkpoints.resume(engine.deepspeed, saved, state)
    main = distributed.rank() == 0
    metrics = Metrics(folder, first) if main else None
    seconds, skipped = metrics.seconds if metrics else 0.0, 0
    engine.deepspeed.train()  # a loaded model comes in evaluation mode, without dropout
    with Progress(f"train {folder.name}", train.steps, "steps", first, main) as progress:
        step = first
        while step < train.steps:
            began = time.monotonic()
            a = alpha(inherit, step, train.steps)
            batch = loader(step, a, alpha(inherit, step + 1, train.steps))
            sums = accumulate(engine, batch, course, step, device)
            rate = learning_rate(train, step)
            applied, norm = engine.step(rate)
            seconds += time.monotonic() - began
            skipped = 0 if applied else skipped + 1
            if skipped > MOST_SKIPPED:
                raise not_finite(course, step, folder.name, engine.fp16)
            if not applied and engine.fp16:
                continue  # the loss scale is lower now: the same step again
            step += 1
            record = sums | {
                "step": step, "tokens": step * train.batch_size * course.sequence_length, "seconds": seconds,
                "alpha": a, "learning_rate": rate, "gradient_norm": norm, "applied": applied,
                "tokens_per_second": train.batch_size * course.sequence_length / (time.monotonic() - began),
                "reading_seconds": loader.reading_s, "waited_seconds": loader.waited_s,
            }  # fmt: skip
            if step % train.evaluation_steps == 0 or step == train.steps:
                record["validation"] = evaluate(engine.deepspeed, course, loader.plan.micro_batch_size, device)
            if metrics:
                metrics.write(record)
            if step % train.checkpoint_steps == 0 or step == train.steps:
                checkpoints.save(engine.deepspeed, saved, step, train.keep_checkpoints, state)
            progress.advance(1, f"loss {sums['loss']:.3f}" + (f", alpha {a:.2f}" if inherit else ""))
    loader.close()
    if metrics:
        metrics.close()


def accumulate(
    engine: Engine, batch: list[MicroBatch], course: Course, step: int, device: torch.device
) -> dict[str, float | None]:
    """Forward and backward passes of one step; the means of loss, CE and KL over the global batch."""
    world = distributed.world_size()
    counts = torch.tensor([sum(len(micro.labels_N) for micro in batch), sum(micro.taught for micro in batch)])
    targets, taught = distributed.all_sum(counts.to(device)).tolist()
    temperature = course.inherit.temperature if course.inherit else 1.0
    # dropout is a function of (seed, step, rank), so that a resumed run needs no saved random state
    torch.manual_seed(derive_key("dropout", course.seed, step, distributed.rank()) & ((1 << 63) - 1))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for micro in batch:
        result = engine.deepspeed(*micro.to(device), temperature)
        # DeepSpeed divides by micro-batches and averages over ranks; the mean wanted is over all target positions
        engine.deepspeed.backward(result.loss * (world * len(batch) / max(targets, 1)))
        if micro is not batch[-1]:
            engine.deepspeed.step()
        sums += torch.stack([result.loss.detach(), result.ce, result.kl]).double()
    loss, ce, kl = distributed.all_sum(sums).tolist()
    return {"loss": loss / max(targets, 1), "ce": ce / max(targets, 1), "kl": kl / taught if taught else None}


def evaluate(model: Callable[..., Any], course: Course, micro_batch: int, device: torch.device) -> dict[str, float]:
    """Validation perplexity on every corpus of the course."""
    engine: Any = model
    engine.eval()
    found = {
        name: perplexity(*validate(engine, tokens, viewer, micro_batch, device))
        for name, (tokens, viewer) in course.validation.items()
    }
    engine.train()
    return found


def not_finite(course: Course, step: int, name: str, again: bool) -> UserError:
    """The error of a run that diverged; `again`: the same step was tried over and over."""
    size = course.train.batch_size
    begin = (step if again else step - MOST_SKIPPED) * size
    return UserError(
        f"models.{name}: loss or gradient was not finite in {MOST_SKIPPED + 1} steps in a row, the last being step "
        f"{step}, stream positions {begin} to {(step + 1) * size}. Lower train.learning_rate (now "
        f"{course.train.learning_rate:g}), or look at these sequences; the last checkpoint is from before."
    )
