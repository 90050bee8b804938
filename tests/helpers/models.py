"""Small models of many kinds, for the tests."""

import torch

from ki_ds.corpus.tokenizer import expected
from ki_ds.models import architectures, hugging_face

VOCABULARY, LENGTH = 64, 12
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TINY = {
    "gpt2": ("clm", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "roberta": ("mlm", SMALL),
    "bert": ("mlm", SMALL),
    "distilbert": ("mlm", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    "llama": ("clm", {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "opt": ("clm", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
                    "word_embed_proj_dim": 16}),
    "gpt_neox": ("clm", SMALL),
    "qwen2": ("clm", {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}),
}  # fmt: skip


def tiny_config(kind, objective=None, vocabulary=VOCABULARY, length=LENGTH, only=None, **more):
    """`only`: all keys, in place of the small ones of the kind."""
    own, sizes = TINY.get(kind, (objective, SMALL))
    objective, sizes = objective or own, sizes if only is None else only
    given = {"model_type": kind, **sizes, **more}
    return architectures.configuration(
        given, objective, expected(vocabulary, objective), length, "models.x.architecture"
    )


def tiny_model(kind, seed=0, objective=None, **more):
    config = tiny_config(kind, objective, **more)
    architectures.set_dropout(config, 0.0)
    return hugging_face.new_model(config, objective or TINY[kind][0], seed)


def batch(rows=13, seed=0, vocabulary=VOCABULARY):
    """Input ids, some rows of the flattened batch, and labels."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocabulary, (3, LENGTH), generator=g)
    where = torch.randperm(3 * LENGTH, generator=g)[:rows].sort().values
    return ids, where, torch.randint(0, vocabulary, (rows,), generator=g)


KINDS = [*TINY, "tied llama", "untied gpt2", "untied roberta"]


def kind_of(name, **more):
    tie, _, kind = name.rpartition(" ")
    return tiny_model(kind, **({"tie_word_embeddings": tie == "tied"} if tie else {}), **more)
