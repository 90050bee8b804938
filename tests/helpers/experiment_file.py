"""The design's example of an experiment file, and patches of it."""

from hypothesis import strategies as st

DESIGN = """
{
  "name": "base-to-large",
  "seed": 1,
  "objective": "mlm",
  "sequence_length": 512,
  "tokenizer": {"train": {"vocabulary_size": 50265, "on": ["wb"]}},
  "masking": {"probability": 0.15, "views": 10},
  "corpora": {
    "wb": {"sources": [{"text": "data/wiki/*.txt"}, {"jsonl": "data/books.jsonl.zst", "field": "text"}],
           "validation": 0.005}
  },
  "models": {
    "base":       {"architecture": "roberta-base",
                   "train": {"on": {"wb": 1.0}, "steps": 125000, "batch_size": 2048, "learning_rate": 5e-4}},
    "large":      {"architecture": "roberta-large",
                   "train": {"on": {"wb": 1.0}, "steps": 125000, "batch_size": 2048, "learning_rate": 2.5e-4}},
    "base-to-large": {"architecture": "roberta-large",
                   "train": {"on": {"wb": 1.0}, "steps": 125000, "batch_size": 2048, "learning_rate": 2.5e-4},
                   "inherit": {"from": {"wb": "base"}, "schedule": "linear", "teacher_steps": 40000,
                                 "temperature": 2.0, "targets": {"select": "top_k", "k": 100}}}
  },
  "compare": [{"student": "base-to-large", "baseline": "large"}],
  "engine": "ds_configs/engine/zero2_fp16.json",
  "scales": {"small": {"sequence_length": 64,
                       "models": {"base": {"architecture": "roberta-tiny", "train": {"steps": 100}},
                                  "large": null,
                                  "base-to-large": {"inherit": {"teacher_steps": null, "alpha_T": 3}}},
                       "compare": []}}
}
"""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


def student(**patch):
    return {"models": {"base-to-large": patch}}


def source(**keys):
    return {"corpora": {"wb": {"sources": [{"text": "a.txt"}, keys]}}}
