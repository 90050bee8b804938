"""Files that are missing, damaged, out of reach or no UTF-8: the place, what was found and the remedy."""

import gzip
import os

import pytest
from helpers.sources import COMPRESSORS, failure, read

from ki_ds.corpus import sources as module
from ki_ds.corpus.sources import Tally
from ki_ds.experiment.sources import DatasetSource, JsonLinesSource, ParquetSource, TextSource


def test_no_file_matches(tmp_path):
    message = failure(TextSource(text="data/x*.txt"), bases=[tmp_path / "A", tmp_path / "B"])
    assert message.startswith(
        f"corpora.wb.sources.0.text: no file matches data/x*.txt (looked in {tmp_path}/A, {tmp_path}/B); expected "
    )


def test_no_file_matches_at_an_absolute_path_or_url(tmp_path, memory):
    assert "x.txt; expected" in failure(TextSource(text=f"{tmp_path}/x.txt"), bases=[tmp_path])
    assert "sources.0.jsonl: no file matches memory://x*; expected" in failure(JsonLinesSource(jsonl="memory://x*"))


def test_place_counts_the_sources(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    message = failure(TextSource(text="a.txt"), ParquetSource(parquet="b"), bases=[tmp_path])
    assert message.startswith("corpora.wb.sources.1.parquet: no file matches b ")


def test_folder_is_no_file(tmp_path, memory):
    memory.pipe("/folder/a.txt", b"a")
    (tmp_path / "folder").mkdir()
    assert "FOLDER/**/*" in failure(TextSource(text="folder"), bases=[tmp_path])
    assert "FOLDER/**/*" in failure(TextSource(text="memory://folder"))


@pytest.mark.parametrize("ending", COMPRESSORS)
@pytest.mark.parametrize("damage", ["cut short", "garbled", "plain text"])
def test_damaged_file(tmp_path, ending, damage):
    whole = COMPRESSORS[ending](os.urandom(3000))
    path = tmp_path / f"a{ending}"
    half = len(whole) // 2
    path.write_bytes(
        {
            "cut short": whole[:half],
            "garbled": whole[:4] + bytes(255 - byte for byte in whole[4:]),
            "plain text": b"not compressed at all, in spite of its name\n" * 9,
        }[damage]
    )
    message = failure(TextSource(text=path.name), bases=[tmp_path])
    assert message.startswith(f"{path}: cannot be read: ")
    assert message.endswith("fetch it again, or leave it out")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("a")

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "open", refuse, raising=False)  # root may read every file, whatever its mode
    message = failure(TextSource(text="a.txt"), bases=[tmp_path])
    assert message == f"{path}: cannot be read: Permission denied; make it readable for this user"


LONG = "x" * 300


@pytest.mark.parametrize(
    "path",
    ["a\0b", "a\0*/b", "**/\0", "~a\0/b", LONG, f"{LONG}/**/*", f"*/{LONG}", f"memory://a\0/{LONG}", f"file:///{LONG}"],
    ids=lambda path: path.replace(LONG, "LONG").replace("\0", "NUL"),
)
def test_names_that_no_file_can_have(tmp_path, path):
    for text in (path, f"{tmp_path}/{path.replace('://', '')}"):
        assert "sources.0.text: no file matches" in failure(TextSource.model_construct(text=text), bases=[tmp_path])


def test_names_that_no_dataset_can_have(tmp_path):
    dataset = DatasetSource(dataset="a")
    for name in (LONG, "a\0b"):
        assert "sources.0.dataset: " in failure(dataset.model_copy(update={"dataset": name}), bases=[tmp_path])


def test_missing_backend(monkeypatch):
    monkeypatch.setitem(module.known_implementations, "s9", {"class": "s9absent.S9", "err": "Install s9absent"})
    assert "sources.0.text: s9://b/x cannot be listed: Install s9absent; run `pip install s9absent`" in failure(
        TextSource(text="s9://b/x")
    )
    absent = {"class": "fsspec.implementations.absent.Smb", "err": "needs smbprotocol"}
    monkeypatch.setitem(module.known_implementations, "smb2", absent)
    assert 'run `pip install "fsspec[smb2]"`' in failure(TextSource(text="simplecache::smb2://b/x"))


def test_unknown_protocol():
    message = failure(TextSource(text="nowhere://a"))
    assert message.startswith("corpora.wb.sources.0.text: nowhere://a cannot be listed: Protocol not known")


# --------------------------------------------------------------------------------------------------- not UTF-8


def test_invalid_bytes_are_replaced_and_counted_by_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff a \xe2\x82 b\n\nwhole \xef\xbf\xbd\n\nc\xff")
    tally = Tally()
    found = read(TextSource(text="a.txt"), bases=[tmp_path], tally=tally)
    assert found == ["\ufffd a \ufffd b", "whole \ufffd", "c\ufffd"]
    assert tally == Tally(documents=3, characters=16, invalid_utf8=2)


@pytest.mark.parametrize("read_bytes", [1, 4, 1 << 20])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_invalid_bytes_are_refused_at_their_offset(tmp_path, monkeypatch, read_bytes, start):
    monkeypatch.setattr(module, "READ_BYTES", read_bytes)
    data = start + "é\r\nß ".encode() + b"\xe2\x82A"
    for name, content in (("a.txt", data), ("a.gz", gzip.compress(data)), ("a.zst", COMPRESSORS[".zst"](data))):
        (tmp_path / name).write_bytes(content)
        message = failure(TextSource(text=name), bases=[tmp_path], invalid_utf8="refuse")
        assert message.startswith(f"{tmp_path / name}: byte {len(data) - 3}: not UTF-8: invalid continuation byte; ")
        assert message.endswith('corpora.wb.invalid_utf8: "replace"')


def test_character_cut_off_at_the_end_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xe2\x82")
    assert "a.txt: byte 3: not UTF-8" in failure(TextSource(text="a.txt"), bases=[tmp_path], invalid_utf8="refuse")


def test_lone_surrogate_in_json(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b\udcff"}' + "\n" + r'{"text": "\ud834\udd1e\u0000"}')
    tally = Tally()
    assert read(JsonLinesSource(jsonl="a.jsonl"), bases=[tmp_path], tally=tally) == ["a\ufffdb\ufffd", "𝄞\0"]
    assert tally.invalid_utf8 == 1
    message = failure(JsonLinesSource(jsonl="a.jsonl"), bases=[tmp_path], invalid_utf8="refuse")
    assert message.startswith(f"{tmp_path}/a.jsonl:1: not UTF-8: a lone surrogate; ")
