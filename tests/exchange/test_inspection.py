"""`ki-ds targets inspect` and `bench`."""

import json

import numpy as np
import pytest
from helpers.exchange import run


def test_inspect_shows_figures_and_token_text(world):
    root, _, rows = world
    tables = json.loads(run("inspect", root / "big@a", "--json", "--workdir", root / "work"))
    figures, shown = tables["statistics"], tables["rows"]
    assert figures["rows"] == len(rows)
    assert figures["entries_per_row"] == pytest.approx(np.mean([len(row["ids"]) for row in rows]))
    assert figures["teacher_loss"] == pytest.approx(-np.mean([row["truth"] for row in rows]), abs=0.003)
    mass = np.mean([np.exp(row["logprobs"]).sum() for row in rows])
    assert figures["mass_kept"] == pytest.approx(mass, abs=0.01)
    p = [np.exp(row["logprobs"]) / np.exp(row["logprobs"]).sum() for row in rows]
    assert figures["entropy"] == pytest.approx(np.mean([-(one * np.log(one)).sum() for one in p]), abs=0.01)
    here = [row for row in rows if row["sample"] == 0][: len(shown)]
    for one, row in zip(shown, here, strict=True):
        assert (one["index"], one["token"]) == (row["index"], row["token"])
        assert one["p"] == pytest.approx(np.exp(row["logprobs"])[: len(one["p"])], rel=0.05)
    text = run("inspect", root / "big@a", "--workdir", root / "work")
    assert "sample 0, index" in text and "true '" in text
    assert "bytes_per_entry_of" in text
    assert "holds samples 0 to 48" in run("inspect", root / "big@a", "--sample", 48, code=2)


def test_bench_reads_everything(world):
    assert "rows/s" in run("bench", world[0] / "big@a", "--seconds", "0.2")


@pytest.mark.parametrize("command", ["verify", "repair", "inspect", "bench", "export"])
def test_folder_that_is_none(tmp_path, command):
    more = [tmp_path / "out.parquet"] if command == "export" else []
    said = run(command, tmp_path, *more, code=2)
    assert f"error: {tmp_path}: there is no manifest.json" in said
    assert "Traceback" not in said
