"""Sealed folders: what a crash, a lost file, a full disk or another experiment does to them, and what is said then."""

import json

import pytest
from helpers.folders import contents, refusal
from hypothesis import given
from hypothesis import strategies as st

from ki_ds.files import digest, file_digest
from ki_ds.sealed import (
    MANIFEST,
    SCHEMA,
    UNSEALED,
    Identity,
    aside,
    check_contents,
    differences,
    open_sealed,
    prepare,
    reopen,
    seal,
    set_aside,
    state,
    versions,
)

ONE = Identity("corpus", {"seed": 1, "corpus": {"validation": 0.005}}, {"tokenizer": "aaaa"})
TWO = Identity("corpus", {"seed": 2, "corpus": {"validation": 0.005}}, {"tokenizer": "bbbb"})


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "work" / "corpora" / "wb"


def filled(folder, identity=ONE, facts=None):
    assert prepare(folder, identity) is None
    (folder / "train.bin").write_bytes(b"12345")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_bytes(b"{}")
    return seal(folder, identity, facts or {"count": 3})


# ------------------------------------------------------------------------------------------------- the life of one


def test_absent_then_unsealed_then_sealed(folder):
    assert state(folder, ONE) == "absent"
    assert prepare(folder, ONE) is None
    assert state(folder) == state(folder, ONE) == "unsealed"
    manifest = seal(folder, ONE, {"count": 3})
    assert state(folder) == state(folder, ONE) == "sealed"
    assert manifest.facts == {"count": 3} and manifest.fingerprint == ONE.fingerprint and manifest.path == folder
    assert open_sealed(folder) == prepare(folder, ONE) == manifest
    assert not (folder / UNSEALED).exists()


def test_an_unsealed_folder_is_continued_with_its_files(folder):
    prepare(folder, ONE)
    (folder / "part").write_bytes(b"done")
    assert prepare(folder, ONE) is None and (folder / "part").read_bytes() == b"done"


def test_asking_again_for_a_sealed_folder_changes_nothing(folder):
    filled(folder)
    before = contents(folder)
    prepare(folder, ONE)
    assert contents(folder) == before


def test_manifest_lists_every_file_with_its_size(folder):
    record = json.loads((filled(folder).path / MANIFEST).read_text())
    assert record["files"] == {"model/config.json": 2, "train.bin": 5}
    assert record["schema"] == SCHEMA and record["config"] == ONE.config and record["inputs"] == ONE.inputs
    assert {"ki_ds", "torch", "numpy"} <= versions().keys() == record["versions"].keys()


def test_a_file_deeper_down_that_is_called_manifest_is_a_file_like_others(folder):
    prepare(folder, ONE)
    (folder / "model").mkdir()
    (folder / "model" / MANIFEST).write_text("{}")
    assert seal(folder, ONE, {}).record["files"] == {f"model/{MANIFEST}": 2}
    (folder / "model" / MANIFEST).unlink()
    assert "is missing" in refusal(open_sealed, folder)


def test_later_stages_depend_on_the_content_where_it_was_measured(folder, tmp_path):
    assert filled(folder).digest == ONE.fingerprint
    assert filled(tmp_path / "other", facts={"content": "cafe"}).digest == "cafe"


def test_the_same_content_gives_the_same_bytes(tmp_path):
    filled(tmp_path / "a")
    filled(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "a" / MANIFEST).read_text()


def test_reopened_folder_is_unsealed_before_anything_changes_and_keeps_its_files(folder):
    filled(folder)
    reopen(folder, ONE)
    assert state(folder, ONE) == "unsealed" and (folder / "train.bin").exists() and not (folder / MANIFEST).exists()
    assert "was begun but not finished" in refusal(open_sealed, folder)
    (folder / "more.bin").write_bytes(b"12")
    assert prepare(folder, ONE) is None
    assert seal(folder, ONE, {}).record["files"]["more.bin"] == 2


def test_reopening_what_is_not_sealed_does_nothing(folder):
    prepare(folder, ONE)
    before = contents(folder)
    reopen(folder, ONE)
    assert contents(folder) == before


def test_killed_while_reopening_or_sealing_leaves_a_sealed_folder(folder):
    """Both markers stand side by side for a moment; nothing else has changed by then."""
    manifest = filled(folder)
    (folder / UNSEALED).write_text(json.dumps(ONE.record))
    assert state(folder, ONE) == "sealed" and prepare(folder, ONE) == manifest


