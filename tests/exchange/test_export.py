"""`ki-ds targets export` gives back what was imported."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.exchange import run
from safetensors.numpy import load_file


def test_export_gives_back_what_was_imported(world, tmp_path):
    root, _, rows = world
    run("export", root / "big@a", tmp_path / "out.parquet", "--workdir", root / "work")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(found) == len(rows)
    for one, row in zip(found, rows, strict=True):
        assert [one[name] for name in ("sample", "index", "token")] == [row[n] for n in ("sample", "index", "token")]
        assert sorted(one["ids"]) == sorted(row["ids"])
        stored = dict(zip(one["ids"], one["logprobs"], strict=True))
        assert one["logprobs"] == sorted(one["logprobs"], reverse=True)
        for token, logp in zip(row["ids"], row["logprobs"], strict=True):
            assert stored[token] == pytest.approx(logp, abs=0.5 * 63 / 1024 + 0.003)
        assert one["truth"] == pytest.approx(row["truth"], abs=0.002 + 1e-6)


def test_arrays_hold_the_same_as_parquet(world, tmp_path):
    root, _, _ = world
    run("export", root / "big@a", tmp_path / "out.parquet", "--workdir", root / "work")
    run("export", root / "big@a", tmp_path / "arrays", "--workdir", root / "work")
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    arrays = [load_file(path) for path in sorted((tmp_path / "arrays").glob("*.safetensors"))]
    for name in ("sample", "index", "token", "truth"):
        assert np.array_equal(np.concatenate([one[name] for one in arrays]), np.array(table[name]))
    lists = [ids.tolist() for one in arrays for ids in np.split(one["ids"], one["ends"][:-1])]
    assert lists == table["ids"]


def test_export_without_the_corpus_says_so_and_leaves_columns_out(copy, tmp_path):
    said = run("export", copy, tmp_path / "out.parquet")
    assert "without the columns index and token" in said
    assert pq.read_schema(tmp_path / "out.parquet").names == ["sample", "truth", "ids", "logprobs"]


def test_output_that_cannot_be_written_is_refused_at_once(world, tmp_path):
    root, file, _ = world
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.parquet").mkdir()
    more = ("--corpus", "a", "--workdir", root / "work")
    for output, message in (
        (tmp_path / "absent" / "x.parquet", "there is no folder"), (tmp_path / "file", "is a file"),
        (tmp_path / "folder.parquet", "is a folder"), ("s3://bucket/x.parquet", "expected a local path"),
    ):  # fmt: skip
        assert message in run("export", root / "big@a", output, code=2)
    assert "ends in .parquet" in run("ask", file, tmp_path / "q.csv", *more, "--samples", 1, code=2)
    assert "expected a local path" in run("import", file, root / "answers.parquet", "memory://x/y", *more, code=2)
