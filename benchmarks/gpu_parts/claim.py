"""The paper's claim: a larger model that inherits from a smaller one, beside the same model learning alone.

The experiment is `ds_configs/experiments/fig1_base_to_large.json` at its scale `gpu` where that file exists, else
`claim.json` beside this file: ModernBERTs of 9 × 576 and 12 × 768, which leave the unigrams' plateau sooner, in bf16.
Its text is the documentation of the Python packages here, or a folder that KI_DS_TEXT names (text files, compressed or
not). One row takes as long as minutes are left; run again, it goes on from its last checkpoint, in the folder that
KI_DS_CLAIM names or in the system's temporary one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu_parts.part import ROOT, Figures, Row, seconds_left
from gpu_parts.record import scratch

FILE = ROOT / "ds_configs" / "experiments" / "fig1_base_to_large.json"
OWN = Path(__file__).with_name("claim.json")


def rows(device: str, tiny: bool) -> Iterator[Row]:
    """One experiment."""
    yield "base to large" if scaled() and not tiny else "medium to base", partial(experiment, tiny)


def scaled() -> bool:
    """Whether the paper's experiment is here at the scale of a GPU."""
    return FILE.exists() and "gpu" in json.loads(FILE.read_text()).get("scales", {})


def experiment(tiny: bool) -> Figures:
    """Curves and savings, of as much as there was time for."""
    from ki_ds.corpus.documentation import write_documentation

    given = os.environ.get("KI_DS_CLAIM")
    folder = (Path(given) if given else scratch("claim")) / ("tiny" if tiny else "full")
    folder.mkdir(parents=True, exist_ok=True)
    words: list[str] = []
    if scaled() and not tiny:
        file, words = FILE, ["--scale", "gpu"]
    else:
        file = folder / "claim.json"
        data = json.loads(OWN.read_text())
        if text := os.environ.get("KI_DS_TEXT"):
            data["corpora"]["text"]["sources"] = [{"text": f"{text}/**"}]
        elif not (folder / "documentation.jsonl").exists():
            write_documentation(folder / "documentation.jsonl")
        file.write_text(json.dumps(data))
        words = ["--scale", "tiny"] if tiny else []
    command = [sys.executable, "-m", "ki_ds.cli", "run", str(file), "--workdir", str(folder / "work"), *words]
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen([*command, "--processes", "1"], stdout=log, stderr=log, cwd=ROOT)
        try:
            code = process.wait(timeout=max(seconds_left() - 20, 1))
        except subprocess.TimeoutExpired:
            process.terminate()  # it saves a checkpoint
            process.wait(timeout=20)
            raise TimeoutError(f"the time was over; it goes on from {folder}: {progress(folder / 'work')}") from None
    if code:
        raise RuntimeError(f"exit code {code}: {(folder / 'log.txt').read_text()[-3000:]}")
    summary = json.loads((folder / "work" / "report" / "summary.json").read_text())
    return {"comparisons": summary["comparisons"], "curves": curves(folder / "work")}


def progress(work: Path) -> str:
    """Of the models, as far as they are."""
    found = curves(work)
    return "; ".join(f"{name} at step {curve[-1][0]}" for name, curve in found.items() if curve) or "nothing trained"


def curves(work: Path) -> dict[str, list[Any]]:
    """Of each model, [step, perplexities] wherever it was validated."""
    found = {}
    for file in sorted(work.glob("models/*/metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines() if '"validation"' in line]
        found[file.parent.name] = [[line["step"], line["validation"]] for line in lines]
    return found
