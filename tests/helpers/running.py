"""A `ki-ds` command in the background, that a test can watch and hurt."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from helpers.commands import alive, command, descendants, environment


class Running:
    """A `ki-ds` command in the background; when this is left, nothing of it runs on."""

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
            time.sleep(0.1)  # looking for processes costs a good part of a core

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
