"""Sources: the documents that come out of files, data sets and installed packages, and every way this can fail."""

import ast
import bz2
import gzip
import io
import json
import lzma
import os
import re
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ki_ds.corpus import documentation
from ki_ds.corpus import sources as module
from ki_ds.corpus.sources import Tally, documents, files
from ki_ds.errors import UserError
from ki_ds.experiment.schema import DatasetSource, DocumentationSource, JsonLinesSource, ParquetSource, TextSource

LONG = "A docstring that is long enough to be kept. " * 6


def read(*sources, bases=(), invalid_utf8="replace", tally=None):
    return list(documents(sources, bases, "corpora.wb", invalid_utf8, tally or Tally()))


def failure(*sources, **options):
    with pytest.raises(UserError) as raised:
        read(*sources, **options)
    return str(raised.value)


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


# -------------------------------------------------------------------------------------------------------- text


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
    assert read(TextSource(text="a.txt"), TextSource(text="*.txt"), bases=bases) == ["one", "one"]
    assert read(TextSource(text=str(bases[2] / "a.txt")), bases=bases) == ["two"]


def test_brackets_in_a_name_and_in_a_base(tmp_path):
    base = tmp_path / "[base]"
    base.mkdir()
    (base / "a[1].txt").write_text("literal")
    assert read(TextSource(text="a[1].txt"), TextSource(text="*.txt"), bases=[base]) == ["literal", "literal"]


def test_link_is_read_by_its_own_ending(tmp_path):
    (tmp_path / "blob").write_bytes(gzip.compress(b"text"))
    (tmp_path / "a.gz").symlink_to("blob")
    assert read(TextSource(text="a.gz"), bases=[tmp_path]) == ["text"]


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


def test_missing_backend(monkeypatch):
    monkeypatch.setitem(module.known_implementations, "s3", {"class": "s3absent.S3", "err": "Install s3absent"})
    assert "sources.0.text: s3://b/x cannot be listed: Install s3absent; run `pip install s3absent`" in failure(
        TextSource(text="s3://b/x")
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


# -------------------------------------------------------------------------------------------------- JSON Lines


@pytest.mark.parametrize("ending", ["", *COMPRESSORS])
def test_json_lines(tmp_path, ending):
    data = '\ufeff{"body": " one\\n\\ntwo "}\r\n\n  \n{"body": ""}\n{"body": "three", "id": 1}'.encode()
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESSORS.get(ending, bytes)(data))
    found = read(JsonLinesSource(jsonl=f"a.jsonl{ending}", field="body"), bases=[tmp_path])
    assert found == ["one\n\ntwo", "three"]


def test_json_line_longer_than_a_block_and_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "READ_BYTES", 7)
    monkeypatch.setattr(module, "MAX_DOCUMENT_CHARACTERS", 10)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words and unbreakablelongword"}) + "\n")
    found = read(JsonLinesSource(jsonl="a.jsonl"), bases=[tmp_path])
    assert found == ["some words", "and", "unbreakabl", "elongword"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("9" * 5000, "not JSON: "),
        ('["text"]', "found a value of type list; expected one object a line"),
        ("null", "found null; expected one object a line"),
        ('{"text": 3}', '"text" is a value of type int; expected a string'),
        ('{"text": null}', '"text" is null; expected a string'),
        ('{"Text": "", "id": 1}', "there is no \"text\", only 'Text', 'id'; set the source's \"field\"; did you mean"),
        ("{}", 'there is no "text", only nothing;'),
    ],
    ids=["cut", "deep", "digits", "array", "null", "number", "null-field", "other-key", "no-key"],
)
def test_bad_json_line(tmp_path, line, expected):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    message = failure(JsonLinesSource(jsonl="a.jsonl"), bases=[tmp_path])
    assert message.startswith(f"{tmp_path}/a.jsonl:3: {expected}")


