"""What models cost: parameters, FLOPs, and what a report needs to know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.experiment.schedules import teacher_steps
from ki_ds.experiment.schema import Experiment
from ki_ds.models import flops

if TYPE_CHECKING:
    from ki_ds.workspace import Workspace


def rows_per_sequence(e: Experiment) -> float:
    """Rows of a sequence, on average."""
    return e.sequence_length - 1 if e.objective == "clm" else (e.sequence_length - 2) * e.masking.probability


def cost(space: Workspace, name: str, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Parameters and FLOPs of a model: of a forward pass over a sequence, and of a training step."""
    e = space.experiment
    config = space.model_config(name, tokenizer)
    forward = flops.forward_flops(config, e.objective, e.sequence_length, rows_per_sequence(e))
    train = e.models[name].train
    return {
        "parameters": flops.count_parameters(config, e.objective),
        "flops_per_sequence": forward,
        "flops_per_step": 3 * forward * train.batch_size if train else 0.0,
    }


def training_facts(space: Workspace, name: str) -> dict[str, Any]:
    """What the report needs to know of a training run."""
    model = space.experiment.models[name]
    train = model.train
    assert train is not None
    teachers = {
        corpus: {
            "model": teacher,
            # made elsewhere: nobody here paid for them
            "flops_per_sequence": 0.0
            if space.experiment.models[teacher].targets
            else cost(space, teacher, space.tokenizer)["flops_per_sequence"],
            "share": train.on[corpus] / sum(train.on.values()),
        }
        for corpus, teacher in (model.inherit.teachers if model.inherit else {}).items()
    }
    own = cost(space, name, space.tokenizer)
    return {
        "parameters": own["parameters"],
        "flops_per_step": own["flops_per_step"],
        "steps": train.steps,
        "batch_size": train.batch_size,
        "sequence_length": space.experiment.sequence_length,
        "teacher_steps": teacher_steps(model.inherit, train.steps),
        "teachers": teachers,
    }
