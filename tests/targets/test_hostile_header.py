"""Headers that no writer gives are refused by name."""

import json

import pytest
from helpers.shards import HOW, build, contents, frame, one_frame, refused, said_by

from ki_ds.targets.shard import Shard


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"start": ' + b"9" * 5000 + b"}", b"\xd8\0", b"NaN"],
)
def test_header_that_is_not_json(tmp_path, text):
    assert "header" in refused(tmp_path / "x.kit", build(text))


def test_header_nested_as_deep_as_json_allows(tmp_path):
    """What can be parsed must be shown too."""
    for depth in range(880, 1000, 4):
        for inner in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
            assert "header" in refused(tmp_path / "x.kit", build(inner))
            said = json.dumps({**said_by(0, 0, 0, 0), "codec": "HERE"}).encode()
            assert "header" in refused(tmp_path / "x.kit", build(said.replace(b'"HERE"', inner)))


@pytest.mark.parametrize("said", [[], None, "start", 3, {}, {"start": 0, "end": 0}])
def test_header_without_its_keys(tmp_path, said):
    assert "sequence_length" in refused(tmp_path / "x.kit", build(said))


@pytest.mark.parametrize("key", ["start", "end", "rows", "entries", "sequence_length"])
@pytest.mark.parametrize("value", ["0", None, 1.0, True, [0], {}, -1, 1 << 70])
def test_header_of_wrong_types(tmp_path, key, value):
    assert key in refused(tmp_path / "x.kit", build({**said_by(0, 0, 0, 0), key: value}))


@pytest.mark.parametrize("change", [{"k": 1025}, {"quantum": 10**400}, {"scalars": ["truth"]}, {"vocabulary": 1 << 30}])
def test_header_whose_codec_is_none(tmp_path, change):
    said = said_by(0, 0, 0, 0, codec={**HOW.record, **change})
    assert "the header's codec: " in refused(tmp_path / "x.kit", build(said))
    assert "the header's codec: " in refused(tmp_path / "x.kit", build({**said, "codec": None}))


def test_header_that_ends_before_it_starts(tmp_path):
    refused(tmp_path / "x.kit", build(said_by(7, 3, 0, 0)))


@pytest.mark.parametrize("change", [{"rows": 3}, {"entries": 6}, {"end": 2}, {"start": 1}, {"sequence_length": 1}])
def test_header_that_says_otherwise_than_the_index(tmp_path, change):
    path, raw = tmp_path / "x.kit", frame()
    path.write_bytes(one_frame(raw))
    assert contents(Shard(path))[1] == [(0, 7, 2, raw)]  # the builder itself makes readable shards
    refused(path, one_frame(raw, said={**said_by(0, 1, 2, 5), **change}))
