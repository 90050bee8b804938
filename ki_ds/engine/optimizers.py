"""Optimizers: the experiment names the algorithm (`train.optimizer`), the engine JSON the implementation.

`optimizer.type` of the engine JSON: absent is torch's fused AdamW (nothing to compile), or DeepSpeed's CPUAdam where
the optimizer is offloaded; "AdamW" is DeepSpeed's; "ApexAdam" and "ApexLamb" are NVIDIA apex's. Muon is DeepSpeed's
(engine/muon.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ki_ds.engine import apex, muon, ops
from ki_ds.engine.config import EngineConfig
from ki_ds.engine.refusals import FAMILIES
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Train
from ki_ds.models.language_model import LanguageModel
from ki_ds.models.partitioned import shape

APEX = {"ApexAdam": "FusedAdam", "ApexLamb": "FusedLAMB"}
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"fused": True},
    "FusedLAMB": {"max_grad_norm": float("inf")},  # it would clip once more
}


class ClippedOptimizer(torch.optim.Optimizer):
    """Clips, and skips a step that is not finite: at ZeRO 0 DeepSpeed leaves both to the optimizer."""

    clip = 0.0
    overflow = False  # DeepSpeed reads this after the step
    norm: float | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf")))
        self.overflow = not math.isfinite(self.norm)
        return None if self.overflow else super().step(closure)


def check_fit(train: Train, config: EngineConfig, place: str) -> None:
    """Check that the engine JSON can run the optimizer of a model.

    Raises:
        UserError: another family of optimizers, or LAMB without an implementation, or where a rank does not hold whole
            layers.
    """
    kind, source = config.optimizer, config.source
    if kind and FAMILIES[kind] != train.optimizer:
        raise UserError(
            f'{place}.train.optimizer: "{train.optimizer}", but {source} has the optimizer type "{kind}", an '
            f'implementation of "{FAMILIES[kind]}"; leave one of them out, or make them agree'
        )
    if train.optimizer == "lamb" and config.zero_stage:
        raise UserError(
            f'{place}.train.optimizer: "lamb" with ZeRO stage {config.zero_stage} ({source}): LAMB scales the step of '
            "every layer by the layer's norms, but from stage 1 on a rank holds slices that cut through layers; "
            'expected "zero_optimization": {"stage": 0} (with "torch_autocast" for half precision), or "adamw"'
        )
    if train.optimizer == "lamb" and kind is None:
        raise UserError(
            f'{place}.train.optimizer: "lamb", but {source} names no implementation of it; expected '
            '"optimizer": {"type": "ApexLamb"} there, which needs NVIDIA apex (docs/optimizers.md), or "adamw"'
        )
    if kind == "ApexLamb" and not train.weight_decay:
        raise UserError(
            f"{place}.train.weight_decay: found 0, but apex's FusedLAMB adapts no layer without weight decay; expected "
            'a value above 0, or "optimizer": "adamw"'
        )
    if train.optimizer == "muon":
        muon.check(train, config, place)


def fits(train: Train, config: EngineConfig) -> bool:
    """Whether the engine JSON can run the optimizer."""
    try:
        check_fit(train, config, "")
    except UserError:
        return False
    return True


def grouped(model: torch.nn.Module) -> list[list[tuple[str, Any]]]:
    """Named parameters as the optimizer holds them: those that decay, and biases and norms, which do not (Devlin et
    al. 2019); then, where they are marked, those of Muon by their ratio, largest first. A parameter that ZeRO-3 has
    partitioned counts with its whole shape."""
    named = [*model.named_parameters()]
    rest = [one for one in named if not muon.ratio(one[1])]
    found = [[one for one in rest if (len(shape(one[1])) > 1) == wanted] for wanted in (True, False)]
    for ratio in sorted({muon.ratio(p) for _, p in named} - {0.0}):
        own = [one for one in named if muon.ratio(one[1]) == ratio]
        found.append(sorted(own, key=lambda one: shape(one[1]), reverse=True))  # as DeepSpeed sorts them
    return found


def new(model: LanguageModel, train: Train, config: EngineConfig) -> torch.optim.Optimizer:
    """The optimizer of a model; what must be compiled for it is compiled now.

    Raises:
        UserError: it needs a package or a compiler that is not there.
    """
    if train.optimizer == "muon":
        muon.mark(model)
        return muon.new([[p for _, p in group] for group in grouped(model)], train, OPTIONS["AdamW"])
    matrices, rest = ([p for _, p in group] for group in grouped(model))
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    kind = _kind(config)
    numbers = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon}
    made = kind if config.zero_stage else type(f"Clipped{kind.__name__}", (ClippedOptimizer, kind), {})
    try:
        optimizer: torch.optim.Optimizer = made(groups, **numbers, **OPTIONS.get(kind.__name__, {}))
    except (RuntimeError, ImportError) as error:
        if kind.__module__.startswith("apex."):  # "requires cuda extensions"
            raise apex.unbuilt(f'optimizer.type: "{config.optimizer}"', error) from None
        raise
    if isinstance(optimizer, ClippedOptimizer):
        optimizer.clip = train.gradient_clipping
    return optimizer


def _kind(config: EngineConfig) -> Any:
    """The class of the optimizer."""
    kind = config.optimizer
    if kind in APEX:
        return getattr(apex.module("optimizers", f'optimizer.type: "{kind}"'), APEX[kind])
    if (needed := _operator(config)) is None:
        return torch.optim.AdamW
    ops.load(*needed)
    from deepspeed.ops import adam

    return adam.DeepSpeedCPUAdam if config.offload_optimizer.active else adam.FusedAdam


def _operator(config: EngineConfig) -> tuple[str, str] | None:
    """The operator of DeepSpeed that the optimizer is, by its builder, and the setting that asks for it."""
    if config.offload_optimizer.active:
        return "CPUAdamBuilder", "zero_optimization.offload_optimizer"
    return ("FusedAdamBuilder", 'optimizer.type: "AdamW"') if config.optimizer == "AdamW" else None


def check_machine(config: EngineConfig) -> None:
    """Check, without compiling, that this machine has what the optimizer needs.

    Raises:
        UserError: a package or a compiler is missing.
    """
    if config.optimizer in APEX:
        apex.module("optimizers", f'optimizer.type: "{config.optimizer}"')
    elif needed := _operator(config):
        ops.check(*needed)
