"""The definition of a packed row, in float64 and apart from the packer; needs no test runner."""

import numpy as np

from ki_ds.targets.codec import Planes


def quanta(value):
    """FORMAT.md's D(v) / q."""
    return value + 7 * np.maximum(value - 192, 0)


def by_definition(how, ids_nK, given_nK, scalars):
    """(planes, KL(original ‖ decoded) [n]) of rows of distinct ids; arguments as those of `pack_arrays`. Only how many
    quanta an entry lies below its row's first is computed in float32, as the format's writers do."""
    n = len(ids_nK)
    kept = given_nK > (0 if how.quantum == 0 else -np.inf)
    values, lost = given_nK, np.zeros(n)
    if how.quantum:
        logp = given_nK.astype(np.float32)
        first = np.where(kept, logp, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
        below = np.where(kept, np.where(np.isfinite(first), first, np.float32(0)) - np.where(kept, logp, 0), 0)
        steps = (below.astype(np.float32) * np.float32(1 / how.quantum)).astype(np.float64)
        values = np.where(np.rint(steps) > 192, np.minimum(192 + np.rint((steps - 192) / 8), 255), np.rint(steps))
        decoded = how.quantum * quanta(values)
        for temperature in {1.0, *how.tails}:
            p, q = (np.where(kept, np.exp(-nats / temperature), 0) for nats in (below.astype(np.float64), decoded))
            p, q = (x / np.maximum(x.sum(axis=1, keepdims=True), 1e-300) for x in (p, q))
            with np.errstate(divide="ignore", invalid="ignore"):
                lost = np.maximum(lost, np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(axis=1))
    # what holds, by rising id
    width, counts = min(how.k, ids_nK.shape[1]), kept.sum(axis=1)
    order = np.argsort(np.where(kept, ids_nK, 1 << 30), axis=1, kind="stable")[:, :width]
    holds = np.arange(width) < counts[:, None]
    planes = [np.zeros((n, how.k), np.uint32), np.zeros((n, how.k), np.uint8)]
    for plane, entries in zip(planes, (ids_nK, values), strict=True):
        plane[:, :width] = np.where(holds, np.take_along_axis(entries, order, axis=1), 0)
    stored = np.zeros((len(how.scalars), n), np.int16)
    for place, scalar in enumerate(how.scalars):
        nats = np.asarray(scalars[scalar], np.float64)
        stored[place] = np.where(nats == -np.inf, -32768, np.clip(np.rint(nats * 256), -32767, 32767))
    high = (planes[0] >> 16).astype(np.uint8) if how.vocabulary > 1 << 16 else None
    return Planes(planes[0].astype(np.uint16), high, planes[1], counts.astype(np.uint16), stored), lost
