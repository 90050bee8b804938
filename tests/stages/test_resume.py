"""Masked models: other numbers of ranks, runs that are killed and go on, runners."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import alive, environment, folder_digest, ki_ds, killed, metrics
from helpers.pipelines import (
    copy_without,
)
from transformers import AutoModelForMaskedLM, AutoTokenizer

from ki_ds.launch.distributed import free_port

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]


def test_masked_model_loads_and_agrees(masked):
    _, work = masked
    model = AutoModelForMaskedLM.from_pretrained(work / "models" / "student" / "model")
    tokenizer = AutoTokenizer.from_pretrained(work / "models" / "student" / "model")
    assert tokenizer.mask_token_id < model.config.vocab_size == 500
    assert metrics(work / "models" / "student")[-1]["ce"] < 6.0


def test_two_ranks_equal_one(masked, tmp_path):
    """The same losses to rounding; dropout differs between ranks by design, so it is off here."""
    file, work = masked
    off = ("--set", "models.student.train.dropout=0", "--set", "models.student.train.steps=12")
    runs = {}
    for processes in (1, 2):
        here = copy_without(work, tmp_path / str(processes), "student")
        ki_ds("train", file, "--workdir", here, "--processes", processes, *off)
        runs[processes] = metrics(here / "models" / "student")
    for one, two in zip(runs[1], runs[2], strict=True):
        for key in ("loss", "ce", "kl", "gradient_norm"):
            expected = None if two[key] is None else pytest.approx(two[key], rel=2e-5, abs=2e-6)
            assert one[key] == expected, (one["step"], key)
    assert runs[1][-1]["validation"]["a"] == pytest.approx(runs[2][-1]["validation"]["a"], rel=1e-5)


def test_killed_training_continues_the_very_same_run(masked, tmp_path):
    file, work = masked
    here = copy_without(work, tmp_path / "work", "student")
    checkpoints = here / "models" / "student" / "checkpoints"

    def reached(tag):
        return (checkpoints / "latest").exists() and (checkpoints / "latest").read_text() >= tag

    arguments = (file, "--workdir", here, "--name", "student")
    started = killed("train", *arguments, when=lambda: reached("step-00000008"), alone=True)
    assert len(started) >= 3  # the launcher's two processes and the rank: none outlives the command
    limit = time.monotonic() + 30
    while any(alive(pid) for pid in started):
        assert time.monotonic() < limit, "ranks go on without the command that started them"
        time.sleep(0.2)
    killed("worker", "train", *arguments, when=lambda: reached("step-00000020"))
    assert not (here / "models" / "student" / "manifest.json").exists()
    # a save that was cut off: the run must go on from the one named by `latest`
    (checkpoints / "step-99999999").mkdir()
    ki_ds("worker", "train", *arguments)
    whole, resumed = metrics(work / "models" / "student"), metrics(here / "models" / "student")
    for one, two in zip(whole, resumed, strict=True):
        for key in ("step", "loss", "ce", "kl", "alpha", "gradient_norm", "validation"):
            assert one.get(key) == two.get(key), (one["step"], key)
    weights = [folder / "models" / "student" / "model" / "model.safetensors" for folder in (work, here)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len(list(checkpoints.glob("step-*"))) == 2


@pytest.mark.slow
def test_teach_killed_three_times_is_byte_identical(masked, tmp_path):
    file, work = masked
    more = ("--set", "models.student.inherit.alpha_T=1.0")  # 320 samples: 20 shards
    whole, broken = (copy_without(work, tmp_path / name, "student") for name in ("whole", "broken"))
    for folder in (whole, broken):
        shutil.rmtree(folder / "targets")
    ki_ds("worker", "teach", file, "--workdir", whole, *more)
    targets = broken / "targets" / "teacher@a"
    for count in (1, 6, 12):
        killed(
            "worker",
            "teach",
            file,
            "--workdir",
            broken,
            *more,
            when=lambda n=count: len(list(targets.glob("*.kit"))) >= n,
        )
        assert not (targets / "manifest.json").exists()
    ki_ds("teach", file, "--workdir", broken, *more, "--processes", 2)
    assert folder_digest(targets) == folder_digest(whole / "targets" / "teacher@a")
    assert len(list(targets.glob("*.kit"))) == 20


def test_longer_run_appends_to_its_targets(masked, tmp_path):
    file, work = masked
    here = copy_without(work, tmp_path / "work", "student")
    folder = here / "targets" / "teacher@a"
    before = {path.name: path.read_bytes() for path in folder.glob("*.kit")}
    ki_ds("worker", "teach", file, "--workdir", here, "--set", "models.student.train.steps=60")
    after = {path.name: path.read_bytes() for path in folder.glob("*.kit")}
    assert len(before) == 10 < len(after) == 15
    assert before.items() <= after.items()


def test_runner_scripts_work_under_the_launcher_directly(masked, tmp_path):
    file, work = masked
    here = copy_without(work, tmp_path / "work")
    runner = Path(__file__).parents[2] / "runners" / "evaluate.py"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
    done = subprocess.run(
        [*launcher, str(runner), str(file), "--workdir", str(here)],
        env=environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((folder / "results" / "student" / "perplexity.json").read_text()) for folder in (work, here)]
    assert found[0] == found[1]
