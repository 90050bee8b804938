"""What befalls a distributed run: ranks that die, hang or are stopped. It must end, and go on when started again."""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest
from helpers.commands import command, environment, ki_ds
from helpers.faulty import Running, checkpoint, same_course, steps_done
from helpers.two_nodes import RANK, two_nodes

from ki_ds.launch.distributed import free_port


@pytest.fixture
def work(undisturbed, tmp_path):
    """A work directory as it is before the student is trained."""
    _, done = undisturbed
    for name in ("tokenizer", "corpora", "targets", "models"):
        shutil.copytree(done / name, tmp_path / "work" / name)
    shutil.rmtree(tmp_path / "work" / "models" / "s")
    return tmp_path / "work"


def train(undisturbed, work, *options):
    return Running(
        work.parent / "log", "train", undisturbed[0], "--workdir", work, "--name", "s", "--processes", 2, *options
    )


def test_rank_that_is_killed_in_training(undisturbed, work):
    """The command starts again by itself, as often as it may, and the run is the same."""
    with train(undisturbed, work, "--restarts", 1) as run:
        run.until(lambda: steps_done(work) > 60)
        os.kill(run.rank(1), signal.SIGKILL)
        output = run.end(0)
    assert "train s: failed" in output
    assert "0 restarts are left" in output
    same_course(work, undisturbed[1])


def test_launcher_that_is_killed(undisturbed, work):
    """Its runner then exits with 0 and leaves the ranks; ki-ds does neither."""
    with train(undisturbed, work) as run:
        run.until(lambda: steps_done(work) > 30)
        os.kill(run.launcher(), signal.SIGKILL)
        output = run.end(1)
    assert "train s: failed" in output
    assert "Run again to continue" in output
    assert checkpoint(work) >= 25


def test_signal_saves_and_asks_for_another_start(undisturbed, work):
    """SIGTERM for the command, then SIGUSR1 for a single rank: after the step in hand all save, and end with 75."""
    done = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        begin = steps_done(work)
        with train(undisturbed, work) as run:
            run.until(lambda begin=begin: steps_done(work) > begin + 30)
            os.kill(run.process.pid if number == signal.SIGTERM else run.rank(1), number)
            output = run.end(75)
        assert "the same command goes on from here" in output
        assert checkpoint(work) == steps_done(work) > begin + 30
        done.append(checkpoint(work))
    assert any(step % 25 for step in done)  # saved because it was asked for
    with train(undisturbed, work) as run:
        run.end(0)
    same_course(work, undisturbed[1])


def test_rank_that_hangs_is_named(undisturbed, work):
    with train(undisturbed, work, "--timeout", 0.2) as run:
        run.until(lambda: steps_done(work) > 30)
        hung = run.rank(1)
        os.kill(hung, signal.SIGSTOP)
        output = run.end(1)
    assert f"process {hung}): no sign of life for 12s; last: train s: step" in output
    assert "rank 1 (host " in output
    assert "rank 0 (host" not in output


def test_rank_that_is_killed_in_teaching(undisturbed, work):
    file, done = undisturbed
    shutil.rmtree(work / "targets")
    with Running(work.parent / "log", "teach", file, "--workdir", work, "--processes", 2) as run:
        run.until(lambda: len([*(work / "targets").glob("t@a/*.kit")]) > 3)
        os.kill(run.rank(0), signal.SIGKILL)
        run.end(0, 1)  # 0: the other rank was fast enough to do the rest before the launcher ended it
    ki_ds("teach", file, "--workdir", work, "--processes", 2)
    mine, theirs = (sorted((one / "targets" / "t@a").glob("*.kit")) for one in (work, done))
    assert [(one.name, one.read_bytes()) for one in mine] == [(one.name, one.read_bytes()) for one in theirs]


def test_other_numbers_of_ranks_go_on_with_the_same_run(undisturbed, work):
    """Two, then one, then two: the same data in the same order; sums in another order."""
    for processes, enough in ((2, 50), (1, 110)):
        with Running(
            work.parent / "log", "train", undisturbed[0], "--workdir", work, "--name", "s", "--processes", processes
        ) as run:
            run.until(lambda enough=enough: steps_done(work) > enough)
            os.kill(run.process.pid, signal.SIGTERM)
            run.end(75)
    with train(undisturbed, work) as run:
        assert "made by 1 ranks at ZeRO 1, converted for 2" in run.end(0)
    same_course(work, undisturbed[1], rel=2e-4)


