"""What models cost: parameters and FLOPs; and what a stage says of its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ki_ds.experiment.schema import Experiment
from ki_ds.models import flops


@dataclass(frozen=True)
class Cost:
    """What a stage costs, before it runs; 0 where nothing is known, or nothing worth a word."""

    steps: int = 0
    tokens: float = 0
    flops: float = 0
    bytes: float = 0  # on disk, before compression
    parameters: int = 0
    memory: float = 0  # bytes of a rank
    note: str = ""  # whether the memory is there


@dataclass(frozen=True)
class ModelCost:
    """Sizes of a model."""

    parameters: int
    flops_per_sequence: float  # of a forward pass

    @property
    def training_flops_per_sequence(self) -> float:
        """Of a forward and a backward pass."""
        return 3 * self.flops_per_sequence


def rows_per_sequence(e: Experiment) -> float:
    """Rows of a sequence, on average."""
    return e.sequence_length - 1 if e.objective == "clm" else (e.sequence_length - 2) * e.masking.probability


def model_cost(e: Experiment, config: Any) -> ModelCost:
    """Of a model with this Hugging Face configuration, in this experiment."""
    forward = flops.forward_flops(config, e.objective, e.sequence_length, rows_per_sequence(e))
    return ModelCost(flops.count_parameters(config, e.objective), forward)
