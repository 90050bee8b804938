"""What a targets folder holds: computed once, and from it the folder's identity and how its rows are packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ki_ds.targets.codec import Codec
from ki_ds.targets.quanta import quantum
from ki_ds.targets.scalars import name_of, parse_name, scalars_of, stored
from ki_ds.targets.selection import Selection


@dataclass(frozen=True)
class TargetSpec:
    """What a targets folder holds."""

    selection: Selection
    temperatures: tuple[float, ...]  # where the tail's weight is stored, rising, 1 among them; none of draws
    mean_distortion: float | None  # nats, what quantisation may cost a row in the mean; None of draws
    samples: int  # how far into the corpus's stream

    def __post_init__(self) -> None:
        scalars = scalars_of(self.selection, self.temperatures)
        object.__setattr__(self, "temperatures", tuple(tail for tail in scalars if not isinstance(tail, str)))
        if self.selection.counts:
            object.__setattr__(self, "mean_distortion", None)
        elif self.mean_distortion is None:
            raise ValueError(f"targets of {self.selection.kind} need a bound on the mean distortion")

    def codec(self, vocabulary: int) -> Codec:
        """How rows over so many ids are packed; the bound on the mean distortion and the lowest temperature give the
        quantum.

        Raises:
            ValueError: k is above the vocabulary, or no quantum meets the bound.
        """
        scalars = scalars_of(self.selection, self.temperatures)
        if self.mean_distortion is None:
            return Codec(vocabulary, min(self.selection.k, vocabulary), 0.0, scalars)
        return Codec(vocabulary, self.selection.k, quantum(self.mean_distortion, min(self.temperatures)), scalars)

    @property
    def config(self) -> dict[str, Any]:
        """What the identity of the folder says of it. How long it is does not belong to it: a longer run appends."""
        names = [name_of(scalar) for scalar in scalars_of(self.selection, self.temperatures)]
        said = {"selection": self.selection.record, "scalars": names}
        return said if self.mean_distortion is None else {**said, "target_distortion": self.mean_distortion}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], samples: int) -> TargetSpec:
        """The inverse of `config`; other keys of an identity are passed over.

        Raises:
            KeyError, TypeError, ValueError: it is not the identity of a targets folder.
        """
        temperatures = [scalar for scalar in map(parse_name, config["scalars"]) if not isinstance(scalar, str)]
        selection = Selection(**config["selection"])
        return cls(selection, tuple(temperatures), config.get("target_distortion"), samples)

    def serves(self, wanted: TargetSpec, tails: Iterable[float]) -> bool:
        """Whether a folder of this holds all that is wanted of another: the same selection, of as many ids or more, and
        the tails that a loss reads. How finely it is quantised, and how long it is, is not asked here."""
        alike = replace(self.selection, k=0) == replace(wanted.selection, k=0)
        return alike and self.selection.k >= wanted.selection.k and {*map(stored, tails)} <= {*self.temperatures}
