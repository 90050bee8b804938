"""The DeepSpeed engine: the engine JSON joined with the experiment's numbers, stepped with a given learning rate."""

from __future__ import annotations

from typing import Any

from ki_ds.engine import features, optimizers
from ki_ds.engine.config import EngineConfig
from ki_ds.engine.loss_scale import LossScale
from ki_ds.experiment.schema import Train
from ki_ds.models.language_model import LanguageModel
from ki_ds.training.batches import BatchLayout


class Engine:
    """A DeepSpeed engine around a language model, stepped with a learning rate given at every step."""

    def __init__(self, model: LanguageModel, train: Train, layout: BatchLayout, config: EngineConfig):
        import deepspeed

        features.prepare(model, config)
        self.bare = config.zero_stage == 0
        optimizer = optimizers.new(model, train, config)
        joined = {
            **config.for_deepspeed,
            "train_batch_size": layout.batch_size,
            "train_micro_batch_size_per_gpu": layout.micro_batch_size,
            "gradient_accumulation_steps": layout.accumulation,
            "gradient_clipping": 0.0 if self.bare else train.gradient_clipping,
            "steps_per_print": 1 << 40,
        }
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=joined, dist_init_required=False
        )
        self.optimizer = optimizer
        if config.zero_stage in (1, 2):  # they check in half precision only
            self.deepspeed.optimizer.check_grad_overflow = True
        self.loss_scale = LossScale(self.deepspeed.optimizer) if config.precision == "fp16" else None

    def step(self, learning_rate: float) -> tuple[bool, float]:
        """Apply the accumulated gradients: (whether they were finite and applied, their norm before clipping)."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        guarded = self.optimizer if isinstance(self.optimizer, optimizers.ClippedOptimizer) else None
        norm = guarded.norm if guarded else self.deepspeed.get_global_grad_norm()
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
