"""Architectures by name, any Hugging Face configuration, and the models made of or loaded by them; what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ki_ds.errors import UserError, reason
from ki_ds.models.architectures import check_objective, set_dropout
from ki_ds.models.flops import auto_class
from ki_ds.models.partitioned import gathered


def new_model(config: Any, objective: str, seed: int) -> Any:
    """A Hugging Face model with initial weights that depend on the seed alone."""
    torch.manual_seed(seed)
    model = auto_class(objective).from_config(config, dtype=torch.float32)
    if objective == "clm":
        check_causal(model, "architecture")
    return model


def pretrained_configuration(source: str | Path, place: str) -> Any:
    """The configuration of a model folder or name.

    Raises:
        UserError: there is no such model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source))
    except Exception as error:  # whatever the library raises: the input is at fault
        raise UserError(f"{place}: no model can be loaded from {source}: {reason(error)}") from None


@torch.no_grad()
def check_causal(model: Any, place: str) -> None:
    """Check that no prediction of a causal model depends on what comes after it.

    Raises:
        UserError: changing the last token changes an earlier prediction.
    """
    training = model.training
    model.eval()
    one = torch.arange(4, device=next(model.parameters()).device)[None, :] % model.config.vocab_size
    two = one.clone()
    two[0, -1] = (two[0, -1] + 1) % model.config.vocab_size
    with gathered(model):
        before, after = (model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (one, two))
    model.train(training)
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-4):
        raise UserError(f"{place}: a {type(model).__name__} sees the tokens that it is to predict; it is not causal")


def load_model(
    source: str | Path, objective: str, place: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> Any:
    """A Hugging Face language model from a folder or name, from safetensors only.

    Raises:
        UserError: it cannot be loaded, or lacks weights that its class needs.
    """
    config = pretrained_configuration(source, place)
    check_objective(config, objective, place)
    set_dropout(config, dropout)
    try:
        model, report = auto_class(objective).from_pretrained(
            str(source), config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # as above
        raise UserError(f"{place}: no model can be loaded from {source}: {reason(error)}") from None
    if report["missing_keys"]:
        raise UserError(
            f"{place}: {source} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])} of a "
            f"{type(model).__name__}, which would be random; expected a model saved with its language-model head"
        )
    if objective == "clm":
        check_causal(model, place)
    return model
