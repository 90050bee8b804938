"""Training: model FLOPs a second, alone and inheriting in turns on one engine, and seconds of waiting for targets."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_parts.part import ROOT, Figures, NotHere, Row, apart
from gpu_parts.workload import Workload, on_device

ENGINES = ROOT / "ds_configs" / "engine"
ALPHA, TURN = 0.5, 3  # steps that inherit, and as many that do not
TURNS = 5  # of each kind; the first warms up
LARGE = dict(architecture="roberta-large", objective="mlm", vocabulary=50_265, length=512, micro=32, batch=64)
GPT = dict(architecture="gpt-base", objective="clm", vocabulary=50_257, length=1024, micro=16, batch=32)
TINY = dict(architecture="roberta-tiny", objective="mlm", vocabulary=320, length=16, micro=2, batch=4, k=8)
TINY_GPT = {**TINY, "architecture": "gpt-tiny", "objective": "clm"}
# what is laid over an engine JSON, by what it is called
MASTERS = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
# of gradients in fp16 alone; DeepSpeed quantises them between nodes, so not on one machine
ZERO_PLUS_PLUS = {
    "zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True},
    "bf16": {"enabled": False},
    "fp16": {"enabled": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "activation checkpointing": {"activation_checkpointing": {}},
    "compiled": {"ki_ds": {"compile": True}},
    "bf16 master weights and states": {"bf16": {"enabled": True, **MASTERS}},
    "ZeRO++, quantised": ZERO_PLUS_PLUS,
    "DeepSpeed's FusedAdam": {"optimizer": {"type": "AdamW"}},
}
MUON = {"optimizer": "muon", "muon_learning_rate": 0.02, "gradient_clipping": 0.0}
DENSE_BF16 = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}  # nominal TFLOP/s, half precision, dense


def rows(device: str, tiny: bool) -> Iterator[Row]:
    """roberta-large in bf16 and fp16 at ZeRO 1 to 3; gpt-base, where every token has a target; then variants."""
    large, gpt = (TINY, TINY_GPT) if tiny else (LARGE, GPT)
    if device == "cpu":
        names = ["zero1_fp32", "zero3_fp32"]
    else:
        names = [f"zero{stage}_{half}" for half in ("bf16", "fp16") for stage in (1, 2, 3)]
    for number, name in enumerate(names):
        yield f"{large['architecture']}, {name}", partial(one, large, name, {})
        if number == 0:
            yield f"{gpt['architecture']}, {name}", partial(one, gpt, name, {})
    for said, over in VARIANTS.items() if not tiny else list(VARIANTS.items())[:1]:  # others are compiled for minutes
        yield f"{large['architecture']}, {names[0]}, {said}", partial(one, large, names[0], over)
    yield f"{large['architecture']}, {names[0]}, Muon", partial(one, large, names[0], {}, MUON)
    yield f"{gpt['architecture']}, {names[1]}", partial(one, gpt, names[1], {})


def one(sizes: dict[str, Any], name: str, over: dict[str, Any], train: dict[str, Any] | None = None) -> Figures:
    """A row, in a process of its own."""
    return apart("training_speed", {"sizes": sizes, "engine": name, "over": over, "train": train or {}})


def measure(given: dict[str, Any]) -> Figures:
    """Steps in turns of three: inheriting, and alone; the same engine, the same number of sequences."""
    from ki_ds.engine.batch_layout import BatchLayout
    from ki_ds.engine.config import EngineConfig, check_device
    from ki_ds.engine.engine import Engine
    from ki_ds.errors import UserError
    from ki_ds.experiment.schema import Train
    from ki_ds.training.loop import update

    device = on_device()
    sizes = dict(given["sizes"])
    micro, batch, steps = sizes.pop("micro"), sizes.pop("batch"), 2 * TURN * TURNS
    work = Workload(**sizes, samples=batch * (steps + 2))
    source = ENGINES / f"{given['engine']}.json"
    if not source.exists():
        raise NotHere(f"there is no {source}")
    numbers = {"on": {"random": 1.0}, "steps": steps, "batch_size": batch, "micro_batch_size": micro}
    train = Train.model_validate({**numbers, "learning_rate": 1e-4, **given["train"]})
    try:
        config = EngineConfig.read({**json.loads(source.read_text()), **given["over"]}, source.name)
        check_device(config)
        layout = BatchLayout(batch, micro, 0, 1)
        engine = Engine(work.language_model(train.dropout, str(device)), train, layout, config)
    except UserError as error:  # a compiler, a package or a precision that is not here
        raise NotHere(str(error)) from None
    engine.train()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    waited: dict[bool, list[float]] = {True: [], False: []}
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        targets = work.stored_targets(Path(folder))
        loader, run = work.loader(layout, lambda step: ALPHA * inherits(step), targets), work.run(train)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with closing(loader):
            for step in range(steps):
                before, began = loader.waited_s, time.perf_counter()
                losses.append(update(engine, loader(step), run).loss)
                if step >= 2 * TURN:
                    seconds[inherits(step)].append(time.perf_counter() - began)
                    waited[inherits(step)].append(loader.waited_s - before)
    inheriting, alone = (statistics.median(seconds[kind]) for kind in (True, False))
    flop = 3 * work.forward_flops() * batch
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    nominal = next((rate for card, rate in DENSE_BF16.items() if card in name), None)
    return {
        "seconds a step, alone": alone, "seconds a step, inheriting": inheriting,
        "inheriting / alone": inheriting / alone,
        "sequences a step": batch, "sequences at once": micro,
        "rows with a target a second": work.rows_per_sequence * batch / inheriting,
        "waited for targets, seconds a step, median": statistics.median(waited[True]),
        "waited for targets, seconds a step, most": max(waited[True]),
        "model TFLOP/s, alone": flop / alone / 1e12, "model TFLOP/s, inheriting": flop / inheriting / 1e12,
        "share of the nominal rate, alone": None if nominal is None else flop / alone / 1e12 / nominal,
        "share of the nominal rate, inheriting": None if nominal is None else flop / inheriting / 1e12 / nominal,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "losses": losses[:: 2 * TURN],
    }  # fmt: skip


def inherits(step: int) -> bool:
    """Whether a step has α above 0."""
    return (step // TURN) % 2 == 0
