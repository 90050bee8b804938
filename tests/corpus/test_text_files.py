"""Text files: which are found, and the documents that come out of them, however they are packed, named and cut."""

import glob
import gzip
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from helpers.sources import COMPRESSORS, read
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ki_ds.corpus import sources as module
from ki_ds.corpus.sources import Tally, documents, files
from ki_ds.errors import UserError
from ki_ds.experiment.sources import JsonLinesSource, TextSource


def test_blank_lines_separate_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff\n one\r\ntwo \r\n \t\r\n\r\n\r\nthree\n\u3000\nfour\0\n\n  ".encode())
    tally = Tally()
    assert read(TextSource(text="a.txt"), bases=[tmp_path], tally=tally) == ["one\ntwo", "three", "four\0"]
    assert tally == Tally(documents=3, characters=17, invalid_utf8=0)


def test_empty_file_has_no_documents(tmp_path):
    (tmp_path / "a.txt").touch()
    assert read(TextSource(text="a.txt"), bases=[tmp_path]) == []


def test_byte_order_mark_inside_a_file_is_kept(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff\ufeffa\n\n\ufeffb", encoding="utf-8")
    assert read(TextSource(text="a.txt"), bases=[tmp_path]) == ["\ufeffa", "\ufeffb"]


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_compressed_file(tmp_path, ending):
    member = COMPRESSORS[ending]("naïve\n\n".encode())
    (tmp_path / f"a.txt{ending}").write_bytes(member + member)
    assert read(TextSource(text=f"a.txt{ending}"), bases=[tmp_path]) == ["naïve", "naïve"]


def test_recursive_glob_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a/skipped.md", "c.txt/inner.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = ["a/b/c.txt", "a/z.txt", "b.txt", "c.txt/inner.txt"]
    assert read(TextSource(text="**/*.txt"), bases=[tmp_path]) == expected
    assert files(TextSource(text="**/*.txt"), [tmp_path], "s") == [(str(tmp_path / n), len(n)) for n in expected]


def test_first_base_with_a_match_wins(tmp_path):
    bases = [tmp_path / name for name in ("empty", "one", "two")]
    for base in bases:
        base.mkdir()
    (bases[1] / "a.txt").write_text("one")
    (bases[2] / "a.txt").write_text("two")
    assert read(TextSource(text="a.txt"), bases=bases) == read(TextSource(text="*.txt"), bases=bases) == ["one"]
    assert read(TextSource(text=str(bases[2] / "a.txt")), bases=bases) == ["two"]


def test_brackets_in_a_name_and_in_a_base(tmp_path):
    base = tmp_path / "[base]"
    base.mkdir()
    (base / "a[1].txt").write_text("literal")
    assert (
        read(TextSource(text="a[1].txt"), bases=[base]) == read(TextSource(text="*.txt"), bases=[base]) == ["literal"]
    )
    (base / "folder" / "[c]").mkdir(parents=True)
    (base / "folder" / "[c]" / "b.txt").write_text("below")
    assert read(TextSource(text="**/*.txt"), bases=[base]) == ["literal", "below"]


def test_link_is_read_by_its_own_ending(tmp_path):
    (tmp_path / "blob").write_bytes(gzip.compress(b"text"))
    (tmp_path / "a.gz").symlink_to("blob")
    assert read(TextSource(text="a.gz"), bases=[tmp_path]) == ["text"]


def test_links_that_point_back(tmp_path):
    """Two of them hung `glob.glob`; one gave each document forty-one times."""
    for name in ("a/x.txt", "b/y.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_text(name)
    for name in ("a/back", "a/again", "b/back"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "data")
    expected = [str(tmp_path / "data" / name) for name in ("a/x.txt", "b/y.txt")]
    for pattern in ("data/**/*.txt", "**/**/*.txt", "data/**", f"{tmp_path}/data/**", f"file://{tmp_path}/**/*.txt"):
        assert [name for name, _ in files(TextSource(text=pattern), [tmp_path], "s")] == expected, pattern
    assert read(TextSource(text="data/**/b/**/*.txt"), bases=[tmp_path]) == ["a/x.txt", "b/y.txt"]


def test_a_file_of_several_names_is_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "c.jsonl").write_text('{"text": "c", "title": "C"}')
    (tmp_path / "b.jsonl").symlink_to("real/c.jsonl")
    (tmp_path / "a").symlink_to("real")
    assert [name for name, _ in files(JsonLinesSource(jsonl="**/*.jsonl"), [tmp_path], "s")] == [
        str(tmp_path / "a" / "c.jsonl")
    ]
    sources = [JsonLinesSource(jsonl=pattern) for pattern in ("b*", "real/*", "**/*.jsonl", f"{tmp_path}/a/c.jsonl")]
    assert read(*sources, bases=[tmp_path]) == ["c"]
    assert read(*sources, JsonLinesSource(jsonl="a/*", field="title"), bases=[tmp_path]) == ["c", "C"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.lists(st.sampled_from(["a", "b", ".c", "x.txt"]), min_size=1, max_size=4), max_size=6),
    pattern=st.lists(st.sampled_from(["**", "*", "a", "*.txt", ".*", "a**"]), min_size=1, max_size=4),
)
def test_without_links_a_pattern_matches_what_glob_does(names, pattern):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, *name, "f.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        text = "/".join(pattern)
        found = {os.path.join(folder, name) for name in glob.glob(text, root_dir=folder, recursive=True)}
        expected = sorted(filter(os.path.isfile, found))
        try:
            assert [name for name, _ in files(TextSource(text=text), [Path(folder)], "s")] == expected
        except UserError:
            assert not expected


