"""Two nodes, a rank on each, whose network goes away."""

import contextlib
import time

import pytest
from helpers.commands import command
from helpers.outcomes import assert_same_course, steps_done
from helpers.two_nodes import RANK, two_nodes

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(600)]


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
    assert_same_course(work, undisturbed[1])


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
    assert_same_course(work, undisturbed[1])
