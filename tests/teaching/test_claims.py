"""Shards shared out through the file system: among ranks that die, and ranks that stand still."""

import signal
import threading
import time

import pytest
from helpers import folders
from helpers.commands import folder_digest
from helpers.ranks import ranks
from helpers.teaching import TEACH, made

from ki_ds.errors import UserError
from ki_ds.sealed import Identity, prepare
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.manifest import TargetFacts, seal_targets
from ki_ds.teaching import claims as module
from ki_ds.teaching.claims import CLAIMS, Claims, sealed_by_one, shared

PATIENCE_S = 200


def views(folder, count, world_size=2):
    """Every rank's view of a folder where so many shards are missing."""
    shards = ShardFolder(folder, count * 4, 4)
    (folder / CLAIMS / "x").mkdir(parents=True)
    return [Claims(shards, [*range(count)], folder / CLAIMS / "x", r, world_size) for r in range(world_size)]


def write(claims, number):
    folders.write(claims.shards.folder / claims.shards.name(number), 4 * number, 4 * number + 4)


def test_every_shard_is_claimed_once(tmp_path):
    one, two = views(tmp_path, 6)
    found = [view.next() for view in (one, two, two, one, two, one)]
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / CLAIMS / "x" / "1").read_text().startswith("rank 1 on ")


def test_ranks_that_come_for_shards_at_the_same_time_get_different_ones(tmp_path):
    ranks, found = views(tmp_path, 200, 8), []

    def work(view):
        while (number := view.next(backups=False)) is not None:
            found.append(number)

    threads = [threading.Thread(target=work, args=(view,)) for view in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [*range(200)]


def test_idle_ranks_take_over_from_different_ends_until_all_are_there(tmp_path):
    ranks = views(tmp_path, 4, 4)
    assert [view.next() for view in ranks] == [0, 1, 2, 3]
    write(ranks[0], 1)
    assert [view.next() for view in ranks] == [0, 0, 2, 3]  # 0, 2 and 3 are not there
    assert ranks[1].next(backups=False) is None
    for number in (0, 2, 3):
        write(ranks[0], number)
    assert [view.next() for view in ranks] == [None] * 4


def test_shards_that_appear_are_not_computed(tmp_path):
    one, _ = views(tmp_path, 3)
    write(one, 0)
    assert one.next() == 1


def test_a_folder_that_a_new_launch_has_cleared_gives_no_claims(tmp_path):
    one, _ = views(tmp_path, 3)
    (tmp_path / CLAIMS / "x").rmdir()
    assert not one.claim("0")
    assert one.next() == 0  # a backup of what the new launch computes: harmless


def test_claims_of_an_earlier_launch_do_not_count(tmp_path):
    shards = ShardFolder(tmp_path, 8, 4)
    assert shared(shards).next(backups=False) == 0
    again = shared(shards)
    assert [again.next(backups=False) for _ in range(3)] == [0, 1, None]
    assert len([*(tmp_path / CLAIMS).iterdir()]) == 1


def test_rank_that_does_not_see_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LAG_S", 0.3)
    monkeypatch.setattr(module.distributed, "rank", lambda: 1)
    with pytest.raises(UserError, match=r"not here \(rank 1\).*file system that all nodes share"):
        shared(ShardFolder(tmp_path, 8, 4))


@pytest.fixture
def complete(tmp_path):
    """Two views of a folder that is to be sealed, and how."""
    identity, folder = Identity("teach", {}, {}), tmp_path / "t@a"
    prepare(folder, identity)
    both = views(folder, 3)
    for number in range(3):
        write(both[0], number)
    return both, lambda: seal_targets(folder, identity, TargetFacts(12, 4, FolderHeader(8, Codec(300, 4, 1 / 16))))


def test_one_seals_and_the_other_waits(complete):
    (one, two), seal = complete
    calls = []

    def slowly():
        calls.append(threading.current_thread().name)
        time.sleep(0.5)
        return seal()

    found = {}
    threads = [
        threading.Thread(target=lambda v=v, n=n: found.update({n: sealed_by_one(v, slowly, "teach")}))
        for n, v in enumerate((one, two))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and found[0] == found[1]
    assert len(found[0].record["files"]) == 3 and not (one.shards.folder / CLAIMS).exists()


def test_another_takes_over_from_a_sealer_that_died(complete, monkeypatch):
    (one, two), seal = complete
    monkeypatch.setattr(module, "PATIENCE_S", 0.5)
    assert one.claim("seal-0")  # and then nothing
    assert len(sealed_by_one(two, seal, "teach").record["files"]) == 3


# ------------------------------------------------------------------------------------------------ real processes


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """An experiment, and its targets as one rank makes them."""
    folder = tmp_path_factory.mktemp("claims")
    file = made(folder, sizes={"n_embd": 256, "n_layer": 4, "n_head": 4})
    assert taught(file, folder / "work", 1) == [0]
    (folder / "work" / "targets").rename(folder / "targets")
    return file, folder / "targets" / "t@a"


def taught(file, work, of):
    with ranks([[*TEACH, file, "--workdir", work]] * of, work.parent / "logs") as started:
        return [process.wait(PATIENCE_S) for process in started]


def held(folder, rank):
    """Shards that a rank has claimed and not written."""
    shards = ShardFolder(folder, 640, 16)
    return [
        path.name
        for path in folder.glob(f"{CLAIMS}/*/[0-9]*")
        if path.read_text().startswith(f"rank {rank} ") and not (folder / shards.name(int(path.name))).exists()
    ]


def wait_until(true, processes):
    limit = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < limit and not any(process.poll() for process in processes)
        time.sleep(0.002)


@pytest.mark.launch
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (0, signal.SIGKILL),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_one_rank_finishes_what_another_has_begun(clean, tmp_path, victim, number):
    file, expected = clean
    work, folder = file.parent / "work", file.parent / "work" / "targets" / "t@a"
    other = 1 - victim
    try:
        with ranks([[*TEACH, file, "--workdir", work]] * 2, tmp_path) as processes:
            wait_until(lambda: any(held(folder, one) for one in (0, 1)), processes)
            if held(folder, other):  # the other waits until the victim is in the middle of a shard, too
                processes[other].send_signal(signal.SIGSTOP)
            wait_until(lambda: held(folder, victim), [processes[victim]])
            processes[victim].send_signal(signal.SIGSTOP)
            assert len(held(folder, victim)) == 1 and len([*folder.glob("*.kit")]) < 39
            processes[victim].send_signal(number)
            processes[other].send_signal(signal.SIGCONT)
            assert processes[other].wait(PATIENCE_S) == 0, (tmp_path / f"rank-{other}").read_text()
            assert folder_digest(folder) == folder_digest(expected)
            processes[victim].send_signal(signal.SIGCONT)
            found = processes[victim].wait(PATIENCE_S)
            wanted = -signal.SIGKILL if number == signal.SIGKILL else 0
            assert found == wanted, (tmp_path / f"rank-{victim}").read_text()
            assert folder_digest(folder) == folder_digest(expected)
            said = (tmp_path / "rank-0").read_text()
            assert "Traceback" not in said and (victim == 0 or "640/640 sequences" in said)
    finally:
        if folder.exists():
            folder.parent.rename(tmp_path / "targets")
