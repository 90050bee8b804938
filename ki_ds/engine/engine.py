"""The DeepSpeed engine: the engine JSON joined with the experiment's numbers, stepped with a given learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ki_ds.engine import checkpoints, features, optimizers
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.engine.config import EngineConfig
from ki_ds.engine.loss_scale import LossScale
from ki_ds.errors import UserError, reason
from ki_ds.experiment.schema import Train
from ki_ds.kernels import KILoss
from ki_ds.models.language_model import LanguageModel


class Engine:
    """A DeepSpeed engine around a language model, stepped with a learning rate given at every step."""

    def __init__(self, model: LanguageModel, train: Train, layout: BatchLayout, config: EngineConfig):
        import deepspeed

        features.prepare(model, config)
        self.bare, self.source = config.zero_stage == 0, config.source
        self.compile_errors = features.compile_errors(config)
        optimizer = optimizers.new(model, train, config)
        joined = {
            **config.for_deepspeed,
            "train_batch_size": layout.batch_size,
            "train_micro_batch_size_per_gpu": layout.micro_batch_size,
            "gradient_accumulation_steps": layout.accumulation,
            "gradient_clipping": 0.0 if self.bare else train.gradient_clipping,
            "steps_per_print": 1 << 40,
        }
        self.muon = train.optimizer == "muon"
        if self.muon and config.zero_stage == 3:  # DeepSpeed's Muon does not go with it there
            joined["zero_optimization"] = {**joined["zero_optimization"], "reduce_scatter": False}
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=joined, dist_init_required=False
        )
        self.optimizer = optimizer
        if config.zero_stage in (1, 2):  # they check in half precision only
            self.deepspeed.optimizer.check_grad_overflow = True
        self.loss_scale = LossScale(self.deepspeed.optimizer) if config.precision == "fp16" else None

    @property
    def device(self) -> torch.device:
        """Where the model is, and its inputs are expected."""
        return torch.device(self.deepspeed.device)

    def train(self) -> None:
        """To training mode, with dropout."""
        self.deepspeed.train()

    def eval(self) -> None:
        """To evaluation mode."""
        self.deepspeed.eval()

    def __call__(self, *inputs: Any) -> KILoss:
        """The model's forward pass, on every rank.

        Raises:
            UserError: it is to be compiled, and cannot be.
        """
        try:
            result: KILoss = self.deepspeed(*inputs)
        except self.compile_errors as error:
            raise UserError(
                f"{self.source}: ki_ds.compile: torch.compile cannot compile this model ({reason(error)}); leave it out"
            ) from None
        return result

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradients, divided by micro-batches and ranks, to the step's; `last`: `step` follows."""
        self.deepspeed.backward(loss)
        if not last:
            self.deepspeed.step()  # which counts the micro-batch

    def step(self, learning_rate: float) -> tuple[bool, float]:
        """Apply the accumulated gradients: (whether they were finite and applied, their norm before clipping)."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("ratio", 1.0)
        self.deepspeed.step()
        guarded = self.optimizer if isinstance(self.optimizer, optimizers.ClippedOptimizer) else None
        # with Muon DeepSpeed's norm is that of the matrices' orthogonalized updates
        norm = None if self.muon else guarded.norm if guarded else self.deepspeed.get_global_grad_norm()
        applied = bool(self.deepspeed.was_step_applied())
        if applied and self.loss_scale:
            self.loss_scale.applied()
        return applied, float("nan") if norm is None else float(norm)

    def record(self, values: dict[str, Any]) -> None:
        """Give the numbers of a step to the monitors that the engine JSON enables; rank 0 alone writes."""
        monitor, samples = self.deepspeed.monitor, self.deepspeed.global_samples
        if monitor.enabled:
            flat = {**values, **{f"perplexity/{name}": x for name, x in values.get("validation", {}).items()}}
            numbers = {name: float(x) for name, x in flat.items() if isinstance(x, int | float)}
            monitor.write_events([(f"Train/{name}", x, samples) for name, x in numbers.items()])

    def resume(self, folder: Path, state: dict[str, Any], trusted: bool) -> int:
        """Go on from the last whole checkpoint: the number of steps done, as `checkpoints.resume` says."""
        return checkpoints.resume(self.deepspeed, folder, state, trusted)

    def save(self, folder: Path, step: int, keep: int, state: dict[str, Any], always: int = 0) -> None:
        """Write checkpoint `step`, as `checkpoints.save` says."""
        checkpoints.save(self.deepspeed, folder, step, keep, state, always)

    def export(self, folder: Path) -> None:
        """Write the finished model as a Hugging Face folder; afterwards this engine must not be used."""
        checkpoints.export(self.deepspeed, folder)