def test_urls(memory, tmp_path):
    memory.pipe("/deep/b.txt", b"b")
    memory.pipe("/deep/er/a.txt.gz", gzip.compress(b"a"))
    (tmp_path / "c.txt").write_text("c")
    assert read(TextSource(text="memory://deep/**/*.txt*")) == ["b", "a"]
    assert read(TextSource(text=f"file://{tmp_path}/c.txt")) == ["c"]
    assert files(TextSource(text="memory://deep/*.txt"), [], "s") == [("memory:///deep/b.txt", 1)]


def naive(data: bytes, limit: int) -> list[str]:
    text = data.decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    blocks: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            blocks[-1].append(line)
        else:
            blocks.append([])
    found = []
    for document in ("\n".join(block).strip() for block in blocks):
        while len(document) > limit:
            cut = max((i for i in range(limit + 1) if document[i].isspace()), default=limit)
            found.append(document[:cut].strip())
            document = document[cut:].strip()
        found.append(document)
    return [document for document in found if document]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(
        st.sampled_from([b"a", b"bc", b" ", b"\n", b"\r\n", b"\r", b"\t", "é".encode(), "𝄞".encode(), b"\xef\xbb\xbf"])
        | st.binary(max_size=3),
        max_size=60,
    ).map(b"".join),
    read_bytes=st.integers(1, 40),
    limit=st.integers(1, 12),
)
@example(data=b"\xef\xbb", read_bytes=1, limit=5)
@example(data=b"a" + b" " * 50 + b"\n \nb", read_bytes=3, limit=4)
def test_documents_do_not_depend_on_the_blocks_read(monkeypatch, memory, data, read_bytes, limit):
    monkeypatch.setattr(module, "READ_BYTES", read_bytes)
    monkeypatch.setattr(module, "MAX_DOCUMENT_CHARACTERS", limit)
    memory.pipe("/a.txt", data)
    assert read(TextSource(text="memory://a.txt")) == naive(data, limit)


@pytest.mark.parametrize("unit", [b"x", b" ", b"\n", b"word "], ids=["letters", "spaces", "newlines", "words"])
def test_one_enormous_line_in_bounded_memory(tmp_path, unit):
    size = 24 << 20
    with gzip.open(tmp_path / "a.gz", "wb", compresslevel=1) as stream:
        for _ in range(24):
            stream.write(unit * ((1 << 20) // len(unit)))
    tracemalloc.start()
    try:
        lengths = [len(text) for text in documents([TextSource(text="a.gz")], [tmp_path], "c", "replace", Tally())]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 2, peak
    assert max(lengths, default=0) <= module.MAX_DOCUMENT_CHARACTERS
    assert (sum(lengths) > size * 0.9) == bool(unit.strip())
