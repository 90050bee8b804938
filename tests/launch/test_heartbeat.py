"""Signs of life: who is blamed for a run that stands still, and how ranks end that nobody watches any more."""

import contextlib
import mmap
import os
import signal
import time

import pytest
from helpers.ranks import ranks

from ki_ds import files
from ki_ds.launch import heartbeat, leftovers
from ki_ds.launch.leftovers import Leftovers
from ki_ds.launch.monitor import START_S, Monitor
from ki_ds.launch.records import RECORD_BYTES, read_record, write_record

LIMIT = 10.0


@pytest.fixture
def monitor(tmp_path, monkeypatch):
    """A monitor of three ranks, with a clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    found = Monitor(tmp_path, 3, LIMIT)
    found.clock = now
    return found


def beats(monitor, **ranks):
    """Let time pass in which the ranks give the signs of life described by (beat, progress, waiting)."""
    for name, (beat, progress, waiting) in ranks.items():
        rank = int(name.removeprefix("r"))
        record = {"host": f"host{rank}", "process": 7, "beat": beat, "progress": progress, "waiting": waiting}
        write_record(monitor.folder / f"rank-{rank:05d}.json", {**record, "doing": f"step {progress}"})
    said = monitor.look()
    monitor.clock[0] += LIMIT * 0.6
    return said


def test_all_is_well_while_all_get_on(monitor):
    for n in range(6):
        assert beats(monitor, r0=(n, n, False), r1=(n, n, False), r2=(n, n, True)) == ""


def test_rank_without_a_beat_is_blamed_and_those_that_wait_for_it_are_not(monitor):
    beats(monitor, r0=(0, 5, False), r1=(0, 5, False), r2=(0, 5, False))
    for n in (1, 2):
        said = beats(monitor, r0=(n, 6, True), r1=(n, 6, True))
    assert said == "rank 2 (host host2, process 7): no sign of life for 10s; last: step 5"


def test_rank_that_lives_but_hangs_is_blamed_before_those_that_wait(monitor):
    beats(monitor, r0=(0, 5, False), r1=(0, 5, False), r2=(0, 5, False))
    for n in (1, 2):
        said = beats(monitor, r0=(n, 5, True), r1=(n, 5, False), r2=(n, 5, True))
    assert said == "rank 1 (host host1, process 7): no progress for 10s; last: step 5"


def test_those_furthest_behind_are_blamed_where_none_says_that_it_waits(monitor):
    beats(monitor, r0=(0, 5, False), r1=(0, 4, False), r2=(0, 5, False))
    for n in (1, 2):
        said = beats(monitor, r0=(n, 5, False), r1=(n, 4, False), r2=(n, 5, False))
    assert said.startswith("rank 1 (host host1") and "rank 0" not in said


def test_waiting_for_one_that_gets_on_is_no_fault(monitor):
    for n in range(6):
        assert beats(monitor, r0=(n, 1, True), r1=(n, n, False), r2=(n, 1, True)) == ""


def test_all_waiting_for_each_other_are_blamed(monitor):
    for n in range(3):
        said = beats(monitor, r0=(n, 1, True), r1=(n, 1, True), r2=(n, 1, True))
    assert said.count("no progress") == 3


def test_rank_that_never_appears(monitor):
    looks = round(START_S / (LIMIT * 0.6))
    for n in range(looks + 1):
        assert beats(monitor, r0=(n, n, False), r1=(n, n, False)) == ""
    assert beats(monitor, r0=(looks, looks, False), r1=(looks, looks, False)) == (
        "rank 2: did not appear within 2m 00s"
    )


def test_those_who_wait_for_one_that_loads_its_libraries_slowly_are_not_blamed(monitor):
    """With a limit shorter than the start of a process takes: a loaded machine, a network's disk."""
    for n in range(5):
        assert beats(monitor, r0=(n, 0, False), r1=(n, 0, False)) == ""
    assert beats(monitor, r0=(5, 0, False), r1=(5, 0, False), r2=(0, 0, False)) == ""
    assert beats(monitor, r0=(6, 0, False), r1=(6, 0, False), r2=(1, 0, False)) == ""
    assert "no progress for 10s" in beats(monitor, r0=(7, 1, False), r1=(7, 0, False), r2=(2, 1, False))


