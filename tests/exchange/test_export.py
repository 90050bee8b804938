"""`ki-ds targets export` gives back what was imported."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.exchange import SAMPLES, imported, run
from safetensors.numpy import load_file

from ki_ds.targets.manifest import open_folder


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


def test_what_is_exported_can_be_imported(world, tmp_path):
    """Rows whose whole mass is kept sum to more than 1 as they are stored."""
    root, file, _ = world
    rng, rows = np.random.default_rng(5), []
    for row in world[2]:
        ids, p = rng.choice(400, 20, replace=False), np.sort(rng.dirichlet(np.full(20, 0.3)) + 1e-9)[::-1]
        logp = np.log(p / p.sum())
        ids[0] = row["token"] if row["token"] not in ids else ids[0]
        truth = dict(zip(ids.tolist(), logp.tolist(), strict=True)).get(row["token"], -30.0)
        rows.append({**row, "ids": ids.tolist(), "logprobs": logp.tolist(), "truth": truth})
    imported(world, rows, tmp_path, code=0)
    stored = open_folder(tmp_path / "made@a")
    read = stored.read(np.arange(SAMPLES))
    mass = np.exp(stored.codec.log_probabilities(read.planes).astype(np.float64)).sum(axis=1)
    assert mass.max() > 1.0015  # more than import lets pass
    run("export", tmp_path / "made@a", tmp_path / "out.parquet", "--workdir", root / "work")
    given = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert max(np.exp(row["logprobs"]).sum() for row in given) < 1 + 1e-6
    assert all(row["truth"] <= row["logprobs"][0] for row in given)
    arguments = ("--corpus", "a", "--workdir", root / "work")
    said = run("import", file, tmp_path / "out.parquet", tmp_path / "again@a", *arguments)
    assert f"{SAMPLES} samples" in said and "no checksums" not in said
    again = open_folder(tmp_path / "again@a").read(np.arange(SAMPLES))
    np.testing.assert_array_equal(again.planes.ids_nK, read.planes.ids_nK)
    assert again.digests == read.digests


def test_help_names_arguments_that_exist():
    for command in ("ask", "import", "export", "verify"):
        said = run(command, "--help")
        assert ("DIR/../.." in said) == (
            "DIR" in said.split("Arguments:")[1].split("Options:")[0] and command != "import"
        )


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
