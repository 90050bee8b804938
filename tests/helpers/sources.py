"""Reads the sources of a corpus, and what their errors say."""

import bz2
import gzip
import lzma

import pyarrow as pa
import pytest

from ki_ds.corpus.sources import Tally, documents
from ki_ds.errors import UserError


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