def test_rank_that_dies_before_the_others_appear_is_blamed_in_time(monitor):
    for n in range(3):
        said = beats(monitor, r0=(0, 0, False), r1=(n, n, False))
    assert said.startswith("rank 0 (host host0, process 7): no sign of life for 10s")


def test_rank_that_has_ended_is_not_missed(monitor):
    for rank in (0, 1, 2):
        write_record(monitor.folder / f"rank-{rank:05d}.json", {"beat": 1, "ended": "done"})
    for _ in range(3):
        assert beats(monitor) == ""
    assert monitor.ended() == {"done"}
    assert monitor.living() == []


def test_record_that_is_being_written_is_read_later(monitor):
    beats(monitor, r0=(0, 0, False), r1=(0, 0, False), r2=(0, 0, False))
    (monitor.folder / "rank-00001.json").write_bytes(b'{"beat": 1, "pro')
    assert read_record(monitor.folder / "rank-00001.json") is None
    assert beats(monitor, r0=(1, 1, False), r2=(1, 1, False)) == ""


def test_records_have_one_size_and_writing_them_never_fails(tmp_path):
    path = tmp_path / "rank-00000.json"
    for text in ("a" * 300, "b"):
        write_record(path, {"doing": text})
        assert path.stat().st_size == RECORD_BYTES
        assert read_record(path) == {"doing": text}
    write_record(tmp_path / "nowhere" / "rank-00000.json", {"doing": "nothing"})


# a rank that gives signs of life and does nothing
RANK = """
import sys, time
from pathlib import Path
from ki_ds.launch import heartbeat
heartbeat.PERIOD_S = 0.2
heartbeat.start(Path(sys.argv[1]), int(sys.argv[2]), 2, 4.0, watched=sys.argv[3] == "watched")
while True:
    heartbeat.report("work")
    if heartbeat.asked_to_stop():
        heartbeat.end("stopped")
        sys.exit(heartbeat.exit_code())
    time.sleep(0.1)
"""


@contextlib.contextmanager
def started(folder, watched):
    """Two ranks, and what each says; nothing is left of them."""
    logs = folder / "logs"
    with ranks([["-c", RANK, folder, rank, watched] for rank in (0, 1)], logs) as processes:
        yield processes, lambda rank: (logs / f"rank-{rank}").read_text()


def until_at_work(*folders, meanwhile=lambda: None):
    limit = time.monotonic() + 60
    files = [folder / f"rank-0000{n}.json" for folder in folders for n in (0, 1)]
    while not all((read_record(file) or {}).get("doing") == "work" for file in files):
        assert time.monotonic() < limit
        meanwhile()
        time.sleep(0.05)


@contextlib.contextmanager
def working(folder, watched):
    """The same, when both have begun to work."""
    with started(folder, watched) as found:
        until_at_work(folder)
        yield found


@pytest.mark.launch
def test_rank_0_watches_where_nobody_else_does(tmp_path):
    with working(tmp_path, "alone") as ((first, second), said):
        os.kill(second.pid, signal.SIGSTOP)
        assert first.wait(60) == 1
        assert f"process {second.pid}): no sign of life for 4s; last: work; this run stops" in said(0)
        os.kill(second.pid, signal.SIGCONT)
        assert second.wait(60) == 1


@pytest.mark.launch
def test_what_an_earlier_run_left_is_not_taken_for_this_one(tmp_path):
    """A word to stop, a rank that had been asked to save."""
    write_record(tmp_path / "word.json", {"beat": 9, "say": "stop"})
    with working(tmp_path, "alone") as (both, _):
        for one in both:
            one.kill()
            one.wait()
    write_record(tmp_path / "rank-00001.json", {"beat": 3, "stop_requested": True, "ended": "stopped"})
    write_record(tmp_path / "word.json", {"beat": 9, "say": "stop"})
    with working(tmp_path, "alone") as (both, _):
        time.sleep(2)  # ten beats
        assert [one.poll() for one in both] == [None, None]


