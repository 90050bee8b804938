"""Answers that are damaged, made to exhaust memory, or written in another way than ours."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.exchange import imported, run

from ki_ds.errors import UserError
from ki_ds.exchange.answers import Answers
from ki_ds.exchange.import_ import make
from ki_ds.exchange.pages import pages
from ki_ds.exchange.parquet import parquet_writer
from ki_ds.exchange.teacher_inputs import TeacherInputs
from ki_ds.experiment.graph import load_experiment
from ki_ds.sealed import read_manifest
from ki_ds.targets.manifest import open_folder
from ki_ds.workspace import Workspace


@pytest.fixture
def imports(world, tmp_path):
    """Imports a file in this process; the frames that it makes."""
    root, file, _ = world
    space = Workspace(load_experiment(file), file, root / "work")
    inputs = TeacherInputs(space.tokens("a"), space.stream("a"), space.viewer("a"), space.tokenizer)
    every = space.experiment.views * len(inputs.tokens.train)

    def made(path):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        make(tmp_path / "made", path, inputs, every, space.experiment, "a", "big")
        shards = open_folder(tmp_path / "made")
        opened = [shards.shard(number) for number in range(len(shards))]
        return [frame.data for shard in opened for frame in shard.read(shard.header.start, len(shard.index))]

    return made


@pytest.mark.parametrize("checksums", [True, False])
def test_damaged_answers_are_refused_in_words(world, imports, tmp_path, checksums):
    """Where pages have checksums, whatever is imported is what was written; else what can be seen is."""
    path = tmp_path / "answers.parquet"
    pq.write_table(pa.Table.from_pylist(world[2]), path, write_page_checksum=checksums)
    data, expected, rng, said = path.read_bytes(), imports(path), np.random.default_rng(1), []
    for _ in range(30):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            found = imports(path)
        except UserError as error:
            said.append(str(error))
        else:
            assert found == expected or not checksums
    assert len(said) > (20 if checksums else 3) and all(text.startswith(str(path)) for text in said)


def test_manifest_says_what_cannot_be_proven(world, tmp_path):
    said = imported(world, world[2], tmp_path, code=0)
    assert "its pages have no checksums, so that damage to a number may go unseen" in said
    manifest = read_manifest(tmp_path / "made@a")
    assert manifest["facts"]["answers"] == {"page_checksums": False, "true_token_left_out": False}
    assert len(manifest["inputs"]["answers"]) == 32  # the file's digest


WAYS = [
    {}, {"compression": "none"}, {"compression": "gzip", "data_page_version": "2.0"}, {"use_dictionary": False},
    {"compression": "zstd", "data_page_size": 256, "row_group_size": 100, "write_page_index": True},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checksums", [True, False])
def test_every_way_to_write_parquet_is_read(world, imports, tmp_path, way, checksums):
    table = pa.Table.from_pylist(world[2])
    pq.write_table(table, tmp_path / "a.parquet", **way, write_page_checksum=checksums)
    answers = Answers(tmp_path / "a.parquet", 100, 24)
    assert (answers.checksums, answers.longest, answers.beside) == (checksums, 20, False)
    pq.write_table(table, tmp_path / "b.parquet")
    assert imports(tmp_path / "a.parquet") == imports(tmp_path / "b.parquet")


def test_what_we_write_has_checksums(world, tmp_path):
    with parquet_writer(tmp_path / "x.parquet") as write:
        write({"a": np.arange(1000), "b": np.arange(1000.0)})
    for path in (tmp_path / "x.parquet", world[0] / "questions.parquet"):
        meta = pq.ParquetFile(path).metadata.row_group(0)
        with path.open("rb") as file:
            for chunk in map(meta.column, range(meta.num_columns)):
                begins = [one for one in (chunk.dictionary_page_offset, chunk.data_page_offset) if one is not None]
                found = [*pages(file, min(begins), chunk.total_compressed_size)]
                assert found and all(page.checksum for page in found)


COUNT = 1 << 23


def bomb(path):
    """A row of eight million ids, in two thousand bytes."""
    ids, logp = np.full(COUNT, 7, np.int32), np.full(COUNT, -1, np.float32)
    lists = [pa.ListArray.from_arrays(pa.array([0, COUNT], pa.int32()), pa.array(values)) for values in (ids, logp)]
    table = pa.table({"sample": [0], "index": [2], "token": [5], "ids": lists[0], "logprobs": lists[1]})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 4000


def liar(path):
    """The same, but its footer says one value."""
    bomb(path)
    data, many = path.read_bytes(), bytes([0x80, 0x80, 0x80, 0x08])  # 2 · 2^23 as a varint
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert many in data[footer:]
    path.write_bytes(data[:footer] + data[footer:].replace(many, bytes([0x82, 0x80, 0x80, 0x00])))


def many_rows(path):
    """More rows than there can be."""
    zeros = np.zeros(1 << 22, np.int32)
    lists = pa.ListArray.from_arrays(pa.array(np.arange(len(zeros) + 1, dtype=np.int32)), pa.array(zeros))
    logp = pa.ListArray.from_arrays(lists.offsets, pa.array(zeros - np.float32(1)))
    pq.write_table(
        pa.table({"sample": zeros, "index": zeros, "token": zeros, "ids": lists, "logprobs": logp}), path
    )  # fmt: skip


def one_sample(path):
    """Row upon row of a sample that has fewer."""
    zeros = np.zeros(2000, np.int32)
    lists = [[1]] * 2000, [[-1.0]] * 2000
    pq.write_table(
        pa.table({"sample": zeros, "index": zeros, "token": zeros, "ids": lists[0], "logprobs": lists[1]}), path
    )  # fmt: skip


@pytest.mark.parametrize(
    ("write", "message"),
    [(bomb, "8388608 values.*more than lists of distinct ids"), (liar, "pages with 8388608 values, where 1 are said"),
     (many_rows, "claims 4194304 rows; 100 samples of 24 tokens can have 2400"),
     (one_sample, "sample 0 has more rows than its sequence has tokens, 24")],
)  # fmt: skip
def test_small_file_that_claims_much_takes_no_memory(tmp_path, write, message):
    write(tmp_path / "answers.parquet")
    before = high_water()
    with pytest.raises(UserError, match=message):
        [*Answers(tmp_path / "answers.parquet", 100, 24).samples()]
    assert high_water() - before < 32, "MiB"


def high_water():
    """Peak memory since it was last asked for, MiB."""
    text = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(text.split("VmHWM:")[1].split()[0]) >> 10


@pytest.mark.timeout(20)
def test_pipe_in_the_place_of_answers_does_not_hang(world, tmp_path):
    root, file, _ = world
    os.mkfifo(tmp_path / "answers.parquet")
    arguments = (tmp_path / "made@a", "--corpus", "a", "--workdir", root / "work")
    assert "is not a file" in run("import", file, tmp_path / "answers.parquet", *arguments, code=2)


def beside(rows, k):
    """As vLLM's prompt_logprobs: the prompt's own token first, and the k most probable."""
    found = []
    for row in rows:
        best = sorted(zip(row["logprobs"], row["ids"], strict=True), reverse=True)[:k]
        own = dict(zip(row["ids"], row["logprobs"], strict=True)).get(row["token"], best[-1][0] - 1.0)
        given = {row["token"]: own, **{one: logp for logp, one in best}}
        found.append({**row, "ids": [*given], "logprobs": [*given.values()], "truth": own})
    return found


def full(rows, k):
    """Of rows with k ids or more, the k most probable."""
    return [{**row, "ids": row["ids"][:k], "logprobs": row["logprobs"][:k]} for row in rows]


@pytest.fixture
def wide(world):
    """Rows of 12 ids each."""
    rng = np.random.default_rng(3)
    rows = []
    for row in world[2]:
        ids = rng.choice(400, 12, replace=False)
        ids[rng.integers(12)] = row["token"] if row["token"] not in ids else ids[0]
        ids = list(dict.fromkeys(ids.tolist()))
        ids += [one for one in range(20) if one not in ids][: 12 - len(ids)]
        logp = np.sort(np.log(rng.dirichlet(np.ones(13))))[::-1][:12]
        rows.append({**row, "ids": ids, "logprobs": logp.tolist(), "truth": logp[ids.index(row["token"])]})
    return rows


def test_true_token_beside_the_k_most_probable_is_left_out(world, wide, imports, tmp_path):
    given = beside(wide, 6)
    assert {len(row["ids"]) for row in given} == {6, 7}
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "vllm.parquet")
    truths = [row["truth"] for row in given]
    plain = [{**row, "truth": truth} for row, truth in zip(full(wide, 6), truths, strict=True)]
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "plain.parquet")
    assert imports(tmp_path / "vllm.parquet") == imports(tmp_path / "plain.parquet")
    said = imported(world, given, tmp_path, code=0)
    assert "rows of 6 ids, or of these and the true token, as vLLM gives them: that one is left out" in said
    assert open_folder(tmp_path / "made@a").codec.k == 6
    assert read_manifest(tmp_path / "made@a")["facts"]["answers"]["true_token_left_out"]


def test_longest_rows_that_lack_the_true_token_are_kept(world, wide, tmp_path):
    """Rows of two lengths, but the longer ones are the most probable ids indeed."""
    given = beside(wide, 6)
    place = next(n for n, row in enumerate(given) if len(row["ids"]) == 7)
    given[place]["ids"][0] = next(one for one in range(400) if one not in given[place]["ids"])
    said = imported(world, given, tmp_path, code=0)
    assert "vLLM" not in said
    assert open_folder(tmp_path / "made@a").codec.k == 7
