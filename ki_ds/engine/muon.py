"""Muon (Jordan et al. 2024): the step of a hidden matrix is its momentum, made orthogonal; all else is AdamW's.

DeepSpeed's own, which orthogonalizes whole gradients at ZeRO 1 to 3 and knows a matrix by its attribute `use_muon`.
"""

from __future__ import annotations

from typing import Any

import torch

from ki_ds.engine.config import EngineConfig
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Train
from ki_ds.models import matrices
from ki_ds.models.language_model import LanguageModel

COMPILED = ("muon_update", "zeropower_via_gram_newtonschulz", "zeropower_via_newtonschulz5")  # by DeepSpeed
UNTRIED = (  # keys of the engine JSON
    "data_types", "communication_data_type", "bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states",
    "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_hpz_partition_size",
)  # fmt: skip


def check(train: Train, config: EngineConfig, place: str) -> None:
    """Refuse what DeepSpeed's Muon does not know, gets wrong, or was not tried with.

    Raises:
        UserError: naming it.
    """
    problems = {
        "ZeRO stage 0": (config.zero_stage == 0, "DeepSpeed's Muon is made for the stages 1 to 3"),
        "fp16": (config.precision == "fp16", "its momentum would add up gradients of different loss scales"),
        "offload_optimizer": (config.offload_optimizer.active, "it was not tried with it"),
        **{path: (bool(_given(config, path)), "it was not tried with it") for path in UNTRIED},
        "zero_optimization.reduce_scatter": (
            config.zero_stage == 3 and _given(config, "zero_optimization.reduce_scatter") is True,
            "at stage 3 it needs whole gradients; left out, it is turned off",
        ),
    }
    for found, (wrong, why) in problems.items():
        if wrong:
            raise UserError(
                f'{place}.train.optimizer: "muon" with {found} ({config.source}): {why}; expected ZeRO stage 1, 2 or 3 '
                'in fp32 or bf16 without it, or "optimizer": "adamw"'
            )
    if train.gradient_clipping:
        raise UserError(
            f'{place}.train.gradient_clipping: found {train.gradient_clipping:g} with "muon": DeepSpeed would clip by '
            "the norm of the orthogonalized updates, which tells of the model's size only, and so shorten every step; "
            "expected 0"
        )


def _given(config: EngineConfig, path: str) -> Any:
    """A value of the engine JSON; None: not given."""
    found: Any = config.raw
    for key in path.split("."):
        found = (found or {}).get(key)
    return None if found == "auto" else found


def mark(model: LanguageModel) -> None:
    """Say of every parameter whether it is Muon's (`use_muon`, which DeepSpeed reads), and the ratio of its learning
    rate. Muon's are the matrices of the hidden linear layers."""
    found = {id(layer.weight): matrices.muon_ratio(layer) for layer in matrices.hidden(model, model.head.weight)}
    for p in model.parameters():
        one: Any = p
        one.use_muon, one.muon_ratio = id(p) in found, found.get(id(p), 0.0)


def ratio(parameter: Any) -> float:
    """What Muon's learning rate is multiplied by for a parameter; 0: it is not Muon's."""
    return float(getattr(parameter, "muon_ratio", 0.0))


def new(groups: list[list[Any]], train: Train, adamw: dict[str, Any]) -> torch.optim.Optimizer:
    """Of parameters that are `mark`ed: AdamW's that decay, those that do not, and Muon's, a group for each ratio.

    Args:
        adamw: options of torch's AdamW.

    Raises:
        UserError: there are none of Muon's.
    """
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    for name in COMPILED:  # it would take a compiler, and 20 s of every start, for what is products of matrices
        setattr(original_muon, name, torch.compiler.disable(getattr(original_muon, name)))
    if len(groups) < 3:
        raise UserError(
            'train.optimizer: "muon", but the model has no torch.nn.Linear beside its head; expected "adamw"'
        )
    numbers = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon, "use_muon": False}
    made: list[dict[str, Any]] = [
        {"params": group, "weight_decay": decay, **numbers}
        for group, decay in zip(groups[:2], (train.weight_decay, 0.0), strict=True)
        if group
    ]
    for group in groups[2:]:
        factor = ratio(group[0])
        rate = train.muon_learning_rate * factor
        made.append(
            {
                "params": group, "lr": rate, "ratio": rate / train.learning_rate, "use_muon": True,
                "momentum": train.muon_momentum, "weight_decay": train.weight_decay / factor,
            }
        )  # fmt: skip
    found: torch.optim.Optimizer = muon_optimizer.MuonWithAuxAdam(made, torch.optim.AdamW, adamw)
    return found
