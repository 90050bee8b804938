"""A small experiment whose teacher is given, ready to teach."""

from helpers.experiments import text, written
from helpers.models import tiny_model
from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.experiment.graph import load_experiment
from ki_ds.stages import pipeline
from ki_ds.workspace import Workspace

TEACH = ("-m", "ki_ds.cli", "worker", "teach")
ENTRIES, VOCABULARY, LENGTH = 900, 300, 32


def made(folder, kind="gpt2", objective="clm", sizes=None, samples=640, **changes):
    """The file of an experiment whose tokenizer and corpus are done, whose teacher has random weights, and whose
    student reads so many samples."""
    train = {"steps": 40, "batch_size": 16, "dropout": None}
    inherit = {"alpha_T": None, "teacher_steps": samples // 16, "temperature": 1.0, "targets": {"k": 12}}
    models = {
        "t": {"architecture": None, "train": None, "pretrained": "teacher"},
        "s": {"architecture": {"model_type": kind}, "train": train, "inherit": inherit},
    }
    file = written(
        folder, ENTRIES, name="teaching", objective=objective, models=models, samples_per_shard=16,
        tokenizer={"train": None, "pretrained": "teacher"}, **changes,
    )  # fmt: skip
    teacher = tiny_model(kind, 3, objective, vocabulary=VOCABULARY, length=LENGTH, **(sizes or {}))
    teacher.save_pretrained(folder / "teacher")
    trained = tokenizers.train(text(ENTRIES).split("\n\n"), VOCABULARY, objective)
    tokenizers.describe(trained, objective, "tokenizer").hugging_face.save_pretrained(folder / "teacher")
    space = opened(file, folder / "work")
    for stage in pipeline.stages(space.experiment):
        if stage.command == "corpus":
            pipeline.work(stage, space)
    return file


def opened(file, work, *settings):
    """The work directory as the experiment's commands see it."""
    return Workspace(load_experiment(file, None, settings), file, work)
