"""A small experiment of all stages, and what must come out the same however its ranks were started."""

import json

from helpers.commands import folder_digest, metrics, write

TRAIN = {"on": {"a": 1.0}, "steps": 8, "batch_size": 8, "learning_rate": 5e-3, "dropout": 0.0}
EXPERIMENT = {
    "name": "tiny",
    "objective": "clm",
    "sequence_length": 32,
    "tokenizer": {"train": {"vocabulary_size": 300, "on": ["a"]}},
    "corpora": {"a": {"sources": [{"text": "a.txt"}], "validation": 0.1}},
    "models": {
        "t": {"architecture": "gpt-tiny", "train": TRAIN},
        "s": {
            "architecture": "gpt-tiny",
            "train": TRAIN,
            "inherit": {"from": {"a": "t"}, "alpha_T": 2.0, "targets": {"k": 16}},
        },
    },
    "samples_per_shard": 4,
}
TEXT = "\n\n".join(f"Entry {n}: twice {n} is {2 * n}, its square is {n * n}; some words follow." for n in range(600))
COMPUTED = ("step", "loss", "ce", "kl", "alpha", "learning_rate", "gradient_norm", "validation")


def tiny(folder):
    """The experiment's file, in a folder with its text."""
    (folder / "a.txt").write_text(TEXT)
    return write(folder / "tiny.json", EXPERIMENT)


def outcome(work):
    """Everything that both models, the targets and the perplexities are: to the last bit, without times."""
    return {
        "targets": folder_digest(work / "targets" / "t@a"),
        **{name: trained(work, name) for name in ("t", "s")},
        "perplexity": {name: perplexity(work, name) for name in ("t", "s")},
    }


def trained(work, name):
    """The computed values of each step, and the weights."""
    lines = [{key: line.get(key) for key in COMPUTED} for line in metrics(work / "models" / name)]
    return lines, (work / "models" / name / "model" / "model.safetensors").read_bytes()


def perplexity(work, name):
    return json.loads((work / "results" / name / "perplexity.json").read_text())["corpora"]