def test_temporary_files_of_a_crash_are_gone_after_sealing(folder):
    prepare(folder, ONE)
    (folder / "deep").mkdir()
    for name in ("train.bin.123.tmp", "deep/shard.9.tmp"):
        (folder / name).write_bytes(b"half")
    (folder / "folder.tmp").mkdir()
    (folder / "folder.tmp" / "kept").write_bytes(b"1")
    assert seal(folder, ONE, {}).record["files"] == {"folder.tmp/kept": 1}
    assert not list(folder.rglob("*.[0-9]*.tmp"))


def test_killed_in_the_very_first_write_is_continued(folder):
    folder.mkdir(parents=True)
    (folder / f"{UNSEALED}.4711.tmp").write_bytes(b'{"stage": "cor')
    assert prepare(folder, ONE) is None and state(folder, ONE) == "unsealed"
    seal(folder, ONE, {})
    assert list(contents(folder)) == [MANIFEST]


# ------------------------------------------------------------------------------------------------- making way


def begun_anew(folder):
    """A finished folder that waits, and a new one that was begun in its place."""
    filled(folder)
    set_aside(folder, TWO)
    assert prepare(folder, TWO) is None
    (folder / "a" / "deep").mkdir(parents=True)
    (folder / "z.bin").write_bytes(b"1")


def test_killed_while_what_was_begun_is_removed(folder, monkeypatch):
    begun_anew(folder)

    def half(path, **_):
        (path / UNSEALED).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            set_aside(folder, Identity("corpus", {"seed": 3}, {}))
    assert prepare(folder, TWO) is None  # not taken for somebody else's
    assert (aside(folder) / MANIFEST).exists()


def test_what_was_finished_is_back_when_it_is_wanted_again(folder):
    begun_anew(folder)
    set_aside(folder, ONE)
    assert state(folder, ONE) == "sealed" and [path.name for path in folder.parent.glob("[!.]*")] == ["wb"]
    check_contents(folder, file_digest)
    assert not aside(folder).exists()


def test_folders_that_are_links_make_way_again_and_again(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path / "elsewhere")
    filled(folder)
    set_aside(folder, TWO)
    filled(folder, TWO)
    set_aside(folder, ONE)
    filled(folder, ONE)
    assert [path.name for path in folder.parent.iterdir()] == ["wb"]
    assert (tmp_path / "elsewhere" / MANIFEST).exists()  # the link is removed, not what it led to


def test_a_digest_that_is_remembered_wrongly_is_no_fault(folder):
    filled(folder)
    check_contents(folder, lambda _: "0" * 32)


# --------------------------------------------------------------------------------------------- another identity


@pytest.mark.parametrize("finished", [False, True])
def test_another_identity_is_refused_with_the_keys_that_differ(folder, finished):
    filled(folder) if finished else prepare(folder, ONE)
    before = contents(folder)
    text = refusal(prepare, folder, TWO)
    assert text.startswith(f"{folder}: made from another experiment, corpus or configuration; ")
    assert 'config.seed: found 1, expected 2; inputs.tokenizer: found "aaaa", expected "bbbb". ' in text
    assert "validation" not in text and f"`ki-ds run --redo`, or remove the folder {folder}." in text
    assert state(folder, TWO) == "other" and contents(folder) == before


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"seed": 1}, 'config.corpus: found {"validation": 0.005}, expected nothing'),
        ({**ONE.config, "new": None}, "config.new: found nothing, expected null"),
        ({"seed": 1, "corpus": {"validation": 0.005, "x": {}}}, "config.corpus.x: found nothing, expected {}"),
        ({**ONE.config, "seed": 1.0}, "config.seed: found 1, expected 1.0"),
        ({**ONE.config, "seed": True}, "config.seed: found 1, expected true"),
        ({**ONE.config, "seed": [1, 2]}, "config.seed: found 1, expected [1, 2]"),
    ],
)
def test_no_difference_goes_unnamed(folder, config, line):
    prepare(folder, ONE)
    assert f"; {line}. Choose" in refusal(prepare, folder, Identity("corpus", config, ONE.inputs))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(-2, 2) | st.sampled_from(["", "a"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from("abc"), json_values), st.dictionaries(st.sampled_from("abc"), json_values))
def test_differences_are_empty_exactly_where_the_digests_agree(found, expected):
    assert (differences(found, expected) == []) == (digest(found) == digest(expected))
    assert len(differences(found, expected)) <= 5


def test_another_stage_is_another_identity(folder):
    prepare(folder, ONE)
    assert 'stage: found "corpus", expected "train"' in refusal(
        prepare, folder, Identity("train", ONE.config, ONE.inputs)
    )


def test_order_of_keys_is_no_difference(folder):
    prepare(folder, ONE)
    assert prepare(folder, Identity("corpus", dict(reversed(ONE.config.items())), ONE.inputs)) is None


