"""One small experiment, with changes."""

from helpers.commands import write
from ki_ds.experiment.strict import merge_patch

TRAIN = {"on": {"a": 1.0}, "steps": 8, "batch_size": 8, "learning_rate": 5e-3, "dropout": 0.0}
TINY = {
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


def tiny(**changes):
    """A teacher `t` and a student `s` on a corpus `a` of `text()`; with changes (RFC 7396: None removes a key)."""
    return merge_patch(TINY, changes)


def text(entries=600):
    """About 20 tokens of the tiny experiment's tokenizer an entry."""
    return "\n\n".join(
        f"Entry {n}: twice {n} is {2 * n}, its square is {n * n}; some words follow." for n in range(entries)
    )


def written(folder, entries=600, **changes):
    """The file of a tiny experiment with changes, in a folder with its text."""
    (folder / "a.txt").write_text(text(entries))
    return write(folder / "e.json", tiny(**changes))
