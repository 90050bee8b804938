"""Two hundred steps of a small student in every precision and ZeRO stage, on the same text with the same targets.

The corpus, the teacher and its targets are made once, in fp32, by `ki-ds` itself; the students read them under one
engine JSON each. The text is the documentation of the Python packages here, as in the demo, or a folder that
KI_DS_TEXT names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_parts.part import ROOT, Figures, NotHere, Row, apart, seconds_left
from gpu_parts.record import scratch
from gpu_parts.workload import on_device

STEPS, TINY_STEPS, RESUMED = 200, 4, 20
STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3), "fp16": (1, 2, 3)}


def rows(device: str, tiny: bool) -> Iterator[Row]:
    """The demo's student, by precision and ZeRO stage; an overflow that is provoked; a run that is gone on with."""
    yield "corpus, teacher and targets", partial(prepare, tiny)
    for precision, stages in STAGES.items():
        for stage in stages if not tiny else stages[:1] if precision != "fp16" else ():
            given = {"engine": engine(precision, stage), "steps": TINY_STEPS if tiny else STEPS, "tiny": tiny}
            yield f"{precision}, ZeRO {stage}", partial(student, given)
    if not tiny:
        provoked = engine("fp16", 1) | {"fp16": {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}}
        yield "fp16, overflow provoked", partial(student, {"engine": provoked, "steps": RESUMED, "tiny": tiny})
    precision, stage = ("fp32", 1) if tiny else ("bf16", 2)
    given = {"engine": engine(precision, stage), "steps": TINY_STEPS if tiny else RESUMED, "tiny": tiny}
    yield f"{precision}, ZeRO {stage}, resumed half-way", partial(student, given | {"resume": True})
    if not tiny:
        given = {"engine": engine("fp16", 1), "steps": RESUMED, "tiny": tiny, "resume": True}
        yield "fp16, ZeRO 1, resumed half-way", partial(student, given)


def engine(precision: str, stage: int) -> dict[str, Any]:
    """An engine JSON."""
    half = {} if precision == "fp32" else {precision: {"enabled": True}}
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 5_000_000}, **half}


def settings(tiny: bool) -> list[str]:
    """What is laid over the demo."""
    if not tiny:
        return [f"models.student.train.steps={STEPS}"]
    small = ["small", "student"]
    return [f"models.{name}.train.steps={TINY_STEPS}" for name in small] + ["sequence_length=32"]


def ki_ds(*words: str) -> str:
    """A `ki-ds` command.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "ki_ds.cli", *words], capture_output=True, text=True, cwd=ROOT,
        timeout=max(seconds_left(), 1),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"ki-ds {' '.join(words)}: exit code {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout


def experiment(folder: Path) -> Path:
    """The demo's file beside its text."""
    from ki_ds.corpus.documentation import write_documentation

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "demo.json"
    data = json.loads((ROOT / "ds_configs" / "experiments" / "demo.json").read_text())
    del data["models"]["alone"], data["compare"]
    data["engine"] = engine("fp32", 1)
    if text := os.environ.get("KI_DS_TEXT"):
        data["corpora"]["docs"]["sources"] = [{"text": f"{text}/**"}]
    elif not (folder / "documentation.jsonl").exists():
        write_documentation(folder / "documentation.jsonl")
    file.write_text(json.dumps(data))
    return file


def place(tiny: bool) -> Path:
    """A folder for this code that outlasts this process."""
    return scratch("precision") / ("tiny" if tiny else "full")


def prepare(tiny: bool) -> Figures:
    """Everything that the students read."""
    file = experiment(place(tiny))
    words = [str(file), "--workdir", str(place(tiny) / "work"), "--processes", "1"]
    over = [word for one in settings(tiny) for word in ("--set", one)]
    for command, *more in (["corpus"], ["train", "--name", "small"], ["teach"]):
        ki_ds(command, *words, *over, *more)
    return {"steps of the student": TINY_STEPS if tiny else STEPS}


def student(given: dict[str, Any]) -> Figures:
    """A row, in processes of their own: straight through, or stopped half-way and gone on with, beside the other."""
    whole = apart("precision", given)
    if not given.get("resume"):
        return whole
    with tempfile.TemporaryDirectory() as folder:
        half = given["steps"] // 2
        apart("precision", given | {"checkpoints": folder, "last": half})
        rest = apart("precision", given | {"checkpoints": folder, "last": given["steps"]})
    return {"equal to the bit": whole["losses"][half:] == rest["losses"], "losses": rest["losses"],
            "straight through": whole["losses"][half:]}  # fmt: skip


def measure(given: dict[str, Any]) -> Figures:
    """Losses of a student's steps under an engine JSON."""
    from ki_ds.engine.batch_layout import BatchLayout
    from ki_ds.engine.config import EngineConfig, check_device
    from ki_ds.engine.engine import Engine
    from ki_ds.errors import UserError
    from ki_ds.experiment.graph import load_experiment, trained_model
    from ki_ds.models.language_model import LanguageModel
    from ki_ds.stages import models, student_data
    from ki_ds.training.loop import update
    from ki_ds.training.run import TrainRun
    from ki_ds.training.validation import Validation
    from ki_ds.workspace import Workspace

    folder, tiny = place(given["tiny"]), given["tiny"]
    device, file = on_device(), folder / "demo.json"
    space = Workspace(load_experiment(file, None, settings(tiny)), file, folder / "work")
    one, e = trained_model(space.experiment, "student"), space.experiment
    config = EngineConfig.read(given["engine"], "engine")
    try:
        check_device(config)
    except UserError as error:
        raise NotHere(str(error)) from None
    layout = BatchLayout(one.train.batch_size, one.train.batch_size // 2, 0, 1)
    validation = {name: (space.tokens(name).validation, space.viewer(name)) for name in one.train.on}
    run = TrainRun("student", one.train, one.model.inherit, one.seed, e.sequence_length, validation)
    model = LanguageModel(models.new_student(space, one), space.tokenizer.size, one.place).to(device)
    whole = Engine(model, one.train, layout, config)
    saved = Path(given["checkpoints"]) if "checkpoints" in given else None
    first = whole.resume(saved, {}, True) if saved else 0
    last = given.get("last", given["steps"])
    whole.train()
    losses, kls, scales, skipped = [], [], [], 0
    with closing(student_data.loader(space, one, layout)) as loader:
        for step in range(first, last):
            result = update(whole, loader(step), run)
            losses.append(result.loss)
            kls.append(result.kl)
            scales.append(result.loss_scale)
            skipped += result.skipped
    if saved:
        whole.save(saved, last, 2, {})
    perplexity = Validation(run, layout.micro_batch_size)(whole)
    return {
        "losses": losses, "last loss": sum(losses[-10:]) / len(losses[-10:]), "perplexity": perplexity,
        "kl": kls[-1], "loss scale": scales[-1], "lowest loss scale": min((x for x in scales if x), default=None),
        "tries in vain": skipped,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }  # fmt: skip
