"""Counter-based hashing: 64 random-looking bits from a key and counters, without state, vectorised in numpy."""

from __future__ import annotations

import hashlib

import numpy as np

_U = np.uint64
_GOLDEN = _U(0x9E3779B97F4A7C15)


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of uint64; elementwise on a uint64 array."""
    values = values ^ (values >> _U(30))
    values = values * _U(0xBF58476D1CE4E5B9)
    values = values ^ (values >> _U(27))
    values = values * _U(0x94D049BB133111EB)
    return values ^ (values >> _U(31))


def counter_hash(key: int, *counters: np.ndarray) -> np.ndarray:
    """uint64 hash of a key and one or more broadcastable integer arrays, mixed one after the other."""
    state = np.array(key, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = mix64((state + np.asarray(counter).astype(np.uint64) * _GOLDEN) ^ _GOLDEN)
    return state


def derive_key(*parts: object) -> int:
    """A 64-bit key from any printable parts, by BLAKE2b."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
