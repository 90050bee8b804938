"""Optimizers by name."""

from __future__ import annotations

from typing import Any

import torch


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips, and skips a step that is not finite: at ZeRO 0 DeepSpeed leaves both to the optimizer."""

    clip = 0.0
    overflow = False  # DeepSpeed reads this after the step
    norm: float | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"))
        self.norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        return None if self.overflow else super().step(closure)