# ----------------------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet(tmp_path, kind):
    texts = [" one ", None, "", "two\n\nlines"] * 100
    parquet.write_table(pa.table({"id": range(400), "body": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
    assert read(ParquetSource(parquet="*.parquet", field="body"), bases=[tmp_path]) == ["one", "two\n\nlines"] * 100


def test_parquet_url(tmp_path, memory):
    sink = io.BytesIO()
    parquet.write_table(pa.table({"text": ["remote"]}), sink)
    memory.pipe("/a.parquet", sink.getvalue())
    assert read(ParquetSource(parquet="memory://a.parquet")) == ["remote"]


def test_parquet_with_invalid_bytes(tmp_path):
    texts = pa.array([b"good", b"b\xffd"]).view(pa.string())
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    tally = Tally()
    assert read(ParquetSource(parquet="a.parquet"), bases=[tmp_path], tally=tally) == ["good", "b\ufffdd"]
    assert tally.invalid_utf8 == 1
    message = failure(ParquetSource(parquet="a.parquet"), bases=[tmp_path], invalid_utf8="refuse")
    assert message.startswith(f"{tmp_path}/a.parquet: row 1: byte 1: not UTF-8: ")


def test_parquet_without_the_column(tmp_path):
    parquet.write_table(pa.table({"texts": ["a"], "id": [1]}), tmp_path / "a.parquet")
    message = failure(ParquetSource(parquet="a.parquet"), bases=[tmp_path])
    assert message.startswith(f"{tmp_path}/a.parquet: there is no \"text\", only 'texts', 'id'; ")
    assert message.endswith('did you mean "texts"?')


@pytest.mark.parametrize("values", [[1], [b"x"], [["x"]], [None]], ids=["int", "binary", "list", "null"])
def test_parquet_column_of_another_type(tmp_path, values):
    parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    message = failure(ParquetSource(parquet="a.parquet"), bases=[tmp_path])
    assert re.fullmatch(rf'{tmp_path}/a.parquet: the column "text" is of type .+; expected strings', message)


@pytest.mark.parametrize("damage", ["empty", "cut short", "garbled"])
def test_damaged_parquet(tmp_path, damage):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["some text"] * 1000}), path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut short": whole[:-20], "garbled": b"PAR1" + b"\xff" * 40 + whole[44:]}[damage])
    message = failure(ParquetSource(parquet="a.parquet"), bases=[tmp_path])
    assert message.startswith(f"{path}: cannot be read: ")
    assert "\n" not in message


# --------------------------------------------------------------------------------------------------- data sets


@pytest.fixture
def dataset(monkeypatch):
    """Rows for `load_dataset`, or the exception that it raises; what it was asked for comes back."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def install(rows):
        def load(*args, **options):
            asked.append((args, options))
            if isinstance(rows, Exception):
                raise rows
            return iter(rows)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return install


def test_dataset_folder_in_a_base_is_streamed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    rows = [{"body": " one "}, {"body": None}, {"body": "two"}]
    (tmp_path / "folder" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(DatasetSource(dataset="folder", field="body"), bases=[tmp_path]) == ["one", "two"]


def test_dataset_by_name(dataset):
    asked = dataset([{"text": "one"}])
    assert read(DatasetSource(dataset="org/name", configuration="en", split="validation")) == ["one"]
    assert asked == [(("org/name", "en"), {"split": "validation", "streaming": True})]


def test_dataset_without_the_field(dataset):
    dataset([{"texts": "one"}])
    message = failure(DatasetSource(dataset="name"))
    assert message.startswith("corpora.wb.sources.0.dataset: name: there is no \"text\", only 'texts'; ")


def test_dataset_field_of_another_type(dataset):
    dataset([{"text": "one"}, {"text": 2}])
    assert 'row 1: "text" is a value of type int; expected a string' in failure(DatasetSource(dataset="name"))


def test_dataset_that_cannot_be_loaded(dataset):
    dataset(ConnectionError("no route\nand a long story"))
    message = failure(DatasetSource(dataset="name"))
    assert message.startswith("corpora.wb.sources.0.dataset: name: cannot be loaded: no route; check the name, ")


def test_dataset_that_breaks_off(dataset):
    def rows():
        yield {"text": "one"}
        raise RuntimeError("lost")

    dataset(rows())
    found = documents([DatasetSource(dataset="name")], [], "corpora.wb", "replace", Tally())
    assert next(found) == "one"
    with pytest.raises(UserError, match="cannot be loaded: lost; check"):
        next(found)


def test_datasets_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "run `pip install datasets`" in failure(DatasetSource(dataset="name"))


# ----------------------------------------------------------------------------------------------- documentation


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Writes a package's files where the import system finds them."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(contents):
        for name, content in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def docs(*names):
    return read(DocumentationSource(installed_documentation=list(names)))


def test_docstrings_in_source_order(installed):
    body = f'''"""module {LONG}"""
raise RuntimeError("this file must not be imported")
class A:
    """class {LONG}

        indented {LONG}
    """
    def short(self):
        "short"
        def inner():
            """inner {LONG}"""
    async def method(self):
        """method {LONG}"""
try:
    def tried():
        """tried {LONG}"""
except ImportError:
    def caught():
        """caught {LONG}"""
else:
    match 1:
        case 1:
            if 0:
                pass
            else:
                def elsewhere():
                    """elsewhere {LONG}"""
text = """no docstring {LONG}"""
def escaped():
    """escaped \\d {LONG}"""
'''
    installed({"kids_pkg/b.py": body, "kids_pkg/__init__.py": "", "kids_pkg/a/first.py": f'"""first {LONG}"""'})
    found = docs("kids_pkg")
    order = ["first", "module", "class", "inner", "method", "tried", "caught", "elsewhere", "escaped"]
    assert [text.split()[0] for text in found] == order
    assert f"\n\n    indented {LONG.strip()}" in found[2] or f"\n\nindented {LONG.strip()}" in found[2]
    assert "kids_pkg" not in sys.modules


def test_docstring_of_199_characters_is_left_out(installed):
    installed({"kids_len.py": f'"""{"x" * 199}"""\ndef f():\n    """\n    {"y" * 200}\n    """\n'})
    assert docs("kids_len") == ["y" * 200]


def test_packages_in_the_order_given_and_single_file_modules(installed):
    installed({"kids_z.py": f'"""z {LONG}"""', "kids_a.py": f'"""a {LONG}"""', "kids_space/m.py": f'"""m {LONG}"""'})
    assert [text[0] for text in docs("kids_z", "kids_space", "kids_a")] == ["z", "m", "a"]


def test_files_that_do_not_parse_are_skipped(installed, recwarn):
    installed(
        {
            "kids_bad/syntax.py": f'"""{LONG}"""\ndef',
            "kids_bad/nul.py": f'"""{LONG}"""\0',
            "kids_bad/coding.py": f'"""{LONG}"""\n'.encode() + b"\xff",
            "kids_bad/deep.py": f'"""{LONG}"""\nx = ' + "(" * 5000 + ")" * 5000,
            "kids_bad/latin.py": f'# coding: latin-1\n"""é {LONG}"""'.encode("latin-1"),
            "kids_bad/warns.py": f'"""warns {LONG}"""\nx = "\\d"\ny = 1 is 1\n',
        }
    )
    assert [text.split()[0] for text in docs("kids_bad")] == ["é", "warns"]
    assert not [w for w in recwarn if issubclass(w.category, SyntaxWarning | DeprecationWarning)]


def test_long_chain_of_elif(installed):
    chain = "if 0: pass\n" + "elif 0: pass\n" * 60 + f'else:\n  def f():\n    """{LONG}"""\n'
    installed({"kids_chain.py": chain})
    assert docs("kids_chain") == [LONG.strip()]


def test_processes_give_the_same_in_the_same_order(installed, monkeypatch):
    installed({f"kids_many/m{i}.py": f'"""{i} {LONG}"""' for i in range(40)})
    alone = docs("kids_many")
    monkeypatch.setattr(documentation, "PARALLEL_FILES", 0)
    assert docs("kids_many") == alone
    assert len(alone) == 40


def test_standard_library(tmp_path, monkeypatch):
    kept, pruned = f'"""kept {LONG}"""', f'"""pruned {LONG}"""'
    for name in ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "a/test"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "m.py").write_text(pruned)
    (tmp_path / "a/m.py").write_text(kept)
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text("# generated\ntopics = {'z': 'last', 'b': 'fi' 'rst'}\n")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    assert docs("stdlib") == [f"kept {LONG}".strip(), "first", "last"]


def test_topics_of_this_python_are_found():
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    assert any("assert" in topic for topic in documentation._topics(ast.parse(path.read_bytes())))


@pytest.mark.parametrize("name", ["torch.nn", "a-b", "", "../x", "-r"])
def test_name_that_is_no_package_name(name):
    message = failure(DocumentationSource(installed_documentation=["json", name]))
    assert message.startswith(f'corpora.wb.sources.0.installed_documentation.1: "{name}" is not the name of a package')


def test_package_that_is_not_installed():
    message = failure(DocumentationSource(installed_documentation=["kids_absent"]))
    assert message.endswith('"kids_absent" is not installed here; run `pip install kids_absent`')


def test_module_without_python_files():
    assert '"sys" has no Python files here' in failure(DocumentationSource(installed_documentation=["sys"]))


def test_python_file_that_vanished(installed, tmp_path):
    installed({"kids_gone/a.py": ""})
    (tmp_path / "kids_gone" / "b.py").symlink_to("nothing")
    message = failure(DocumentationSource(installed_documentation=["kids_gone"]))
    assert message.startswith(f"{tmp_path}/kids_gone/b.py: cannot be read: No such file or directory; ")
