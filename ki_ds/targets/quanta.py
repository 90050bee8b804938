"""The law of a row: how a log-probability becomes a byte, and a row's other numbers 16 bits (FORMAT.md, *Values*).

A value v says that an entry lies D(v) = q · (v + 7 · max(v - 192, 0)) nats below the row's most probable id. Rounding
to the nearest quantum q costs at most about q²/24 nats of KL in the mean and q²/8 in any row. From 192 quanta down on,
where probabilities are below e^-11 of the row's largest and count at high temperatures only, values go in steps of 8
quanta: the last is 696 quanta down. Whoever packs, decodes or reads targets takes numbers and formulas from here; the
formulas serve numpy arrays and torch tensors alike.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LARGEST = 255  # of the values plane
FINE, COARSE = 192, 8  # up to FINE a value is a quantum, from there on COARSE quanta
NAT = 256  # units of a scalar in a nat
MINUS_INFINITY = -(1 << 15)  # the scalar that says so


def quantum(mean_nats: float, lowest_temperature: float = 1.0) -> float:
    """The largest quantum q, a multiple of 1/1024 nat, with q²/24 ≤ four fifths of the bound on the mean KL; the rest
    is for the scatter of small shards. At a temperature τ the divergence is q²/24τ².

    Raises:
        ValueError: the bound is so tight that no quantum meets it.
    """
    steps = math.floor(1024 * min(lowest_temperature, 1.0) * math.sqrt(24 * 0.8 * mean_nats))
    if steps < 1:
        raise ValueError(f"a mean distortion of {mean_nats:g} nats is below what the smallest quantum, 1/1024, gives")
    return steps / 1024


def lowest_temperature(mean_nats: float) -> float:
    """The lowest temperature at which a quantum meets the bound on the mean KL."""
    return 1 / (1024 * math.sqrt(24 * 0.8 * mean_nats))


def quanta_below(values: Any) -> Any:
    """Quanta that entries with these values (an array of any signed or floating type) lie below the row's first."""
    return values + (COARSE - 1) * (values - FINE).clip(min=0)


def nats_below(values: Any, quantum: float) -> Any:
    """Nats that entries with these values (a floating array) lie below the row's first, D(v).

    Args:
        quantum: nats; at a temperature τ, the quantum divided by τ.
    """
    return quanta_below(values) * quantum


def nearest_values(below: Any, quantum: float) -> Any:
    """The values nearest to so many nats below the row's first, in the floating type of `below` (≥ 0)."""
    steps = below * (1 / quantum)
    coarse = (FINE + ((steps - FINE) * (1 / COARSE)).round()).clip(max=LARGEST)
    return steps.round().clip(max=coarse)  # the coarse steps are never the smaller ones up to FINE


def to_scalar(nats: np.ndarray) -> np.ndarray:
    """Nats in the units of a scalar; what is out of its range is held at the range's end."""
    held = np.clip(np.rint(nats * NAT), MINUS_INFINITY + 1, -MINUS_INFINITY - 1)
    return np.where(np.isneginf(nats), MINUS_INFINITY, held)


def from_scalar(stored: np.ndarray) -> np.ndarray:
    """float32 nats of int16 scalars; the inverse of `to_scalar`."""
    return np.where(stored == MINUS_INFINITY, -np.inf, stored * np.float32(1 / NAT)).astype(np.float32)


QUANTA = quanta_below(np.arange(LARGEST + 1))  # of each value
QUANTA.flags.writeable = False