# -------------------------------------------------------------------------------------------------------- damage


def test_a_folder_that_is_not_there(folder):
    assert refusal(open_sealed, folder) == (
        f"{folder}: is not there. Run `ki-ds run` on the experiment: it makes what is missing."
    )


@pytest.mark.parametrize("name", ["train.bin", "model/config.json"])
def test_lost_file_is_named(folder, name):
    size = filled(folder).record["files"][name]
    (folder / name).unlink()
    remedy = f"Put the original back, or remove {folder} and run again: it is made anew."
    message = f"{folder / name}: is missing, but the manifest says {size} bytes. {remedy}"
    assert refusal(open_sealed, folder) == refusal(prepare, folder, ONE) == message


@pytest.mark.parametrize(("data", "found"), [(b"1234", 4), (b"", 0), (b"123456", 6)])
def test_cut_or_grown_file_is_named(folder, data, found):
    filled(folder)
    (folder / "train.bin").write_bytes(data)
    assert refusal(open_sealed, folder).startswith(
        f"{folder / 'train.bin'}: has {found} bytes, but the manifest says 5 bytes. Put the original back, or remove"
    )


@pytest.mark.parametrize("name", [MANIFEST, UNSEALED])
@pytest.mark.parametrize("data", [b"", b'{"stage": "corp', b"\xff\xfe", b"\x00" * 100])
def test_unreadable_manifest(folder, name, data):
    folder.mkdir(parents=True)
    (folder / name).write_bytes(data)
    for act in (state, prepare):
        text = refusal(act, folder, ONE)
        assert text.startswith(f"{folder / name}: cannot be read (") and f"Remove the folder {folder}" in text


@pytest.mark.parametrize("name", [MANIFEST, UNSEALED])
@pytest.mark.parametrize("data", [[], {}, "x", {"stage": "corpus", "schema": SCHEMA, "config": {}}])
def test_json_that_is_no_manifest(folder, name, data):
    folder.mkdir(parents=True)
    (folder / name).write_text(json.dumps(data))
    assert refusal(prepare, folder, ONE).startswith(f"{folder / name}: not a manifest of ki_ds.")


@pytest.mark.parametrize("key", ["fingerprint", "facts", "files"])
def test_manifest_that_lacks_a_key(folder, key):
    filled(folder)
    record = json.loads((folder / MANIFEST).read_text())
    del record[key]
    (folder / MANIFEST).write_text(json.dumps(record))
    assert refusal(open_sealed, folder).startswith(f"{folder / MANIFEST}: not a manifest of ki_ds.")


@pytest.mark.parametrize(
    ("key", "value"), [("fingerprint", "0" * 32), ("inputs", {}), ("config", {"seed": 2}), ("facts", {"count": 4}),
                   ("files", {"train.bin": 5}), ("digests", {}), ("versions", {}), ("facts", {"count": float("nan")})],
)  # fmt: skip
def test_manifest_that_was_edited(folder, key, value):
    filled(folder)
    record = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**record, key: value}))
    assert f"{folder / MANIFEST}: was changed after it was written" in refusal(open_sealed, folder)


def test_manifest_from_before_there_were_digests(folder):
    manifest = filled(folder)
    record = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in record.items() if k not in ("digests", "manifest")}))
    assert open_sealed(folder).facts == manifest.facts


def test_files_are_digested_as_they_lie(folder):
    filled(folder)
    found = json.loads((folder / MANIFEST).read_text())["digests"]
    assert found == {name: file_digest(folder / name) for name in ("model/config.json", "train.bin")}


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "1", None])
def test_manifest_of_another_schema(folder, schema):
    filled(folder)
    record = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**record, "schema": schema}))
    for act in (open_sealed, lambda path: prepare(path, ONE), lambda path: state(path, ONE)):
        text = refusal(act, folder)
        assert text.startswith(f"{folder / MANIFEST}: schema {schema}, but this version of ki_ds reads {SCHEMA}.")


def test_a_folder_of_somebody_else_is_left_alone(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("x")
    text = refusal(prepare, folder, ONE)
    assert (
        text
        == f"{folder}: holds files but no manifest, so it is not ki_ds's. Move it away or choose another --workdir."
    )
    assert list(contents(folder)) == ["thesis.tex"]


def test_an_empty_folder_is_taken(folder):
    folder.mkdir(parents=True)
    assert prepare(folder, ONE) is None


def test_a_file_where_the_folder_should_be(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("x")
    assert refusal(prepare, folder, ONE).startswith(f"{folder}: cannot be made: ")
    assert refusal(prepare, folder / "deeper", ONE).startswith(f"{folder / 'deeper'}: cannot be made: ")
