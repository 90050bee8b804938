"""What is kept of a teacher's prediction: here the top K ids and their log-probabilities (section 3).

N positions, V vocabulary, K kept ids.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K most probable ids, in order of falling probability, ties by rising id.

    Returns:
        ids [N, K] int64; their log-probabilities [N, K] at temperature 1, fp32; the log-normalisers [N], fp32.
    """
    logits = logits_NV.float()
    normaliser = logits.logsumexp(dim=1)
    values, ids = logits.topk(k, dim=1)
    # topk is free to take any of several equal values: a row with a tie across its end is chosen again by a stable sort
    tied = torch.nonzero((logits >= values[:, -1:]).sum(dim=1) > k).squeeze(1)
    if len(tied):
        ordered, order = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], ids[tied] = ordered[:, :k], order[:, :k]
    # by id, then stably by value: equal values end in order of their ids
    by_id = ids.argsort(dim=1)
    ids, values = ids.gather(1, by_id), values.gather(1, by_id)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), values - normaliser[:, None], normaliser
