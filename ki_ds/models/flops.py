"""Parameters and FLOPs of a model, without allocating it."""

from __future__ import annotations

from typing import Any

import torch

from ki_ds.models.matrices import linear


def auto_class(objective: str) -> Any:
    """The class of transformers that makes or loads models of an objective."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM


def from_configuration(config: Any, objective: str, dtype: torch.dtype) -> Any:
    """A model with new weights. Code of its own runs only where `pretrained_configuration` has left the way to it."""
    return auto_class(objective).from_config(config, dtype=dtype, trust_remote_code=hasattr(config, "auto_map"))


def outline(config: Any, objective: str, dtype: torch.dtype = torch.float32, device: str = "meta") -> Any:
    """The model without memory for its parameters; under a mode that makes fake tensors, on any device."""
    with torch.device(device):
        return from_configuration(config, objective, dtype)


def count_parameters(config: Any, objective: str) -> int:
    """Parameters, tied ones once, without allocating them."""
    return sum(p.numel() for p in outline(config, objective).parameters())


def forward_flops(config: Any, objective: str, length: int, rows: float) -> float:
    """FLOPs of a forward pass over one sequence with so many rows: the matrix products (2 a weight and
    token; of experts, those that a token is sent to), attention scores and mixing (4 · S² · D a layer, where there
    are heads) and the head at the rows."""
    model = outline(config, objective)
    head = model.get_output_embeddings()
    weights = sum(module.weight.numel() for module in linear(model) if module is not head)
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    stacked = (
        p for module in model.modules() if hasattr(module, "num_experts") for p in module.parameters(recurse=False)
    )
    weights += sum(chosen * p.numel() // p.shape[0] for p in stacked if p.dim() == 3)  # [experts, …]
    heads = getattr(config, "num_attention_heads", None)
    attention = 4 * length**2 * config.hidden_size * config.num_hidden_layers if heads else 0
    return 2.0 * weights * length + attention + 2.0 * head.weight.numel() * rows
