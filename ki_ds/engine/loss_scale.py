"""The loss scale of fp16: DeepSpeed's, moved at the right moment and never ending a run by itself."""

from __future__ import annotations

from typing import Any


class LossScale:
    """The loss scale of a ZeRO optimizer that computes in fp16.

    DeepSpeed raises the scale after some clean steps *before* it divides that step's gradients by it, which halves
    them, and at stage 3 their norm too. Here it is raised when the step is done. An overflow lowers it at once, as
    DeepSpeed does (not every time: `hysteresis` in the engine JSON), and at the lowest scale is not an exception.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        optimizer._update_scale = self._overflow_only

    @property
    def _scaler(self) -> Any:
        return self.optimizer.loss_scaler  # a loaded checkpoint brings its own

    @property
    def value(self) -> float:
        """What the loss is multiplied by at the next backward pass."""
        return float(self._scaler.loss_scale)

    @property
    def lowest(self) -> float | None:
        """How far overflows may lower it; None where it is fixed."""
        return float(self._scaler.min_scale) if self._scaler.dynamic else None

    def _overflow_only(self, overflow: bool = False) -> None:
        if overflow:
            self._scaler.raise_error_at_min_scale = False
            self._scaler.update_scale(True)

    def applied(self) -> None:
        """Count a step that was applied; enough of them in a row raise the scale."""
        self._scaler.update_scale(False)
