"""One holder of a folder at a time, whatever ends it."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.commands import alive

from ki_ds.errors import UserError
from ki_ds.launch import lock
from ki_ds.launch.lock import LOCKS, Hold, _newest, held, holder
from ki_ds.launch.records import write_record

S = "models/s"
HOLDER = """
import sys, time
from pathlib import Path
from ki_ds.launch.lock import held
with held(Path(sys.argv[1]), ["models/s"]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def root(tmp_path):
    return tmp_path / "work"


def another(root, seconds=60.0):
    """A process that holds a folder."""
    command = [sys.executable, "-c", HOLDER, root, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def elsewhere(root, **changes):
    """The hold of a process of another machine."""
    with held(root, [S]):
        number, record = _newest(root / LOCKS / S)
    path = root / LOCKS / S / f"{number}.json"
    record = record | {"machine": "another", "host": "far", "ended": False, "beat": 0} | changes
    write_record(path, record)
    return path, record


def test_a_held_folder_is_refused_and_says_by_whom(root):
    process = another(root)
    try:
        assert f"process {process.pid}, since 20" in holder(root, S)
        with pytest.raises(
            UserError, match=rf"models/s: is being made by another run: host .*, process {process.pid}, "
        ):
            Hold(root, S)
        with held(root, ["models/other"]):  # other folders go on side by side
            assert holder(root, "models/other")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_dead_holder_blocks_nobody(root, number):
    process = another(root)
    process.send_signal(number)
    limit = time.monotonic() + 60
    while holder(root, S):  # at last it is a zombie: nobody has asked for its end
        assert time.monotonic() < limit
        time.sleep(0.01)
    with held(root, [S]):
        assert f"process {os.getpid()}" in holder(root, S)
    process.wait()


def test_a_number_that_another_process_has_now_is_not_the_holder(root):
    process = another(root)
    process.kill()
    process.wait()
    number, record = _newest(root / LOCKS / S)
    write_record(root / LOCKS / S / f"{number}.json", record | {"process": os.getpid()})
    with held(root, [S]):
        pass


@pytest.mark.parametrize("end", [UserError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_every_kind_of_end_lets_go(root, end):
    with pytest.raises(type(end)), held(root, [S]):
        raise end
    assert not holder(root, S)
    with held(root, [S]):
        pass


def test_what_was_taken_before_a_refusal_is_let_go(root):
    with held(root, ["models/t"]):
        with pytest.raises(UserError, match="models/t"), held(root, [S, "models/t"]):
            pass
        assert not holder(root, S)


def test_a_holder_elsewhere_lives_while_its_beat_goes_on(root, monkeypatch):
    monkeypatch.setattr(lock, "LAPSE_S", 5.0)
    path, record = elsewhere(root)
    threading.Timer(0.3, write_record, (path, record | {"beat": 1})).start()
    with pytest.raises(UserError, match="host far"):
        Hold(root, S)


def test_a_holder_elsewhere_without_a_beat_is_dead(root, monkeypatch, capsys):
    monkeypatch.setattr(lock, "LAPSE_S", 0.5)
    elsewhere(root)
    with held(root, [S]):
        assert _newest(root / LOCKS / S)[1]["process"] == os.getpid()
    assert "held by host far" in capsys.readouterr().out


def test_a_hold_that_is_no_record_is_that_of_a_dead_process(root, monkeypatch):
    monkeypatch.setattr(lock, "LAPSE_S", 0.3)
    path, _ = elsewhere(root)
    path.write_bytes(b"\xff" * 10)
    with held(root, [S]):
        pass


def test_who_was_taken_for_dead_ends(root):
    process = another(root)
    number, record = _newest(root / LOCKS / S)
    write_record(root / LOCKS / S / f"{number + 1}.json", record | {"token": "new"})
    assert process.wait(timeout=20) == -signal.SIGTERM


@pytest.mark.parametrize("dead", [False, True])
def test_of_many_at_once_one_gets_it(root, dead):
    if dead:
        process = another(root)
        process.kill()
        process.wait()
    code = f"""
import sys
from pathlib import Path
from ki_ds.errors import UserError
from ki_ds.launch.lock import held
print("ready", flush=True)
sys.stdin.readline()
try:
    with held(Path({str(root)!r}), [{S!r}]):
        print("got", flush=True)
        sys.stdin.readline()
except UserError:
    print("refused", flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    tries = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(6)]
    assert {process.stdout.readline() for process in tries} == {"ready\n"}
    for process in tries:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sorted(process.stdout.readline().strip() for process in tries) == ["got", *["refused"] * 5]
    for process in tries:
        process.communicate("end\n")
    assert json.loads((root / LOCKS / S / f"{_newest(root / LOCKS / S)[0]}.json").read_text())["ended"]


# a run that holds a folder, and a rank of it, which waits for its word as ranks do
RUN = """
import subprocess, sys, time
from pathlib import Path
from ki_ds.launch.lock import held
control = Path(sys.argv[1]) / ".control" / "of-this-run"
with held(Path(sys.argv[1]), ["models/s"], control):
    rank = subprocess.Popen([sys.executable, "-c", sys.argv[2], control / "launch"], stdout=subprocess.PIPE)
    rank.stdout.readline()
    print(rank.pid, flush=True)
    time.sleep(60)
"""
RANK = """
import sys, time
from pathlib import Path
from ki_ds.launch import heartbeat
heartbeat.start(Path(sys.argv[1]), 0, 1, 600.0, watched=True)
print("works", flush=True)
time.sleep(60)
"""


@pytest.fixture
def orphan(root):
    """A rank whose run was killed, and which has not noticed."""
    run = subprocess.Popen([sys.executable, "-c", RUN, root, RANK], stdout=subprocess.PIPE, text=True)
    rank = int(run.stdout.readline())
    run.kill()
    run.wait()
    yield rank
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank, signal.SIGKILL)


def test_the_ranks_of_a_dead_holder_are_stopped_and_waited_for(root, orphan):
    with held(root, [S]):
        assert not alive(orphan)


def test_a_rank_that_does_not_end_is_named(root, orphan, monkeypatch):
    monkeypatch.setattr(lock, "LAPSE_S", 0.5)
    os.kill(orphan, signal.SIGSTOP)
    for _ in range(2):  # who was refused leaves no hold that hides the rank
        with pytest.raises(UserError, match=rf"a rank of it is not: host .*, process {orphan}\. End it"):
            Hold(root, S)
    os.kill(orphan, signal.SIGKILL)
    with held(root, [S]):
        pass


def test_holds_that_somebody_removes_are_back_with_the_next_beat(root):
    with held(root, [S]):
        shutil.rmtree(root / LOCKS)
        limit = time.monotonic() + 20
        while not holder(root, S):
            assert time.monotonic() < limit
            time.sleep(0.05)


def test_a_file_system_that_is_away_for_a_while_ends_nobody(root, monkeypatch):
    with held(root, [S]):
        hold = Hold(root, "models/t")
        for fails in ("read_record", "os.listdir"):
            with monkeypatch.context() as patch:
                patch.setattr(f"ki_ds.launch.lock.{fails}", away if fails == "os.listdir" else lambda _: None)
                hold.beat()  # no signal, no exception
        hold.end()


def away(_):
    raise OSError(errno.ESTALE, "Stale file handle")
