"""Parquet: a document a row of a column of strings."""

import io
import re

import pyarrow as pa
import pytest
from helpers.sources import failure, read
from pyarrow import parquet

from ki_ds.corpus.sources import Tally
from ki_ds.experiment.sources import ParquetSource


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
