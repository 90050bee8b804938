"""The manifest of a targets folder: it binds the shards, and garbage is refused."""

import numpy as np
import pytest
from helpers.folders import FACTS, HEADER, HOW, IDENTITY, assert_read, fill, forge, write

from ki_ds import sealed
from ki_ds.errors import UserError
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.manifest import TargetFacts, open_folder, read_facts, renamed, seal_targets
from ki_ds.targets.shard import shard_name


def test_sealed_folder_is_opened_by_its_manifest(finished):
    facts, manifest = read_facts(finished)
    assert (
        facts == TargetFacts(10, 4, HEADER)
        and facts.record == FACTS
        and manifest["fingerprint"] == IDENTITY.fingerprint
    )
    shards = open_folder(finished)
    assert shards.codec == HOW
    assert_read(shards, [9, 0, 5])


def test_manifest_binds_the_shards(finished):
    write(finished / shard_name(4, 8), 4, 8, Codec(300, 4, 1 / 8))
    with pytest.raises(UserError, match="its header gives codec"):
        open_folder(finished).read(np.array([5]))


def test_folder_without_a_manifest(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"there is no manifest\.json: not a finished targets folder"):
            open_folder(path)


def test_folder_that_is_not_finished(tmp_path):
    sealed.prepare(tmp_path / "made", IDENTITY)
    fill(tmp_path / "made")
    with pytest.raises(UserError, match="not a finished targets folder; `ki-ds teach` makes and finishes one"):
        open_folder(tmp_path / "made")


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("targets-000000000-000000008.kit", True), ("targets-000000016-000000020.kit", True),
        ("targets-000000024-000000032.kit", True),  # of a longer run
        ("targets-000000016-000000019.kit", False), ("targets-000000004-000000012.kit", False),
        ("targets-000000024-000000030.kit", False), ("notes.kit", False), ("targets-000000008-000000000.kit", False),
    ],
)  # fmt: skip
def test_which_files_are_shards_of_a_folder(tmp_path, name, fits):
    assert ShardFolder(tmp_path, 20, 8).fits(name) == fits


def test_manifest_that_cannot_be_read(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        open_folder(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        open_folder(tmp_path / "file")


def test_manifest_of_another_stage(finished):
    forge(finished, stage="train")
    with pytest.raises(UserError, match=r'not the manifest of a targets folder \(stage "train"\)'):
        open_folder(finished)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe\0", b"[]", b"3", b"null", b'"teach"', b"{}", b"[" * 100_000, b'{"stage": "teach"}']
)
def test_manifest_that_is_garbage(finished, text):
    (finished / "manifest.json").write_bytes(text)
    with pytest.raises(UserError, match=r"manifest\.json: (cannot be read|not a manifest)"):
        open_folder(finished)


def test_manifest_of_another_schema(finished):
    forge(finished, schema=9)
    with pytest.raises(UserError, match="schema 9, but this version of ki_ds reads 1"):
        open_folder(finished)


@pytest.mark.parametrize("facts", [[], None, "samples", {}, {"samples": 10, "samples_per_shard": 4}])
def test_manifest_without_its_facts(finished, facts):
    forge(finished, facts=facts)
    with pytest.raises(UserError, match=r"manifest\.json: not "):
        open_folder(finished)


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": "10"},
        {"samples": -1},
        {"samples": True},
        {"samples_per_shard": 0},
        {"samples_per_shard": 4.0},
        {"header": []},
        {"header": {}},
        {"header": {"codec": {"k": 3}}},
    ],
)
def test_manifest_whose_facts_are_of_the_wrong_kind(finished, wrong):
    forge(finished, facts={**FACTS, **wrong})
    with pytest.raises(UserError, match=r"manifest\.json: not the manifest of a targets folder"):
        open_folder(finished)


def test_targets_of_the_days_when_samples_were_called_positions(finished):
    forge(finished, facts={"positions": 10, "positions_per_shard": 4, "header": HEADER.record})
    facts, _ = read_facts(finished)
    assert facts == TargetFacts(10, 4, HEADER)
    assert_read(open_folder(finished), [9, 0, 5])


def test_former_names_of_a_folder_that_was_begun():
    assert renamed({"positions": 10, "positions_per_shard": 4}) == {"samples": 10, "samples_per_shard": 4}
    assert renamed({"samples_per_shard": 4}) == {"samples_per_shard": 4} and renamed({}) == {}


def test_sub_folders_are_not_part_of_targets(tmp_path):
    sealed.prepare(tmp_path / "made", IDENTITY)
    fill(tmp_path / "made")
    for name in ("claims", "aside"):
        (tmp_path / "made" / name).mkdir()
        (tmp_path / "made" / name / "x.kit").write_bytes(b"x")
    seal_targets(tmp_path / "made", IDENTITY, TargetFacts(10, 4, HEADER))
    shards = ShardFolder(tmp_path / "made", 10, 4)
    assert sorted(sealed.read_manifest(tmp_path / "made")["files"]) == [shards.name(number) for number in range(3)]
