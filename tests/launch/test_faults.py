"""What befalls a distributed run: ranks that die, hang or are stopped. It must end, and go on when started again."""

import os
import shutil
import signal
import subprocess

import pytest
from helpers.commands import ki_ds
from helpers.outcomes import assert_same_course, checkpoint, steps_done
from helpers.ranks import ranks
from helpers.running import Running

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(600)]  # two or three launches each


def train(undisturbed, work, *options, processes=2):
    arguments = ("train", undisturbed[0], "--workdir", work, "--name", "s", "--processes", processes, *options)
    return Running(work.parent / "log", *arguments)


def test_rank_that_is_killed_in_training(undisturbed, work):
    """The command starts again by itself, as often as it may, and the run is the same."""
    with train(undisturbed, work, "--restarts", 1) as run:
        run.until(lambda: steps_done(work) > 60)
        os.kill(run.rank(1), signal.SIGKILL)
        output = run.end(0)
    assert "train s: failed" in output
    assert "0 restarts are left" in output
    assert_same_course(work, undisturbed[1])


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
    assert_same_course(work, undisturbed[1])


def test_rank_that_hangs_is_named(undisturbed, work):
    with train(undisturbed, work, "--timeout", 0.4) as run:
        run.until(lambda: steps_done(work) > 30)
        hung = run.rank(1)
        os.kill(hung, signal.SIGSTOP)
        output = run.end(1)
    assert f"process {hung}): no sign of life for 24s; last: train s: step" in output
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


def test_other_numbers_of_ranks_go_on_with_the_same_run(undisturbed, work):
    """Two, then one, then two: the same data in the same order; sums in another order."""
    for processes, enough in ((2, 50), (1, 110)):
        with train(undisturbed, work, processes=processes) as run:
            run.until(lambda enough=enough: steps_done(work) > enough)
            os.kill(run.process.pid, signal.SIGTERM)
            run.end(75)
    with train(undisturbed, work) as run:
        assert "made by 1 ranks at ZeRO 1, converted for 2" in run.end(0)
    assert_same_course(work, undisturbed[1], rel=2e-4)


@pytest.mark.root
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
        assert_same_course(work, undisturbed[1])
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


PATCHED = """
import sys
from importlib import metadata
real = metadata.version
metadata.version = lambda name: "0.0.1" if name == "zstandard" else real(name)
from ki_ds.cli.main import main
main(sys.argv[1:])
"""


def test_ranks_that_differ_are_named_with_what_differs(undisturbed, work, tmp_path):
    """Another experiment file (in a number that shapes nothing) and another version of a library, on rank 1."""
    arguments = ["worker", "train", undisturbed[0], "--workdir", work, "--name", "s"]
    changed = ["-c", PATCHED, *arguments, "--set", "models.s.train.evaluate_every=7"]
    with ranks([["-m", "ki_ds.cli", *arguments], changed], tmp_path / "logs") as both:
        codes = [rank.wait(150) for rank in both]
    output = (tmp_path / "logs" / "rank-0").read_text()
    assert codes == [2, 2], output
    assert "rank 1 (host " in output
    assert "the version of zstandard is 0.0.1; rank 0 has" in output
    assert "the experiment file is" in output
    assert "Give every node the same files" in output
