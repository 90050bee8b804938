"""What quantisation costs a row: KL(original ‖ decoded) of its kept ids, and the bound on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ki_ds.errors import UserError
from ki_ds.targets.quanta import QUANTA


@dataclass(frozen=True)
class Distortion:
    """Over some rows, in nats."""

    mean: float
    max: float

    @classmethod
    def of(cls, parts_n: Iterable[np.ndarray]) -> Distortion:
        """Of rows whose KL(original ‖ decoded) [n] is given in parts; 0 where there is no row."""
        every = np.concatenate([np.zeros(0), *parts_n])
        return cls(float(every.mean()) if len(every) else 0.0, float(every.max(initial=0)))


class Bound(Protocol):
    """What quantisation may cost a row, in nats."""

    @property
    def mean(self) -> float: ...
    @property
    def max(self) -> float: ...


def check_bound(found: Distortion, bound: Bound, quantum: float, place: str) -> None:
    """Check what quantisation has cost the rows of a shard; `quantum` is in nats.

    Raises:
        UserError: more than the bound.
    """
    for name, cost, allowed in (("mean", found.mean, bound.mean), ("max", found.max, bound.max)):
        if cost > allowed:
            raise UserError(
                f"{place} lose {cost:.2g} nats to quantisation; target_distortion.{name} allows {allowed:g}. Quanta "
                f"of {quantum:.3g} nats reach {QUANTA[-1] * quantum:.3g} below a row's first id. Raise the "
                "bound; or remove the folder, to begin again with other quanta (target_distortion.mean) or a smaller k."
            )
