"""Runs the command line as a user does: real processes, real files."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SCHEDULERS = ("OMPI_", "PMIX_", "SLURM_")


def command(*arguments):
    return [sys.executable, "-m", "ki_ds.cli", *map(str, arguments)]


def environment():
    """This process's environment without what makes it a rank."""
    return {key: value for key, value in os.environ.items() if key not in LAUNCHER and not key.startswith(SCHEDULERS)}


def no_rank(patch):
    """This process is no rank, and is none again once `patch` is undone, whatever has joined a group until then."""
    for name in LAUNCHER:
        patch.setenv(name, "")
        patch.delenv(name)


def ki_ds(*arguments, code=0, cwd=None):
    """Run ki-ds; its output. Fails the test on another exit code."""
    done = subprocess.run(
        command(*arguments), env=environment(), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}\n{done.stdout}"
    return done.stdout


def here(*arguments, code=0):
    """What a `ki-ds` command that starts no rank says, in this process."""
    from ki_ds.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    assert (end.value.code or 0) == code, said.getvalue()
    return said.getvalue()


def killed(*arguments, when, alone=False, timeout_s=120):
    """Start ki-ds, and SIGKILL it as soon as `when()` holds: with everything it started, or `alone`.

    Returns the processes that it had started.
    """
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    limit = time.monotonic() + timeout_s
    try:
        while not when():
            assert process.poll() is None, f"ended before it could be killed:\n{process.stdout.read().decode()}"
            assert time.monotonic() < limit, "never came to the point where it was to be killed"
            time.sleep(0.005)
    finally:
        started = descendants(process.pid)
        for one in [process.pid, *([] if alone else started)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return started


def descendants(pid):
    """Process ids of all descendants, from /proc."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, pending = [], [pid]
    while pending:
        for child in children.get(pending.pop(), []):
            found.append(child)
            pending.append(child)
    return found


def alive(pid):
    """Whether a process runs, and is not merely unreaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def folder_digest(folder):
    """Of all names and bytes of a folder."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            whole.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def metrics(folder):
    """The lines of all steps, without that of the model before its first step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


def write(path, experiment):
    path.write_text(json.dumps(experiment))
    return path