def test_disk_that_is_full_while_saving(undisturbed, work):
    """A real one, of a few hundred KB."""
    place = work / "models" / "s"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(place)], stderr=subprocess.PIPE, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with train(undisturbed, work) as run:
            output = run.end(2)
        assert "cannot be written: No space left on device. Free some space" in output
        assert "Traceback" not in output
        before = checkpoint(work)
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        with train(undisturbed, work) as run:
            run.end(0)
        assert before == 0 or before % 25 == 0
        same_course(work, undisturbed[1])
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_ranks_that_differ_are_named_with_what_differs(undisturbed, work, tmp_path):
    """Another experiment file (in a number that shapes nothing) and another version of a library, on rank 1."""
    file, _ = undisturbed
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "from importlib import metadata\nreal = metadata.version\n"
        "metadata.version = lambda name: '0.0.1' if name == 'zstandard' else real(name)\n"
    )
    port = str(free_port())
    ranks = []
    for rank in (0, 1):
        given = {
            **environment(), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        options = []
        if rank:
            given["PYTHONPATH"] = f"{tmp_path / 'site'}:{given.get('PYTHONPATH', '')}"
            options = ["--set", "models.s.train.evaluate_every=7"]
        program = command("worker", "train", file, "--workdir", work, "--name", "s", *options)
        ranks.append(subprocess.Popen(program, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [rank.communicate(timeout=150)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert "rank 1 (host " in outputs[0]
    assert "the version of zstandard is 0.0.1; rank 0 has" in outputs[0]
    assert "the experiment file is" in outputs[0]
    assert "Give every node the same files" in outputs[0]


@contextlib.contextmanager
def on_two_nodes(undisturbed, work, *options):
    """(the nodes, the running command) of a training run with a rank on each."""
    with two_nodes(work.parent) as cluster:
        arguments = ("--workdir", work, "--name", "s", "--hostfile", cluster.hostfile, "--timeout", 0.3, *options)
        process = cluster.start(cluster.a, command("train", undisturbed[0], *arguments))
        try:
            yield cluster, process
        finally:
            process.stdout.close()


def until(process, reached, timeout_s=150):
    limit = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < limit, "never came so far"
        time.sleep(0.02)


def test_network_that_is_away_for_a_moment(undisturbed, work):
    with on_two_nodes(undisturbed, work) as (cluster, process):
        until(process, lambda: steps_done(work) > 30)
        cluster.link(up=False)
        time.sleep(5)
        before = steps_done(work)
        cluster.link(up=True)
        output = process.stdout.read()
        assert process.wait() == 0, output
    assert before < 60  # it did stand still
    same_course(work, undisturbed[1])


def test_network_that_is_gone(undisturbed, work):
    """An end with a word on who is missing, nothing left on either node, and the next start goes on."""
    with on_two_nodes(undisturbed, work) as (cluster, process):
        until(process, lambda: steps_done(work) > 30)
        cluster.link(up=False)
        output = process.stdout.read()
        assert process.wait() == 1, output
        assert "no progress for 18s; last: train s: step" in output
        limit = time.monotonic() + 20
        while left := [pid for node in (cluster.a, cluster.b) for pid in cluster.processes(node, RANK)]:
            assert time.monotonic() < limit, left
            time.sleep(0.2)
        cluster.link(up=True)
        again = command("train", undisturbed[0], "--workdir", work, "--name", "s", "--hostfile", cluster.hostfile)
        cluster.run(cluster.a, again)
    same_course(work, undisturbed[1])


def test_failure_of_one_rank_in_teaching_is_no_stop(undisturbed, work):
    """The launcher then asks the others to end: the exit code is the failed rank's, and `--restarts` goes on."""
    shutil.rmtree(work / "targets")
    slow = ("--set", "samples_per_shard=64", "--restarts", 1)
    with Running(work.parent / "log", "teach", undisturbed[0], "--workdir", work, "--processes", 2, *slow) as run:
        run.until(lambda: list((work / "targets").glob("t@a/claims/*/*")))
        os.kill(run.rank(1), signal.SIGKILL)
        output = run.end(0)
    assert "as asked" not in output
    assert (work / "targets" / "t@a" / "manifest.json").exists()
