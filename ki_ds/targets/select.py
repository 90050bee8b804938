"""What is kept of a teacher's predictions (section 3 and beyond), in a deterministic order.

N positions, V vocabulary, K kept ids.

    top_k    the K most probable ids
    top_p    of these, the smallest set that reaches mass p
    sampled  ids drawn with replacement from softmax(z / τ), as counts: unbiased where the other two are not
             (Anshumann et al. 2025, "Sparse logit sampling")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ki_ds.targets.selection import Selection, scalar_names


@dataclass(frozen=True)
class Selected:
    """Kept ids and what is said of them; scalars in nats."""

    ids_NK: Tensor  # int64
    given_NK: Tensor  # float32 log-probabilities at temperature 1, -inf where an entry does not hold; or int64 counts
    scalars: dict[str, Tensor]  # float32 [N]


def select(
    logits_NV: Tensor,
    labels_N: Tensor,
    selection: Selection,
    temperatures: Sequence[float] = (),
    uniforms_NK: Tensor | None = None,
) -> Selected:
    """Select ids at each position, with the scalars that `scalar_names` lists.

    Args:
        labels_N: int64, the true token.
        temperatures: where the tail's weight is wanted, beside 1: `tail@τ` is
            log Σ_{v not kept} exp((log p_v - log p_first) / τ), from which tempered probabilities follow exactly.
        uniforms_NK: float64 in [0, 1), one for each draw; for `sampled` only.
    """
    logits = logits_NV.float()
    normaliser = logits.logsumexp(dim=1)
    truth = logits.gather(1, labels_N[:, None]).squeeze(1) - normaliser
    largest = logits.amax(dim=1)
    scalars = {"first": largest - normaliser, "truth": truth}
    if selection.kind == "sampled":
        assert uniforms_NK is not None
        ids, counts = draw(logits / selection.temperature, uniforms_NK)
        return Selected(ids, counts, {"truth": truth})
    ids, logp = top_k(logits, min(selection.k, logits.shape[1]), normaliser)
    if selection.kind == "top_p":
        logp = nucleus(logp, selection.p)
    kept = torch.isfinite(logp)
    rest = (logits - largest[:, None]).scatter(1, torch.where(kept, ids, ids[:, :1]), -torch.inf)
    for name in scalar_names(selection, temperatures)[2:]:
        scalars[name] = (rest / float(name.removeprefix("tail@"))).logsumexp(dim=1)
    return Selected(ids, logp, scalars)


def top_k(logits_NV: Tensor, k: int, normaliser_N: Tensor) -> tuple[Tensor, Tensor]:
    """The K most probable ids, in order of falling probability, ties by rising id; and their log-probabilities."""
    values, ids = logits_NV.topk(k, dim=1)
    # topk is free to take any of several equal values: a row with a tie across its end is chosen again by a stable sort
    tied = torch.nonzero((logits_NV >= values[:, -1:]).sum(dim=1) > k).squeeze(1)
    if len(tied):
        ordered, order = logits_NV[tied].sort(dim=1, descending=True, stable=True)
        values[tied], ids[tied] = ordered[:, :k], order[:, :k]
    # by id, then stably by value: equal values end in order of their ids
    by_id = ids.argsort(dim=1)
    ids, values = ids.gather(1, by_id), values.gather(1, by_id)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), values - normaliser_N[:, None]


def nucleus(logp_NK: Tensor, p: float) -> Tensor:
    """Log-probabilities in falling order, -inf behind the smallest set that reaches mass p; all where none does."""
    if p >= 1:  # rounded sums reach 1 too early
        return logp_NK
    mass = logp_NK.double().exp()  # in float64, so that how a device orders its sums decides nothing
    before = mass.cumsum(dim=1) - mass
    keep = before < p
    keep[:, 0] = True
    return logp_NK.masked_fill(~keep, -torch.inf)


def draw(logits_NV: Tensor, uniforms_NK: Tensor) -> tuple[Tensor, Tensor]:
    """K draws a row from softmax(logits) by its inverse distribution function: rising ids [N, K] and counts [N, K],
    which are 0 behind the last distinct id."""
    mass = logits_NV.double().softmax(dim=1).cumsum(dim=1)
    # an id of probability 0 is never the first whose cumulated mass exceeds u
    total = mass[:, -1:]
    below = torch.minimum(uniforms_NK * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(mass, below, right=True).sort(dim=1).values
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(dim=1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))
    return torch.zeros_like(drawn).scatter_(1, place, drawn), counts
