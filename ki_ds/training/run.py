"""A training run: what a model is trained on and how, and what is due after which step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ki_ds.corpus.masking import Viewer
from ki_ds.engine.engine import Engine
from ki_ds.experiment.schedules import shared_steps
from ki_ds.experiment.schema import Inherit, Train


@dataclass(frozen=True)
class TrainRun:
    """What a model is trained on and how."""

    name: str
    train: Train
    inherit: Inherit | None
    seed: int
    sequence_length: int
    validation: dict[str, tuple[np.ndarray, Viewer]]  # of each corpus: tokens [sequences, S]

    @property
    def temperature(self) -> float:
        """τ."""
        return self.inherit.temperature if self.inherit else 1.0

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.sequence_length

    @property
    def shared_steps(self) -> int:
        """How many of its first steps a longer run has in common with it."""
        return shared_steps(self.train, self.inherit)


@dataclass(frozen=True)
class Every:
    """Some of the steps of a run: every so many, and its last."""

    steps: int
    last: int

    def due(self, done: int) -> bool:
        """Whether it is time, after so many steps of the run."""
        return done % self.steps == 0 or done == self.last


class Checkpoints:
    """The checkpoints of a run; only one of a run in the same `state` is gone on from. The one from which a longer run
    can go on is always kept."""

    def __init__(self, folder: Path, run: TrainRun, state: dict[str, Any], trusted: bool):
        self.folder, self.keep, self.state, self.trusted = folder, run.train.keep_checkpoints, state, trusted
        self.every, self.shared = Every(run.train.checkpoint_steps, run.train.steps), run.shared_steps

    def due(self, done: int) -> bool:
        """Whether it is time for one, after so many steps of the run."""
        return self.every.due(done) or done == self.shared

    def resume(self, engine: Engine) -> int:
        """Go on from the last whole checkpoint: the number of steps done.

        Raises:
            UserError: the checkpoint is damaged, belongs to another run, or is another user's and not trusted.
        """
        return engine.resume(self.folder, self.state, self.trusted)

    def save(self, engine: Engine, done: int) -> None:
        """Write the checkpoint after so many steps.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        engine.save(self.folder, done, self.keep, self.state, always=self.shared)
