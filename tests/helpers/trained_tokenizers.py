"""Made-up text, and tokenizers of 330 ids that were trained on it."""

import numpy as np

from ki_ds.corpus import tokenizer as tokenizers

OBJECTIVES = ("mlm", "clm")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "naïve", "café", "owners", "at", "12:30", "in", "東京"]


def texts(count, seed=0, words=40):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, words))) + f" {n}." for n in range(count)]


TRAINED = {objective: tokenizers.train(texts(200), 330, objective) for objective in OBJECTIVES}
KNOWN = {objective: tokenizers.describe(TRAINED[objective], objective, "tokenizer") for objective in OBJECTIVES}
