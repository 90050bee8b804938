"""A small experiment whose teacher is given, ready to teach; and its ranks started by hand, each to be ended alone."""

import os
import subprocess
import sys
from pathlib import Path

from helpers.commands import environment, write
from helpers.models import tiny_config
from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.experiment.graph import load_experiment
from ki_ds.launch.distributed import free_port
from ki_ds.models import architectures, hugging_face
from ki_ds.stages import pipeline
from ki_ds.workspace import Workspace

TEACH = ("-m", "ki_ds.cli", "worker", "teach")
TEXT = "\n\n".join(
    f"Entry {n}: its square is {n * n}, its cube {n**3}, and a few more words follow." for n in range(900)
)
TRAIN = {"on": {"a": 1.0}, "steps": 40, "batch_size": 16, "learning_rate": 5e-3}
VOCABULARY, LENGTH = 300, 32


def experiment(kind="gpt2", objective="clm", samples=640, **more):
    """A teacher of a kind, and a student that reads so many samples."""
    inherit = {"from": {"a": "t"}, "teacher_steps": samples // 16, "temperature": 1.0, "targets": {"k": 12}}
    return {
        "name": "teaching",
        "objective": objective,
        "sequence_length": LENGTH,
        "tokenizer": {"pretrained": "teacher"},
        "corpora": {"a": {"sources": [{"text": "a.txt"}], "validation": 0.1}},
        "models": {
            "t": {"pretrained": "teacher"},
            "s": {"architecture": {"model_type": kind}, "train": TRAIN, "inherit": inherit},
        },
        "samples_per_shard": 16,
        **more,
    }


def made(folder, kind="gpt2", objective="clm", sizes=None, **more):
    """The file of an experiment whose tokenizer and corpus are done, and whose teacher has random weights."""
    (folder / "a.txt").write_text(TEXT)
    given = experiment(kind, objective, **more)
    file = write(folder / "e.json", given)
    config = tiny_config(kind, objective, VOCABULARY, LENGTH, **(sizes or {}))
    architectures.set_dropout(config, 0.0)
    hugging_face.new_model(config, objective, 3).save_pretrained(folder / "teacher")
    trained = tokenizers.train(TEXT.split("\n\n"), VOCABULARY, objective)
    tokenizers.describe(trained, objective, "tokenizer").hugging_face.save_pretrained(folder / "teacher")
    space = opened(file, folder / "work")
    for stage in pipeline.stages(space.experiment):
        if stage.command == "corpus":
            pipeline.work(stage, space)
    return file


def opened(file, work, *settings):
    """The work directory as the experiment's commands see it."""
    return Workspace(load_experiment(file, None, settings), file, work)


def rank(number, of, port, *command, log):
    """Start one rank, without a launcher that would end it with the others."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    own = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": of,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONPATH": path,
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment() | {key: str(value) for key, value in own.items()} | {"DS_ACCELERATOR": "cpu"},
        stdout=log.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip


def ranks(of, *command, logs):
    """All ranks of a world of their own, running Python with these arguments."""
    port = free_port()
    os.makedirs(logs, exist_ok=True)
    return [rank(number, of, port, *command, log=logs / f"rank-{number}") for number in range(of)]
