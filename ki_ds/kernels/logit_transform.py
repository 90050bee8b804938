"""From hidden states to logits, as Hugging Face models have it.

N rows, D hidden size, V vocabulary.  z_NV = cap · tanh(scale · (hidden_ND · weight_VDᵀ + bias_V) / cap)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """Scale and soft cap between the head's product and the logits."""

    scale: float = 1.0  # Cohere's logit_scale; 1 / Granite's logits_scaling
    cap: float = 0.0  # Gemma's final_logit_softcapping; 0: none

    def of(self, product: Tensor) -> Tensor:
        """The logits; differentiable."""
        if self.cap:
            return torch.tanh(product * (self.scale / self.cap)) * self.cap
        return product if self.scale == 1 else product * self.scale

    def slope(self, logits: Tensor) -> Tensor | None:
        """dlogits/dproduct where there is a cap, from the logits; else it is the scale alone."""
        return (1 - (logits / self.cap) ** 2) * self.scale if self.cap else None

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: a scale that is not positive, a negative cap, or an infinite one.
        """
        if not 0 < self.scale < math.inf or not 0 <= self.cap < math.inf:
            expected = "a finite scale above 0 and a finite cap of 0 or more"
            raise ValueError(f"logit transform: expected {expected}, found {self}")


IDENTITY = LogitTransform()
ALIGNMENT = 16  # elements: rows of logits begin where tensor cores and wide loads want them


def head(weight_VD: Tensor, bias_V: Tensor | None, vocabulary: int | None) -> tuple[Tensor, Tensor | None]:
    """The rows of the head that tokens belong to, without copying; the others are padding.

    Raises:
        ValueError: the head has fewer rows than the vocabulary has tokens.
    """
    if vocabulary is None or vocabulary == weight_VD.shape[0]:
        return weight_VD, bias_V
    if not 0 < vocabulary < weight_VD.shape[0]:
        raise ValueError(f"a vocabulary of {vocabulary}, but the head has {weight_VD.shape[0]} rows")
    return weight_VD[:vocabulary], None if bias_V is None else bias_V[:vocabulary]


def logits_buffer(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """[rows, vocabulary] without content; what lies between its rows belongs to nobody else."""
    return like.new_empty(rows, math.ceil(vocabulary / ALIGNMENT) * ALIGNMENT)[:, :vocabulary]


def multiply(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, product_NV: Tensor) -> None:
    """The head's product into memory that is there."""
    if bias_V is None:
        torch.mm(hidden_ND, weight_VD.T, out=product_NV)
    else:
        torch.addmm(bias_V, hidden_ND, weight_VD.T, out=product_NV)