@pytest.mark.launch
def test_ranks_do_as_they_are_told_and_end_when_they_hear_nothing(tmp_path):
    """Three runs at once, each with a word of its own, or none."""
    told = {"save": 75, "stop": 1, "": 1}
    monitors = {word: Monitor(tmp_path / (word or "nothing"), 2, 4.0) for word in told}

    def go_on():
        for monitor in monitors.values():
            monitor.say("run")

    with contextlib.ExitStack() as stack:
        runs = {word: stack.enter_context(started(monitor.folder, "watched")) for word, monitor in monitors.items()}
        until_at_work(*(monitor.folder for monitor in monitors.values()), meanwhile=go_on)
        for word in ("save", "stop"):
            monitors[word].say(word)
        for word, (both, said) in runs.items():
            assert [one.wait(60) for one in both] == [told[word]] * 2
            assert ("nothing heard for 4s" in said(0)) == (word == "")


@pytest.mark.launch
def test_second_signal_ends_at_once(tmp_path):
    slow = RANK.replace("if heartbeat.asked_to_stop():", "if False:")
    with ranks([["-c", slow, tmp_path, 0, "alone"]], tmp_path / "logs") as [process]:
        while not (tmp_path / "word.json").exists():
            time.sleep(0.05)
        for _ in range(2):
            assert process.poll() is None
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        assert process.wait(20) == 75


@pytest.mark.parametrize("letter", ["a", "é", "\U0001f680", "\udc80", "\\"])
def test_sign_of_life_does_not_depend_on_what_is_said(tmp_path, letter):
    """However long a path is, and whatever script it is in; the numbers, which count, are whole."""
    record = {"host": letter * 100, "beat": 7, "doing": letter * 100_000, "stop_requested": True, "patience": 6}
    write_record(tmp_path / "rank-00000.json", record)
    found = read_record(tmp_path / "rank-00000.json")
    assert found["doing"] and letter * 100_000 == found["doing"] + letter * (100_000 - len(found["doing"]))
    assert found == record | {"doing": found["doing"]}


def test_slow_disk_is_no_disk_that_hangs(tmp_path, monkeypatch):
    """A file that is flushed to disk piece by piece shows at each that this gets on."""
    monkeypatch.setattr(files, "PIECE", mmap.PAGESIZE)
    monkeypatch.setattr(files, "on_piece", [heartbeat.count])
    (tmp_path / "weights").write_bytes(b"w" * (10 * mmap.PAGESIZE + 1))
    for flushed in (
        lambda: files.sync(tmp_path / "weights"),
        lambda: files.write_atomically(tmp_path / "shard", b"s" * (10 * mmap.PAGESIZE + 1)),
    ):
        before = heartbeat.THIS_RANK.progress
        flushed()
        assert heartbeat.THIS_RANK.progress - before >= 11


def test_later_run_clears_what_killed_ones_left_and_nobody_elses(tmp_path, monkeypatch):
    for name in ("dead-1/a", "dead-2/a", "alive-1/a", "alive-1/b", "10.0.0.1-2000", "empty-1/a"):
        (tmp_path / name).mkdir(parents=True)
        if "empty" not in name:
            write_record(tmp_path / name / "rank-00000.json", {"beat": 1})
    left = Leftovers(tmp_path)
    write_record(tmp_path / "alive-1" / "a" / "word.json", {"beat": 1})
    Monitor(tmp_path / "new-1" / "a", 1, LIMIT).say("run")
    left.clear()
    assert (tmp_path / "dead-1").exists()  # too early to tell
    monkeypatch.setattr(leftovers, "STILL_S", 0.0)
    left.clear()
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.glob("*/*") if one.is_dir()) == [
        "alive-1/a",
        "new-1/a",
    ]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["alive-1", "new-1"]
