"""Signals: whoever hears one saves and ends with the code that says so; on a second one, at once."""

import builtins
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.commands import alive, descendants, environment, here
from helpers.experiments import written

from ki_ds.launch import launcher, signals
from ki_ds.launch.command import Launch
from ki_ds.launch.records import read_record

CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130, signal.SIGHUP: 129}


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_stop_while_a_source_is_read_is_no_error_of_the_source(tmp_path, monkeypatch, number):
    """Wherever in the reading it comes: whoever handles the failures of sources must not handle this."""
    file, real = written(tmp_path), open

    class Interrupted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size=-1):
            signal.raise_signal(number)
            return self.file.read(size)

    def opened(path, *arguments, **named):
        found = real(path, *arguments, **named)
        return Interrupted(found) if str(path).endswith("a.txt") else found

    monkeypatch.setattr("ki_ds.corpus.sources.open", opened, raising=False)
    monkeypatch.setattr(builtins, "open", opened)
    before = signal.getsignal(number)
    said = here("run", file, "--workdir", tmp_path / "work", code=CODES[number])
    assert "stopped, as asked; the same command goes on from here" in said
    assert "error" not in said and "Traceback" not in said
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_ignored(monkeypatch):
    """As nohup has it for SIGHUP, and a shell for Ctrl-C of what runs in its background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.listening(lambda number, frame: pytest.fail("heard")):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# a command that takes its stop for something else, as libraries may
DEAF = """
import sys, time
from ki_ds.cli import main as command
def deaf(*_, **__):
    while True:
        try:
            print("at work", flush=True)
            time.sleep(60)
        except BaseException:
            print("goes on", flush=True)
command.app = deaf
command.main()
"""


@pytest.mark.launch
def test_second_ctrl_c_ends_at_once_and_gives_the_cursor_back():
    terminal, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], env=environment(), stdin=subprocess.DEVNULL, stdout=other, stderr=other
    )
    os.close(other)
    said = b""
    for words in (b"at work", b"goes on"):
        while words not in said:
            said += os.read(terminal, 1000)
        process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert os.read(terminal, 1000).endswith(b"\x1b[?25h")
    os.close(terminal)


# ranks that are launched by nothing but Python: they do as they are told, at once or slowly, or not at all
RANK = """
import sys, time
from pathlib import Path
from ki_ds.launch import heartbeat
heartbeat.PERIOD_S = 0.1
heartbeat.start(Path(sys.argv[1]), 0, 1, 60.0, watched=True)
heartbeat.report("work")
while not (heartbeat.asked_to_stop() and sys.argv[2] != "deaf"):
    time.sleep(0.05)
time.sleep(1.0 if sys.argv[2] == "slow" else 0.0)
heartbeat.end("stopped")
sys.exit(heartbeat.exit_code())
"""


def launch(tmp_path, monkeypatch, how, *numbers):
    """Launch such a rank, and send this process these signals, a moment apart, once it is at work."""
    monkeypatch.setattr(launcher, "LOOK_S", 0.05)
    monkeypatch.setattr(
        launcher, "command_line", lambda _launch, _stages, control: [sys.executable, "-c", RANK, str(control), how]
    )
    monkeypatch.setattr(launcher, "launcher_environment", lambda _: environment())
    monkeypatch.setattr(signals, "asked", [])

    def at_work():
        files = tmp_path.glob("control/*/rank-00000.json")
        return any((read_record(file) or {}).get("doing") == "work" for file in files)

    def send():
        while not at_work():
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return launcher.launched(Launch([], 1, tmp_path / "control"), ["train:s"])
    finally:
        sender.join()


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_launched_ranks_save_on_each_of_them(tmp_path, monkeypatch, capsys, number):
    outcome = launch(tmp_path, monkeypatch, "obeys", number)
    assert (outcome.how, outcome.code) == ("stopped", 75)
    assert signals.exit_code() == CODES[number]
    assert f"asked to stop ({number.name}): saving" in capsys.readouterr().out


def test_second_ctrl_c_ends_launched_ranks_at_once(tmp_path, monkeypatch):
    before = descendants(os.getpid())
    with pytest.raises(SystemExit) as ended:
        launch(tmp_path, monkeypatch, "deaf", signal.SIGINT, signal.SIGINT)
    assert ended.value.code == 130
    assert descendants(os.getpid()) == before
    assert not any((tmp_path / "control").glob("*"))


def test_a_terminal_that_goes_away_says_so_more_than_once(tmp_path, monkeypatch):
    """And Ctrl-C before it is no second one either."""
    outcome = launch(tmp_path, monkeypatch, "slow", signal.SIGHUP, signal.SIGHUP, signal.SIGINT)
    assert (outcome.how, signals.exit_code()) == ("stopped", 129)


LAUNCHED = """
import sys
from pathlib import Path
from ki_ds.launch import launcher
from ki_ds.launch.command import Launch
RANK = "import os, sys, time; from ki_ds.launch import distributed; distributed.end_with_input(); "
RANK += "print(os.getpid(), flush=True); time.sleep(600)"
launcher.command_line = lambda *_: [sys.executable, "-c", RANK]
launcher.launched(Launch([], 1, Path(sys.argv[1])), ["train:s"])
"""


@pytest.mark.launch
def test_ranks_end_with_a_run_that_is_killed_and_not_reaped(tmp_path):
    """A supervisor may leave it a zombie, which still has its number."""
    run = subprocess.Popen(
        [sys.executable, "-c", LAUNCHED, str(tmp_path / "control")],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    rank = int(run.stdout.readline())
    try:
        os.kill(run.pid, signal.SIGKILL)
        limit = time.monotonic() + 10
        while alive(rank):
            assert time.monotonic() < limit, "the rank works on"
            time.sleep(0.05)
        os.kill(run.pid, 0)  # still there, in a way
    finally:
        run.wait()
        run.stdout.close()
