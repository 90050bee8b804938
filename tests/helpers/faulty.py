"""A small experiment to be disturbed, and a `ki-ds run` of it that a test can watch and hurt."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers.commands import alive, command, descendants, environment, metrics
from helpers.tiny_experiment import EXPERIMENT as TINY
from helpers.tiny_experiment import TRAIN

STEPS = 200
COURSE = ("step", "loss", "ce", "kl", "alpha", "learning_rate", "gradient_norm", "validation")
EXPERIMENT = TINY | {
    "name": "faults",
    "models": {
        "t": {"architecture": "gpt-tiny", "train": {**TRAIN, "steps": 5}},
        "s": {
            "architecture": "gpt-tiny",
            "train": {**TRAIN, "steps": STEPS, "checkpoint_every": 25, "evaluate_every": 100},
            "inherit": {"from": {"a": "t"}, "teacher_steps": 60, "targets": {"k": 16}},
        },
    },
    "samples_per_shard": 8,
}


class Running:
    """A `ki-ds` command in the background."""

    def __init__(self, log, *arguments, timeout_s=500):
        self.log, self.limit = log, time.monotonic() + timeout_s
        with log.open("w") as file:
            self.process = subprocess.Popen(command(*arguments), env=environment(), stdout=file, stderr=file)
        self.started = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [self.process.pid, *self.everything()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self):
        return self.log.read_text()

    def everything(self):
        """Process ids of all that this command has started so far."""
        self.started |= set(descendants(self.process.pid))
        return self.started

    def until(self, reached):
        """Wait until it holds; fails when the command ends before."""
        while not reached():
            self.everything()
            assert self.process.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < self.limit, f"never came so far:\n{self.output}"
            time.sleep(0.01)

    def rank(self, number):
        """The process id of a rank."""
        for pid in self.everything():
            ours = b"worker" in command_line(pid) and b"launcher" not in command_line(pid)
            with contextlib.suppress(OSError):
                if ours and f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
        raise AssertionError(f"there is no rank {number}:\n{self.output}")

    def launcher(self):
        """The process id of DeepSpeed's launcher, which started the ranks."""
        return next(pid for pid in self.everything() if b"deepspeed.launcher.launch" in command_line(pid))

    def end(self, *codes):
        """Wait for the end: its exit code is one of these, and nothing is left running."""
        while self.process.poll() is None:
            self.everything()
            assert time.monotonic() < self.limit, f"hangs:\n{self.output}"
            time.sleep(0.05)
        assert self.process.returncode in codes, self.output
        limit = time.monotonic() + 20
        while left := [pid for pid in self.started if alive(pid)]:
            assert time.monotonic() < limit, f"still running: {left}"
            time.sleep(0.1)
        return self.output


def command_line(pid):
    """Of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def steps_done(work):
    """Steps of the student in the metrics."""
    path = work / "models" / "s" / "metrics.jsonl"
    return len(re.findall(r"\n", path.read_text())) if path.exists() else 0


def checkpoint(work):
    """The step of the student's last checkpoint."""
    found = sorted((work / "models" / "s" / "checkpoints").glob("step-*/ki_ds.json"))
    return json.loads(found[-1].read_text())["step"] if found else 0


def same_course(one, two, rel=0.0):
    """Whether two runs took the same course, to the last bit or to a relative difference."""
    first, second = (metrics(work / "models" / "s") for work in (one, two))
    assert len(first) == len(second) == STEPS
    for mine, theirs in zip(first, second, strict=True):
        for key in COURSE:
            wanted = theirs.get(key)
            if rel and wanted is not None:
                wanted = pytest.approx(wanted, rel=rel, abs=rel)
            assert mine.get(key) == wanted, (mine["step"], key)
