"""Small files that become large: refused with their place, in memory that is bounded."""

import gzip
import json
import lzma
import subprocess
import sys
import zlib

import pyarrow as pa
import pytest
from helpers.sources import failure
from pyarrow import parquet

from ki_ds.corpus import sources as module
from ki_ds.experiment.sources import JsonLinesSource, ParquetSource

MIB = 1 << 20
READ = """
import json, resource, sys
from pathlib import Path
import pyarrow.parquet
from ki_ds.corpus import memory
from ki_ds.corpus.sources import Tally, documents
from ki_ds.errors import UserError
from ki_ds.experiment.sources import JsonLinesSource, ParquetSource, TextSource
memory.BOUND_BYTES = 128 << 20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before, (kind, name) = peak(), sys.argv[1:]
source = {"parquet": ParquetSource, "jsonl": JsonLinesSource, "text": TextSource}[kind]
try:
    said = sum(len(text) for text in documents([source(**{kind: name})], [Path()], "c", "replace", Tally()))
except UserError as error:
    said = str(error)
print(json.dumps([peak() - before, said]))
"""


def line_of_lists():
    return gzip.compress(b'{"text": "x", "junk": [' + b"[]," * (14 * MIB) + b"0]}\n", 1)


def line_of_text():
    return gzip.compress(b'{"text": "' + b"x" * (120 * MIB) + b'"}\n', 1)


def written(array, **options):
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": array}), sink, compression="zstd", write_statistics=False, **options)
    return sink.getvalue().to_pybytes()


def one_text_in_many_rows():
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array(["x" * (8 * MIB)]))
    return written(rows, store_schema=False, dictionary_pagesize_limit=1 << 30)


def one_long_text():
    return written(pa.array(["x" * (150 * MIB)]), use_dictionary=False)


def large_dictionary():
    """The header of an xz block asks for 1.5 GiB in which to keep what has been written."""
    data = bytearray(lzma.compress(bytes(20 * MIB), preset=0))
    size = (data[12] + 1) * 4
    place = data.index(b"\x21\x01", 12) + 2  # the filter LZMA2, one byte of properties
    data[place] = 37
    data[12 + size - 4 : 12 + size] = zlib.crc32(data[12 : 12 + size - 4]).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "name", "make", "expected"),
    [
        (
            "jsonl",
            "lists.jsonl.gz",
            line_of_lists,
            "lists.jsonl.gz:1: a line of more than 33554432 characters; make several",
        ),
        (
            "jsonl",
            "text.jsonl.gz",
            line_of_text,
            "text.jsonl.gz:1: a line of more than 33554432 characters; make several",
        ),
        ("parquet", "rows.parquet", one_text_in_many_rows, "rows.parquet: takes more than "),
        ("parquet", "long.parquet", one_long_text, "long.parquet: takes more than "),
        ("text", "dictionary.xz", large_dictionary, "dictionary.xz: cannot be read: "),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_a_bomb_is_refused_in_little_memory(tmp_path, kind, name, make, expected):
    data = make()
    assert len(data) < 2 * MIB
    (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ, kind, name], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    peak, said = json.loads(done.stdout)
    assert str(said).startswith(f"{tmp_path}/{expected}"), said
    assert peak < 250, f"{peak} MiB"


def test_the_longest_line_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE", 20)
    monkeypatch.setattr(module, "READ_BYTES", 7)
    lines = ['{"text": "12345678"}', '{"text": "123456789"}']
    assert list(map(len, lines)) == [20, 21]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], lines[0], lines[1]]))
    message = failure(JsonLinesSource(jsonl="a.jsonl"), bases=[tmp_path])
    assert message.startswith(f"{tmp_path}/a.jsonl:3: a line of more than 20 characters; ")


def test_a_row_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE", 20)
    parquet.write_table(pa.table({"text": ["x" * 20, None, "x" * 21]}), tmp_path / "a.parquet")
    message = failure(ParquetSource(parquet="a.parquet"), bases=[tmp_path])
    assert message.startswith(f"{tmp_path}/a.parquet: row 2: a text of 21 bytes, more than 20; ")


def test_the_bound_is_lifted_when_a_file_has_been_read(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    list(module.documents([ParquetSource(parquet="a.parquet")], [tmp_path], "c", "replace", module.Tally()))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
