"""Experiments of whole pipelines: a graph of models, masked ones, every selection of targets, and stored targets."""

import shutil

from helpers.documents import documentation
from ki_ds.experiment.graph import load_experiment
from ki_ds.models import architectures, hugging_face
from ki_ds.sealed import Identity, seal
from ki_ds.workspace import Workspace

TRAIN = {"steps": 10, "batch_size": 8, "learning_rate": 5e-3, "dropout": 0.0}


def train(on, **changes):
    return {"on": on, **TRAIN, **changes}


def inherit(teachers, **changes):
    return {"from": teachers, "alpha_T": 2.0, "targets": {"k": 24}, **changes}


def gpt(**keys):
    return {"architecture": "gpt-tiny", **keys}


GRAPH = {
    "name": "graph",
    "objective": "clm",
    "sequence_length": 32,
    "tokenizer": {"train": {"vocabulary_size": 500, "on": ["a", "b"]}},
    "corpora": {
        "a": {"sources": [documentation("asyncio", "email")], "validation": 0.1},
        "b": {"sources": [documentation("unittest", "logging")], "validation": 0.1},
    },
    "models": {
        "g1": gpt(train=train({"a": 1.0})),
        "on-b": gpt(train=train({"b": 1.0})),
        "g2": gpt(train=train({"a": 1.0}), inherit=inherit({"a": "g1"})),
        "g3": gpt(
            train=train({"a": 1.0}), inherit=inherit({"a": "g2"}, schedule="heaviside", teacher_steps=4, alpha_T=None)
        ),
        "mixed": gpt(train=train({"a": 1.0, "b": 1.0}), inherit=inherit({"a": "g1", "b": "on-b"})),
        "half": gpt(train=train({"a": 1.0, "b": 1.0}), inherit=inherit({"a": "g1"})),
        "adapted": {
            "start_from": "g2",
            "train": train({"b": 1.0}),
            "inherit": inherit({"b": "on-b"}, schedule="constant", alpha=0.25, alpha_T=None, teacher_steps=6),
        },
        "small-batch": gpt(
            train=train({"a": 1.0}, batch_size=4, steps=14), inherit=inherit({"a": "g1"}, targets={"k": 8})
        ),
    },
    "compare": [{"student": "g2", "baseline": "g1"}],
    "samples_per_shard": 16,
}
for model in GRAPH["models"].values():  # RFC 7396 does not apply to a whole file: leave out what is None
    if "inherit" in model:
        model["inherit"] = {key: value for key, value in model["inherit"].items() if value is not None}

MASKED = {
    "name": "masked",
    "objective": "mlm",
    "sequence_length": 32,
    "masking": {"views": 2},
    "tokenizer": {"train": {"vocabulary_size": 500, "on": ["a"]}},
    "corpora": {"a": {"sources": [documentation("asyncio")], "validation": 0.1}},
    "models": {
        "teacher": {"architecture": "roberta-tiny", "train": train({"a": 1.0}, dropout=0.1)},
        "student": {
            "architecture": "roberta-tiny",
            "train": train(
                {"a": 1.0}, steps=40, micro_batch_size=2, dropout=0.1, evaluate_every=10, checkpoint_every=4
            ),
            "inherit": inherit({"a": "teacher"}),
        },
    },
    "samples_per_shard": 16,
}


TEXT = "\n\n".join(
    f"Entry {n}: the square of {n} is {n * n}, its cube is {n**3}, and a few more words follow." for n in range(700)
)


def student(**keys):
    return gpt(train=train({"a": 1.0}, steps=5), inherit={"from": {"a": "t"}, "teacher_steps": 3, **keys})


SELECTIONS = {
    "name": "selections",
    "objective": "clm",
    "sequence_length": 32,
    "tokenizer": {"train": {"vocabulary_size": 300, "on": ["a"]}},
    "corpora": {"a": {"sources": [{"text": "a.txt"}], "validation": 0.1}},
    "models": {
        "t": gpt(train=train({"a": 1.0})),
        "plain": student(temperature=1.0, targets={"k": 16}),
        "tail": student(temperature=2.0, targets={"select": "top_k_tail", "k": 12}),
        "nucleus": student(targets={"select": "top_p", "p": 0.3, "k": 40}),
        "drawn": student(targets={"select": "sampled", "draws": 20}),
    },
    "samples_per_shard": 8,
}
STORED = {
    **SELECTIONS,
    "name": "stored",
    "models": {
        "t": {"targets": {"a": "work/targets/t@a"}},
        "s": student(temperature=2.0, targets={"select": "top_k_tail", "k": 8}),
        "alone": gpt(train=train({"a": 1.0}, steps=5)),
    },
    "compare": [{"student": "s", "baseline": "alone"}],
}


def opened(file, work, *settings):
    """The work directory as the experiment's commands see it, without a process."""
    return Workspace(load_experiment(file, None, settings), file, work)


def copy_without(work, to, *models):
    """A work directory as it is just before the given models are trained."""
    for name in ("tokenizer", "corpora", "targets", "models"):
        shutil.copytree(work / name, to / name)
    for name in models:
        shutil.rmtree(to / "models" / name)
    return to


def put_model(space, seed, sealed=True):
    """A model `t` that counts as trained."""
    folder = space.root / "models" / "t"
    shutil.rmtree(folder, ignore_errors=True)
    config = architectures.configuration("gpt-tiny", "clm", space.tokenizer, 32, "models.t")
    hugging_face.new_model(config, "clm", seed).save_pretrained(folder / "model")
    if sealed:
        seal(folder, Identity("train", {}, {}), {"content": f"weights of seed {seed}"})
