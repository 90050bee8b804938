"""Sealed folders that were changed afterwards: `ki-ds verify` finds them, and the stages that read them refuse."""

import json
import os
import shutil

import pytest
from helpers.commands import here
from helpers.experiments import text, written
from helpers.folders import forge

from ki_ds.digests import Digests
from ki_ds.files import file_digest


def flip(path, at=0.5):
    """Change a byte and keep size and date."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


FILES = [
    "tokenizer/tokenizer.json", "corpora/a/train.bin", "corpora/a/validation.bin", "results/s/perplexity.json",
    "targets/t@a/targets-000000000-000000004.kit", "models/t/model/model.safetensors", "models/t/metrics.jsonl",
    "models/s/model/config.json",
]  # fmt: skip


@pytest.mark.launch
def test_nothing_is_wrong_with_what_was_sealed(work):
    for options in ((), ("--deep",)):
        said = here("verify", work, *options)
        assert "7 sealed folders, 0 of them with faults" in said and "targets/t@a: no fault" in said


@pytest.mark.launch
@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found(work, name):
    here("verify", work)  # its digests are known now
    flip(work / name)
    said = here("verify", work, *(("--deep",) if name.endswith(".kit") else ()), code=1)
    assert "7 sealed folders, 1 of them with faults" in said and str(work / name) in said


@pytest.mark.launch
@pytest.mark.parametrize("key", ["facts", "inputs", "fingerprint", "files", "config"])
def test_a_changed_manifest_is_found(work, key):
    path = work / "models" / "s" / "manifest.json"
    record = json.loads(path.read_text())
    record[key] = "0" * 32 if key == "fingerprint" else dict(list(record[key].items())[1:])
    path.write_text(json.dumps(record))
    assert "1 of them with faults" in here("verify", work, code=1)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("name", "gone", "command"),
    [("models/t/model/model.safetensors", "targets/t@a", "teach"), ("corpora/a/train.bin", "models/t", "train"),
     ("corpora/a/validation.bin", "results/t", "evaluate"), ("models/s/metrics.jsonl", "report", "report"),
     ("results/s/perplexity.json", "report", "report")],
)  # fmt: skip
def test_stages_refuse_what_was_changed(whole, work, name, gone, command):
    here("verify", work)
    flip(work / name)
    shutil.rmtree(work / gone)
    said = here(command, whole[0], "--workdir", work, *(("--name", "t") if command == "train" else ()), code=2)
    assert f"{work / name}: was changed after it was sealed: its digest is" in said
    assert not (work / gone / "manifest.json").exists()


def test_a_tokenizer_that_gives_other_ids_is_refused(tmp_path):
    file = written(tmp_path)
    here("corpus", file, "--workdir", tmp_path / "work")
    path = tmp_path / "work" / "tokenizer" / "tokenizer.json"
    data = path.read_bytes()
    pair = data.rindex(b'"e"')  # of the last merges
    path.write_bytes(data[:pair] + b'"a"' + data[pair + 3 :])
    shutil.rmtree(tmp_path / "work" / "corpora")
    assert "tokenizer: " in here("corpus", file, "--workdir", tmp_path / "work", code=2)


@pytest.mark.launch
def test_a_manifest_without_digests_is_said_to_be_so(work):
    path = work / "corpora" / "a" / "manifest.json"
    record = json.loads(path.read_text())
    del record["digests"]
    path.write_text(json.dumps(record))
    forge(work / "corpora" / "a")
    assert "corpora/a: no fault (its manifest holds no digests: sizes alone)" in here("verify", work)


def test_a_source_that_changed_in_the_middle_is_another_source(tmp_path):
    file = written(tmp_path, entries=20_000)
    here("corpus", file, "--workdir", tmp_path / "work")
    flip(tmp_path / "a.txt")
    said = here("corpus", file, "--workdir", tmp_path / "work", code=2)
    assert "tokenizer: made from another experiment" in said and "config.text: found" in said


def test_a_source_by_another_name_is_the_same_source(tmp_path):
    file = written(tmp_path)
    here("corpus", file, "--workdir", tmp_path / "work")
    (tmp_path / "a.txt").rename(tmp_path / "other.txt")
    here("corpus", file, "--workdir", tmp_path / "work")  # gone: as the manifest says
    for path in ("other.txt", "./other.txt", str(tmp_path / "o*.txt")):
        setting = f"corpora.a.sources={json.dumps([{'text': path}])}"
        assert "corpus a: done before" in here("corpus", file, "--workdir", tmp_path / "work", "--set", setting)
    (tmp_path / "other.txt").write_text(text(700))
    here("corpus", file, "--workdir", tmp_path / "work", "--set", setting, code=2)


def test_digests_are_remembered_while_a_file_stays_as_it_is(tmp_path, monkeypatch):
    path, read = tmp_path / "a", []
    path.write_bytes(b"one")
    monkeypatch.setattr("ki_ds.digests.file_digest", lambda file: read.append(file) or file_digest(file))
    first = Digests(tmp_path)
    assert first.of(path) == first.of(path) == file_digest(path)
    first.save()
    assert Digests(tmp_path).of(path) == file_digest(path) and len(read) == 1
    path.write_bytes(b"two")
    assert Digests(tmp_path).of(path) == file_digest(path) and len(read) == 2
    (tmp_path / ".digests.json").write_bytes(b"\xff[[[")  # rubbish: what is known is lost, no more
    assert Digests(tmp_path).of(path) == file_digest(path) and len(read) == 3


def test_what_is_no_work_directory(tmp_path):
    assert "not a work directory" in here("verify", tmp_path / "none", code=2)
