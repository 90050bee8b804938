"""The DeepSpeed engine: the engine JSON joined with the experiment's numbers, stepped with a given learning rate."""

from __future__ import annotations

from typing import Any

import torch

from ki_ds import engine_config
from ki_ds.batches import Plan
from ki_ds.experiment import Train
from ki_ds.language_model import LanguageModel
from ki_ds.loss_scale import LossScale
from ki_ds.optimizers import GuardedAdamW


class Engine:
    """A DeepSpeed engine around a language model, stepped with a learning rate given at every step."""

    def __init__(self, model: LanguageModel, train: Train, plan: Plan, config: dict[str, Any]):
        import deepspeed

        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]  # biases and norms do not decay (Devlin et al. 2019)
        self.bare = engine_config.stage(config) == 0
        optimizer = (GuardedAdamW if self.bare else torch.optim.AdamW)(
            [{"params": matrices, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=train.learning_rate, betas=train.betas, eps=train.epsilon, fused=True,
        )  # fmt: skip
        if isinstance(optimizer, GuardedAdamW):
            optimizer.clip = train.gradient_clipping
        joined = {
            **{key: value for key, value in config.items() if key not in engine_config.OWNED},
            "train_batch_size": plan.batch_size,
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.accumulation,
            "gradient_clipping": 0.0 if self.bare else train.gradient_clipping,
            "steps_per_print": 1 << 40,
        }
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=joined, dist_init_required=False
        )
        self.optimizer = optimizer
        if engine_config.stage(config) in (1, 2):  # they check in half precision only
            self.deepspeed.optimizer.check_grad_overflow = True
        fp16 = config.get("fp16", {}).get("enabled")
        self.loss_scale = LossScale(self.deepspeed.optimizer) if fp16 else None

    def step(self, learning_rate: float) -> tuple[bool, float]:
        """Apply the accumulated gradients: (whether they were finite and applied, their norm before clipping)."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        norm = (
            self.optimizer.norm if isinstance(self.optimizer, GuardedAdamW) else self.deepspeed.get_global_grad_norm()
        )
        applied = bool(self.deepspeed.was_step_applied())
        if applied and self.loss_scale:
            self.loss_scale.applied()
        return applied, float("nan") if norm is None else float(norm)
