"""SIGKILL at random moments of all stages, while two runs want the same work directory: what is finished in the end is
what an undisturbed run leaves. `KI_DS_KILLS=50` kills more often."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import time

import pytest
from helpers.commands import command, descendants, environment, here, ki_ds
from helpers.experiments import written

KILLS = int(os.environ.get("KI_DS_KILLS", "5"))
TIMES = {"seconds", "tokens_per_second", "reading_seconds", "waited_seconds"}
RUN = ("--set", "models.t.train.checkpoint_every=3", "--set", "models.s.train.checkpoint_every=3")


def contents(work):
    """Of every file that a run leaves, but for times: the digest."""
    found = {}
    for path in sorted(work.rglob("*")):
        name = str(path.relative_to(work))
        beside = {"tensorboard", "checkpoints", "report", ".locks", ".control", "aside"} & set(
            path.relative_to(work).parts
        )
        if not path.is_file() or beside or name == ".digests.json":
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps(
                [{key: line[key] for key in line.keys() - TIMES} for line in lines], sort_keys=True
            ).encode()
        if path.name == "manifest.json":  # holds digests of metrics
            record = json.loads(data)
            data = json.dumps(
                [record["fingerprint"], record["facts"], sorted(record["files"])], sort_keys=True
            ).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(5400)
def test_what_is_left_after_kills_is_what_one_undisturbed_run_leaves(tmp_path):
    file, chance, kills, finished = written(tmp_path), random.Random(1), 0, 0
    began = time.monotonic()
    ki_ds("run", file, "--workdir", tmp_path / "alone", *RUN)
    whole_s, wanted = time.monotonic() - began, contents(tmp_path / "alone")
    while kills < KILLS or not finished:
        work = tmp_path / f"work-{finished}"
        runs = [start(file, work) for _ in range(2)]
        end = time.monotonic() + chance.uniform(0, whole_s if kills < KILLS else 100 * whole_s)
        while time.monotonic() < end and any(run.poll() is None for run in runs):
            time.sleep(0.01)
        kills += sum(kill(run, alone=chance.random() < 0.5) for run in runs)
        said = [run.communicate()[0] for run in runs]
        assert all(run.returncode in (0, 2, -signal.SIGKILL) for run in runs), said
        for run, words in zip(runs, said, strict=True):
            assert run.returncode != 2 or "is being made by another run" in words, words
        if any(run.returncode == 0 for run in runs):
            assert contents(work) == wanted, said
            assert "0 of them with faults" in here("verify", work, "--deep")
            finished += 1
    print(f"{kills} kills, {finished} work directories finished")


def start(file, work):
    arguments = command("run", file, "--workdir", work, *RUN)
    return subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(run, alone):
    """Kill a run that is not over, with all that it has started or `alone`; whether there was one."""
    if run.poll() is not None:
        return False
    for process in [run.pid, *([] if alone else descendants(run.pid))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return True
