"""`ki-ds targets verify` and `repair`: every fault is named, and set aside where it can be made again."""

import json

import numpy as np
import pytest
from helpers.commands import folder_digest, here, write
from helpers.documents import documentation
from helpers.exchange import EXPERIMENT, damage, rewritten, run
from helpers.folders import forge

from ki_ds.sealed import read_manifest
from ki_ds.targets.manifest import open_folder


def test_whole_folder_has_no_fault(world):
    root = world[0]
    for more in ((), ("--deep",), ("--against-corpus", "--workdir", root / "work"), ("--deep", "--against-corpus", "--workdir", root / "work")):  # fmt: skip  # noqa: E501
        assert "3 shards, 48 samples: no fault" in run("verify", root / "big@a", *more)


def test_every_bad_frame_is_named(copy):
    shards = open_folder(copy)
    index = shards.shard(1).index
    path = copy / shards.name(1)
    data = bytearray(path.read_bytes())
    for frame in (2, 9):
        data[int(index[frame]["offset"]) + int(index[frame]["compressed"]) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    (copy / shards.name(2)).write_bytes((copy / shards.name(2)).read_bytes()[:-50])
    said = run("verify", copy, code=1)
    for named in ("sample 18:", "sample 25:", shards.name(2), "3 faults in 2 of 3 shards"):
        assert named in said
    assert "Traceback" not in said


def test_repair_sets_aside_and_says_what_is_left(copy):
    path = damage(copy, 1)
    kept = path.read_bytes()
    said = run("repair", copy)
    assert "1 of 3 shards to be computed again" in said
    assert not path.exists()
    assert (copy / "aside" / path.name).read_bytes() == kept
    assert "is missing" in run("verify", copy, code=1)
    assert "1 of 3 shards" in run("repair", copy)  # nothing more to set aside


def test_repair_leaves_a_whole_folder_alone(copy):
    before = folder_digest(copy)
    assert "0 of 3 shards" in run("repair", copy)
    assert folder_digest(copy) == before


def test_repair_moves_nothing_where_every_shard_disagrees_with_the_manifest(copy):
    facts = read_manifest(copy)["facts"]
    facts["header"]["tokenizer"] = "another"
    forge(copy, facts=facts)
    said = run("repair", copy, code=2)
    assert "all 3 shards seem to be damaged" in said and "tokenizer" in said
    assert len([*copy.glob("*.kit")]) == 3


def test_verify_against_another_corpus(copy, world, tmp_path):
    changed = json.loads(json.dumps(EXPERIMENT))
    changed["corpora"]["a"]["sources"] = [documentation("email")]
    here("corpus", write(tmp_path / "other.json", changed), "--workdir", tmp_path / "work")
    said = run("verify", copy, "--against-corpus", "--workdir", tmp_path / "work", code=2)
    assert "its digest is" in said


def test_another_input_with_right_checksums(copy, world):
    def change(planes, digests):
        digests[3] ^= np.uint64(1)

    rewritten(copy, 1, change)
    assert "no fault" in run("verify", copy)
    said = run("verify", copy, "--against-corpus", "--workdir", world[0] / "work", code=1)
    assert "sample 19: the teacher saw another input" in said


@pytest.mark.parametrize(
    ("scalar", "nats", "message"),
    [("first", 0.5, "above 0"), ("first", -0.001, "sum to more than 1"), ("truth", 0.0, "more probable than"),
     (1.0, -30.0, "sum to less than 1")],
)  # fmt: skip
def test_probabilities_that_cannot_be(copy, scalar, nats, message):
    how = open_folder(copy).codec

    def change(planes, digests):
        planes.scalars_Sn[how.scalars.index(scalar)] = round(nats * 256)

    rewritten(copy, 0, change)
    assert "no fault" in run("verify", copy)
    assert message in run("verify", copy, "--deep", code=1)


def test_true_token_with_another_probability(copy, world):
    how = open_folder(copy).codec

    def change(planes, digests):
        planes.scalars_Sn[how.scalars.index("truth")] = -20 * 256

    rewritten(copy, 0, change)
    against = ("--deep", "--against-corpus", "--workdir", world[0] / "work")
    assert "not what its entry says" in run("verify", copy, *against, code=1)
