"""A whole experiment on two nodes, through DeepSpeed's own launcher over ssh."""

import time

import pytest
from helpers.commands import alive, command
from helpers.outcomes import outcome
from helpers.two_nodes import RANK, two_nodes

pytestmark = [pytest.mark.launch, pytest.mark.root]


@pytest.fixture
def cluster(tmp_path):
    with two_nodes(tmp_path) as both:
        yield both


def test_nodes_are_apart_and_reach_each_other(cluster):
    for node, other in ((cluster.a, cluster.b), (cluster.b, cluster.a)):
        assert cluster.run(node, ["hostname", "-I"]).split() == [node.address]
        assert cluster.run(node, ["ssh", other.name, "hostname"]) == f"{other.name}\n"
    assert not set(cluster.processes(cluster.a)) & set(cluster.processes(cluster.b))
    cluster.link(up=False)
    reach = ["ssh", "-o", "ConnectTimeout=2", cluster.b.name, "true"]
    cluster.run(cluster.a, reach, code=255)
    cluster.link(up=True)
    cluster.run(cluster.a, reach)


def test_nothing_is_left_of_nodes(tmp_path):
    with two_nodes(tmp_path) as cluster:
        sleep = cluster.start(cluster.b, ["setsid", "sleep", "1000"])
        while not (pids := cluster.processes(cluster.b, "sleep 1000")):
            time.sleep(0.05)
        nodes = [cluster.a, cluster.b]
        pids += [pid for node in nodes for pid in cluster.processes(node)]
    assert len(pids) > 6 and not any(alive(pid) for pid in pids)
    assert not any(cluster.processes(node) for node in nodes)
    sleep.communicate()


@pytest.mark.slow
@pytest.mark.timeout(600)  # two whole runs, four launcher processes and four ranks
def test_two_nodes_equal_two_ranks_of_one(finished, cluster, tmp_path):
    """To the last bit: targets, losses, weights and perplexities."""
    (file, alone), apart = finished, tmp_path / "apart"
    # the shells on the way must leave what a setting says as it is
    settings = ("--set", 'models.t.train.on={"a":1.0}', "--set", 'models.s.train.on={"a": 1.0}')
    run = command("run", file, "--workdir", apart, "--hostfile", cluster.hostfile, *settings)
    process = cluster.start(cluster.a, run)
    said, ranks = "", set()
    for line in process.stdout:
        said += line
        ranks.add(tuple(len(cluster.processes(node, RANK)) for node in (cluster.a, cluster.b)))
    process.stdout.close()
    assert process.wait() == 0, said
    assert (1, 1) in ranks and max(ranks) == (1, 1), ranks
    assert "all done" in said
    assert outcome(apart) == outcome(alone)
