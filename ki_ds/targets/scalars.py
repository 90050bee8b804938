"""What is stored of each row beside its entries. In code a tail is its temperature; its name stands on disk only."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ki_ds.targets.selection import Selection

Scalar = str | float  # "first", "truth", or a temperature: the tail's log weight at it
TAIL = "tail@"


def stored(temperature: float) -> float:
    """A temperature as its name on disk gives it, to 12 digits."""
    return float(f"{temperature:.12g}")


def scalars_of(selection: Selection, temperatures: Iterable[float]) -> tuple[Scalar, ...]:
    """What is stored of each row of a selection; the tail's weight at 1 and these temperatures."""
    if selection.counts:
        return ("truth",)
    return ("first", "truth", *sorted({1.0, *map(stored, temperatures)}))


def name_of(scalar: Scalar) -> str:
    """As in headers and manifests."""
    return scalar if isinstance(scalar, str) else f"{TAIL}{scalar:.12g}"


def parse_name(name: str) -> Scalar:
    """The inverse of `name_of`; a name that is not known stays a name.

    Raises:
        ValueError: it is a tail's, and what follows is no temperature.
    """
    if not name.startswith(TAIL):
        return name
    temperature = float(name.removeprefix(TAIL))
    if not 0 < temperature < math.inf:
        raise ValueError(f"a tail at the temperature {temperature:g}")
    return temperature
