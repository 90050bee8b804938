"""Views of a sequence: what the model sees and what it must predict, as a pure function of counters.

Masked language model (Devlin et al. 2019, section 3.1): each ordinary token is chosen with the given probability; of
the chosen 80 % become the mask token, 10 % a random ordinary token, 10 % stay. The choice is a hash of (seed, corpus,
sequence, view, index), so that teacher and student see the same input without anything being stored.
Causal language model: the input unmasked; index i predicts the token at i + 1.

B sequences, S tokens a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from ki_ds.corpus.hashing import counter_hash, derive_key

VALIDATION_VIEW = 1 << 32  # a view that no training stream reaches: validation masks are fixed and never trained on


@dataclass(frozen=True)
class View:
    """What a model is shown of B sequences, and is to predict."""

    inputs_BS: np.ndarray  # int32
    loss_mask_BS: np.ndarray  # bool: where a token is to be predicted
    labels_BS: np.ndarray  # int32: the token to predict there; elsewhere undefined


class Viewer:
    """Makes views; one for each (experiment, corpus)."""

    def __init__(
        self,
        objective: str,
        seed: int,
        corpus: str,
        vocabulary: int,
        special: list[int],
        mask: int | None,
        probability: float,
    ):
        if objective == "mlm" and mask is None:
            raise ValueError("a masked language model needs a mask token")
        self.causal = objective == "clm"
        self.key = derive_key("mask", seed, corpus)
        self.special = np.asarray(sorted(special), dtype=np.int64)
        self.ordinary = np.setdiff1d(np.arange(vocabulary, dtype=np.int32), self.special)
        self.mask = -1 if mask is None else mask
        self.threshold = np.uint64(int(probability * 2.0**64))

    def __call__(self, tokens_BS: np.ndarray, sequences_B: np.ndarray, views_B: np.ndarray) -> View:
        """The views of the given sequences; inputs are not written to."""
        tokens = tokens_BS.astype(np.int32)
        if self.causal:
            loss_mask = np.ones(tokens.shape, dtype=bool)
            loss_mask[:, -1] = False
            return View(tokens, loss_mask, np.roll(tokens, -1, axis=1))
        index_S = np.arange(tokens.shape[1])
        choice = counter_hash(
            self.key, np.asarray(sequences_B)[:, None], np.asarray(views_B)[:, None], index_S[None, :]
        )
        loss_mask = (choice < self.threshold) & ~np.isin(tokens, self.special)
        chosen = np.nonzero(loss_mask)
        fate = counter_hash(self.key ^ 1, choice[chosen])
        tenth = fate % np.uint64(10)
        replaced = tokens[chosen]
        replaced[tenth < 8] = self.mask
        random = tenth == 8
        replaced[random] = self.ordinary[
            ((fate >> np.uint64(8)) % np.uint64(len(self.ordinary)))[random].astype(np.int64)
        ]
        inputs = tokens.copy()
        inputs[chosen] = replaced
        return View(inputs, loss_mask, tokens)

    @staticmethod
    def digests(view: View) -> np.ndarray:
        """uint64 [B]: of each sequence's exact input ids, loss mask and labels; the proof of alignment."""
        inputs = np.ascontiguousarray(view.inputs_BS, dtype="<i4")
        wanted = np.ascontiguousarray(np.where(view.loss_mask_BS, view.labels_BS, -1), dtype="<i4")
        return np.array(
            [xxhash.xxh3_64_intdigest(one.tobytes() + two.tobytes()) for one, two in zip(inputs, wanted, strict=True)],
            dtype=np.uint64,
        )
