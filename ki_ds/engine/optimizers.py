"""Optimizers: the experiment names the algorithm (`train.optimizer`), the engine JSON the implementation.

`optimizer.type` of the engine JSON: absent is torch's fused AdamW (nothing to compile), DeepSpeed's CPUAdam where the
optimizer is offloaded, or the LAMB below; "AdamW" is DeepSpeed's; "ApexAdam" and "ApexLamb" are NVIDIA apex's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ki_ds.engine import apex, ops
from ki_ds.errors import UserError, nearest
from ki_ds.experiment.schema import Train
from ki_ds.models.partitioned import shape

FAMILIES = {"AdamW": "adamw", "ApexAdam": "adamw", "ApexLamb": "lamb"}
OWNED = {"lr": "learning_rate", "betas": "betas", "eps": "epsilon", "weight_decay": "weight_decay"}
APEX = {"ApexAdam": "FusedAdam", "ApexLamb": "FusedLAMB"}
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"fused": True},
    "FusedLAMB": {"max_grad_norm": float("inf")},  # it would clip once more
}
ONE_BIT = ("OneBitAdam", "OneBitLamb", "ZeroOneAdam")


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


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2), with φ the identity and decoupled weight decay λ. At step t, for a layer x:

        m = β₁ m + (1 - β₁) g        v = β₂ v + (1 - β₂) g²
        r = m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + ε)
        x = x - lr · ‖x‖ / ‖r + λ x‖ · (r + λ x)

    The trust ratio ‖x‖ / ‖r + λ x‖ is 1 where a norm is 0, and in groups with `"adapt": False` (biases and norms).
    """

    def __init__(self, groups: Iterable[Any], lr: float, betas: tuple[float, float], eps: float):
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, {**numbers, "adapt": True, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                group["step"] += 1
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        gradients = [p.grad for p in parameters if p.grad is not None]
        ms, vs = ([self.state[p][name] for p in parameters] for name in "mv")
        (beta1, beta2), t = group["betas"], group["step"]
        torch._foreach_lerp_(ms, gradients, 1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, gradients, gradients, 1 - beta2)
        scales = torch._foreach_sqrt(torch._foreach_div(vs, 1 - beta2**t))
        torch._foreach_add_(scales, group["eps"])
        updates = torch._foreach_div(torch._foreach_div(ms, 1 - beta1**t), scales)
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if group["adapt"]:
            sizes, lengths = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, updates))
            ratios = torch.where((sizes > 0) & (lengths > 0), sizes / lengths, 1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def implementation(config: dict[str, Any]) -> str | None:
    """The engine JSON's `optimizer.type`; None where it leaves the choice."""
    block = config.get("optimizer")
    return block.get("type") if isinstance(block, dict) else None


def offloaded(config: dict[str, Any]) -> bool:
    """Whether the optimizer's state is kept outside of the GPU."""
    block = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return bool(block.get("device", "none") != "none")


def check(config: dict[str, Any], source: str) -> None:
    """Check the engine JSON's `optimizer` block.

    Raises:
        UserError: an unknown type, or a number that the experiment owns.
    """
    block = config.get("optimizer", "auto")
    if block == "auto":
        return
    kind, params = (block.get("type"), block.get("params", {})) if isinstance(block, dict) else (None, {})
    if kind in ONE_BIT:
        raise UserError(
            f"{source}: optimizer.type: {kind}: DeepSpeed 0.19.8 no longer has the 1-bit optimizers; to send gradients "
            'in half the bytes, leave the optimizer out and set "communication_data_type": "bf16"'
        )
    if kind == "Lamb":
        raise UserError(
            f'{source}: optimizer.type: DeepSpeed\'s Lamb runs in fp16 at ZeRO 0 only; expected "optimizer": "lamb" in '
            'the experiment\'s "train" and no optimizer here, or the type "ApexLamb"'
        )
    if kind not in FAMILIES or not isinstance(params, dict) or block.keys() - {"type", "params"}:
        raise UserError(
            f"{source}: optimizer: found {block}; expected an object with the type {', '.join(FAMILIES)}"
            f"{nearest(str(kind), FAMILIES)}, or none"
        )
    for key, value in params.items():
        if key not in OWNED:
            raise UserError(
                f"{source}: optimizer.params.{key}: is not read; expected no parameters beside the type, "
                "as the experiment gives the numbers"
            )
        if value != "auto":
            raise UserError(
                f"{source}: optimizer.params.{key}: the experiment owns this number (train.{OWNED[key]}); "
                "leave it out of the engine JSON"
            )
    if offloaded(config) and kind != "AdamW":
        raise UserError(
            f'{source}: optimizer.type: {kind} runs on the GPU only, but offload_optimizer is set; expected "AdamW"'
        )


def check_fit(train: Train, config: dict[str, Any], place: str, source: str) -> None:
    """Check that the engine JSON can run the optimizer of a model.

    Raises:
        UserError: another family of optimizers, or LAMB where a rank does not hold whole layers.
    """
    kind = implementation(config)
    if kind and FAMILIES[kind] != train.optimizer:
        raise UserError(
            f'{place}.train.optimizer: "{train.optimizer}", but {source} has the optimizer type "{kind}", an '
            f'implementation of "{FAMILIES[kind]}"; leave one of them out, or make them agree'
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if train.optimizer == "lamb" and stage:
        raise UserError(
            f'{place}.train.optimizer: "lamb" with ZeRO stage {stage} ({source}): LAMB scales the step of every layer '
            "by the layer's norms, but from stage 1 on a rank holds slices that cut through layers; expected "
            '"zero_optimization": {"stage": 0} (with "torch_autocast" for half precision), or "adamw"'
        )
    if kind == "ApexLamb" and not train.weight_decay:
        raise UserError(
            f"{place}.train.weight_decay: found 0, but apex's FusedLAMB adapts no layer without weight decay; expected "
            f"a value above 0, or no optimizer type in {source}"
        )


def grouped(model: torch.nn.Module) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Named parameters as the optimizer holds them: those that decay, and biases and norms, which do not (Devlin et
    al. 2019). A parameter that ZeRO-3 has partitioned counts with its whole shape."""
    named = [*model.named_parameters()]
    matrix = [len(shape(p)) > 1 for _, p in named]
    first, second = ([one for one, is_one in zip(named, matrix, strict=True) if is_one == wanted] for wanted in (1, 0))
    return first, second


def new(model: torch.nn.Module, train: Train, config: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of a model; what must be compiled for it is compiled now.

    Raises:
        UserError: it needs a package or a compiler that is not there.
    """
    matrices, rest = ([p for _, p in group] for group in grouped(model))
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    kind = _kind(train, config)
    if kind is Lamb:
        groups[1]["adapt"] = False
    numbers = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon}
    bare = config.get("zero_optimization", {}).get("stage", 0) == 0
    made = type(f"ClippedOptimizer{kind.__name__}", (ClippedOptimizer, kind), {}) if bare else kind
    try:
        optimizer: torch.optim.Optimizer = made(groups, **numbers, **OPTIONS.get(kind.__name__, {}))
    except (RuntimeError, ImportError) as error:
        if kind.__module__.startswith("apex."):  # "requires cuda extensions"
            raise apex.unbuilt(f'optimizer.type: "{implementation(config)}"', error) from None
        raise
    if isinstance(optimizer, ClippedOptimizer):
        optimizer.clip = train.gradient_clipping
    return optimizer


def _kind(train: Train, config: dict[str, Any]) -> Any:
    """The class of the optimizer."""
    kind = implementation(config)
    if kind in APEX:
        return getattr(apex.module("optimizers", f'optimizer.type: "{kind}"'), APEX[kind])
    if offloaded(config):
        ops.load("CPUAdamBuilder", "zero_optimization.offload_optimizer")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam
    if kind == "AdamW":
        ops.load("FusedAdamBuilder", 'optimizer.type: "AdamW"')
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam
    return Lamb if train.optimizer == "lamb" else torch.optim.AdamW
