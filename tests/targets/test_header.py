"""A shard's header: typed, complete or minimal, and what another writer says is kept."""

import json

import pytest

from ki_ds.targets.codec import Codec
from ki_ds.targets.distortion import Distortion
from ki_ds.targets.header import FolderHeader, Masking, Origin, ShardHeader, StreamOrder
from ki_ds.targets.selection import Selection

HOW = Codec(300, 4, 1 / 16, ("first", "truth", 1.0, 2.0))
FULL = FolderHeader(
    24, HOW, Origin("base", "a" * 32), Origin("wb", "b" * 32), "c" * 32, "mlm", Masking(0.15, 10),
    StreamOrder(1, 10, 99), Selection("top_k", 4),
)  # fmt: skip
SHARD = ShardHeader(FULL, 8, 16, 30, 120, Distortion(1e-5, 1e-3))
WRITTEN = {
    "teacher": {"name": "base", "digest": "a" * 32},
    "corpus": {"name": "wb", "digest": "b" * 32},
    "tokenizer": "c" * 32,
    "objective": "mlm",
    "masking": {"probability": 0.15, "views": 10},
    "stream": {"seed": 1, "views": 10, "sequences": 99},
    "sequence_length": 24,
    "selection": {"kind": "top_k", "k": 4, "p": 1.0, "temperature": 1.0},
    "codec": {
        "vocabulary": 300, "k": 4, "values": "log-probability", "quantum": 0.0625,
        "scalars": ["first", "truth", "tail@1", "tail@2"],
    },
}  # fmt: skip
NUMBERS = {"start": 8, "end": 16, "rows": 30, "entries": 120, "distortion": {"mean": 1e-5, "max": 1e-3}}


def again(value):
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def test_what_is_written_is_what_was_written_before():
    assert json.dumps(FULL.record) == json.dumps(WRITTEN)  # in this order, in a manifest
    assert SHARD.record == {**WRITTEN, **NUMBERS}


def test_header_survives_its_record():
    assert FolderHeader.read(again(WRITTEN)) == FULL and not FULL.more
    assert ShardHeader.read(again({**WRITTEN, **NUMBERS})) == SHARD


def test_causal_model_s_header_says_that_there_is_no_masking():
    causal = {**WRITTEN, "objective": "clm", "masking": None}
    found = FolderHeader.read(again(causal))
    assert found.masking is None and found.more == {} and json.dumps(found.record) == json.dumps(causal)


def test_minimal_header():
    said = {"sequence_length": 8, "codec": HOW.record}
    found = FolderHeader.read(again(said))
    assert found == FolderHeader(8, HOW) and found.record == said
    numbers = {"start": 0, "end": 0, "rows": 0, "entries": 0}
    shard = ShardHeader.read(again({**said, **numbers}))
    assert shard == ShardHeader(found, 0, 0, 0, 0, None) and shard.record == {**said, **numbers}


@pytest.mark.parametrize(
    "more",
    [
        {"colour": "blue"}, {"nested": {"a": [1, None]}}, {"teacher": "base"}, {"teacher": {"name": "base"}},
        {"tokenizer": 7}, {"objective": ["mlm"]}, {"stream": {"seed": -1, "views": 1, "sequences": 1}},
        {"stream": {"seed": True, "views": 1, "sequences": 1}}, {"selection": {"kind": "top_k", "k": "4"}},
        {"masking": {"probability": "much", "views": 1}}, {"distortion": None}, {"distortion": {"mean": "small"}},
        {"corpus": None},
    ],
)  # fmt: skip
def test_what_is_not_known_is_kept_as_it_is(more):
    said = {**WRITTEN, **NUMBERS, **more}
    found = ShardHeader.read(again(said))
    assert found.record == said and found.folder.more == more
    for name in more.keys() & {"teacher", "corpus", "tokenizer", "objective", "stream", "selection", "masking"}:
        assert getattr(found.folder, name) is None


@pytest.mark.parametrize("place", ["teacher", "corpus", "masking", "stream", "selection", "distortion"])
def test_further_keys_of_a_part_are_kept_and_the_rest_is_understood(place):
    said = again({**WRITTEN, **NUMBERS})
    said[place]["more"] = "x"
    found = ShardHeader.read(again(said))
    assert found.record == said
    assert found.distortion == SHARD.distortion
    for name in ("teacher", "corpus", "masking", "stream", "selection"):
        assert getattr(found.folder, name) == getattr(FULL, name)


@pytest.mark.parametrize("said", [None, [], 3, "header", {}, {"sequence_length": 8}, {"sequence_length": -1}])
def test_what_is_no_header(said):
    for kind in (FolderHeader, ShardHeader):
        with pytest.raises(ValueError, match="the header"):
            kind.read(said)
