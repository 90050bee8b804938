"""Folders of recognisable targets."""

import contextlib
import json
import os

import numpy as np
import pytest

from ki_ds.errors import UserError
from ki_ds.files import digest
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.sealed import MANIFEST, Identity
from ki_ds.targets import codec
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.shard import pack_block, write_shard

HOW = Codec(300, 4, 1 / 16)
HEADER = FolderHeader(16, HOW)
IDENTITY = Identity("teach", {"k": 4}, {"corpora/a": "0" * 32})
FACTS = {"samples": 10, "samples_per_shard": 4, "header": HEADER.record}


def refusal(act, *arguments):
    """What a UserError says."""
    with pytest.raises(UserError) as raised:
        act(*arguments)
    return str(raised.value)


def contents(folder):
    """Of every file of a folder, by its name: its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def forge(folder, **keys):
    """Put other values into a manifest, as somebody does who also makes its digests right."""
    path = folder / MANIFEST
    record = {**json.loads(path.read_text()), **keys}
    record["fingerprint"] = digest({key: record[key] for key in ("stage", "schema", "config", "inputs")})
    record["manifest"] = digest({key: value for key, value in record.items() if key != "manifest"})
    path.write_text(json.dumps(record))


def sample(number, how=HOW, rows=None):
    """(planes, input digest): recognisable targets of a sample, some without a row."""
    rng = np.random.default_rng(number)
    rows = int(rng.integers(0, 5)) if rows is None else rows
    logp = -rng.exponential(2, (rows, how.k)).astype(np.float32)
    ids = np.stack([rng.choice(how.vocabulary, how.k, replace=False) for _ in range(rows + 1)])[:rows]
    planes, _ = pack_arrays(how, ids, logp, dict.fromkeys(how.scalars, logp.max(axis=1)))
    return planes, int(rng.integers(0, 2**64, dtype=np.uint64))


def write(path, start, end, how=HOW, rows=None):
    """A shard of recognisable samples."""
    found = [sample(number, how, rows) for number in range(start, end)]
    planes = codec.concatenate([how.empty(0), *(planes for planes, _ in found)])
    ends = np.cumsum([len(planes) for planes, _ in found], dtype=int)
    digests = np.array([digest for _, digest in found], np.uint64)
    write_shard(path, FolderHeader(16, how), start, [pack_block(how, planes, ends, digests, np.zeros(len(planes)))])


def fill(folder, samples=10, per_shard=4):
    """Write the shards that are missing."""
    shards = ShardFolder(folder, samples, per_shard)
    for number in shards.missing():
        start = number * per_shard
        write(folder / shards.name(number), start, min(start + per_shard, samples))


def assert_read(shards, samples):
    """The folder gives what was written there."""
    found, expected = shards.read(np.array(samples)), [sample(number) for number in samples]
    assert found.digests == [digest for _, digest in expected]
    assert found.rows == [len(planes) for planes, _ in expected]
    planes = codec.concatenate([planes for planes, _ in expected])
    for name in ("ids_nK", "values_nK", "count_n", "scalars_Sn"):
        np.testing.assert_array_equal(getattr(found.planes, name), getattr(planes, name))


def open_files(under):
    """Descriptors of this process that lie in a folder."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [path for path in found if path.startswith(str(under))]
