"""Architectures by name, any Hugging Face configuration, and the models made of or loaded by them; what they cost."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from ki_ds.errors import UserError, reason
from ki_ds.launch import distributed
from ki_ds.models.architectures import check_objective, set_dropout
from ki_ds.models.flops import auto_class, from_configuration
from ki_ds.models.partitioned import gathered, logits
from ki_ds.progress import say


def new_model(config: Any, objective: str, seed: int) -> Any:
    """A Hugging Face model with initial weights that depend on the seed alone."""
    torch.manual_seed(seed)
    model = from_configuration(config, objective, torch.float32)
    if objective == "clm":
        check_causal(model, "architecture")
    return model


def pretrained_configuration(source: str | Path, place: str, trusted: bool = False) -> Any:
    """The configuration of a model folder or name. Its `auto_map`, which names code that comes with the model, is kept
    only where that code is trusted.

    Raises:
        UserError: there is no such model, or it needs code of its own that is not trusted.
    """
    from transformers import AutoConfig

    if trusted:
        _tell(str(source), place)
    try:
        found = AutoConfig.from_pretrained(str(source), trust_remote_code=trusted)
    except Exception as error:  # whatever the library raises: the input is at fault
        if not trusted and "trust_remote_code" in str(error):
            raise UserError(
                f"{place}: {source} comes with Python code of its own, which transformers does not know and which is "
                'not run. If you trust who wrote it, say "trust_remote_code": true beside "pretrained"'
            ) from None
        raise UserError(f"{place}: no model can be loaded from {source}: {reason(error)}") from None
    if not trusted and hasattr(found, "auto_map"):
        del found.auto_map
    return found


@cache
def _tell(source: str, place: str) -> None:
    if distributed.rank() == 0:
        say(f"{place}: runs the Python code that comes with {source} (trust_remote_code)")


@torch.no_grad()
def check_causal(model: Any, place: str) -> None:
    """Check that no prediction of a causal model depends on what comes after it.

    Raises:
        UserError: changing the last token changes an earlier prediction, or the model needs more than input ids.
    """
    training = model.training
    model.eval()
    one = torch.arange(4, device=next(model.parameters()).device)[None, :] % model.config.vocab_size
    two = one.clone()
    two[0, -1] = (two[0, -1] + 1) % model.config.vocab_size
    with gathered(model):
        before, after = (logits(model, ids, place)[:, :-1] for ids in (one, two))
    model.train(training)
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-4):
        raise UserError(f"{place}: a {type(model).__name__} sees the tokens that it is to predict; it is not causal")


def load_model(
    source: str | Path, objective: str, place: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32,
    trusted: bool = False,
) -> Any:  # fmt: skip
    """A Hugging Face language model from a folder or name, from safetensors only.

    Args:
        trusted: whether code that comes with it may run.

    Raises:
        UserError: it cannot be loaded, or lacks weights that its class needs.
    """
    config = pretrained_configuration(source, place, trusted)
    check_objective(config, objective, place)
    set_dropout(config, dropout)
    try:
        model, report = auto_class(objective).from_pretrained(
            str(source), config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
            trust_remote_code=trusted,
        )  # fmt: skip
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
