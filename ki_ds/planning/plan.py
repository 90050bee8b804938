"""What a run costs, before it begins: tokens, FLOPs, bytes and memory of a stage; and whether the memory is there."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.engine import config as engine_config
from ki_ds.engine.config import EngineConfig
from ki_ds.experiment.graph import Stage, stages, targets_needed
from ki_ds.experiment.schema import Experiment
from ki_ds.experiment.strict import read_json
from ki_ds.models import architectures
from ki_ds.planning import memory
from ki_ds.planning.activations import Kept, Pass, kept
from ki_ds.planning.costs import cost, rows_per_sequence
from ki_ds.stages.pipeline import expected_tokenizer, stage_state
from ki_ds.teaching.teacher import MICRO_BATCH
from ki_ds.workspace import SHIPPED, Workspace

GIB = 1 << 30
USABLE = 0.9  # of what is there: communication buffers, fragmentation and the device's own context take the rest
PROCESS = 0.7 * GIB  # host memory of a rank without a model: the interpreter, torch, DeepSpeed, transformers
OFFLOAD = ("none", "cpu", "nvme")


# ---------------------------------------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Room:
    """Memory that is there for a rank, bytes; None: unknown. Without a GPU the device is host memory."""

    gpu: bool
    device: float | None = None
    host: float | None = None  # beside the GPU's
    source: str = ""
    here: bool = False  # on this machine

    def holds(self, need: memory.Estimate) -> bool:
        """Whether so much fits; what is unknown counts as endless."""
        device, host = need.device, need.host + PROCESS
        if not self.gpu:
            device, host = device + host, 0.0
        return device <= USABLE * (self.device or math.inf) and host <= USABLE * (self.host or math.inf)


def room(ranks: int, gib: float | None, elsewhere: bool) -> Room:
    """What a rank finds: `gib` of GPU memory where given, nothing known `elsewhere`, else a share of this machine."""
    import psutil
    import torch

    if gib is not None:
        return Room(True, gib * GIB, None, f"{gib:g} GiB a rank, as given")
    devices = torch.cuda.device_count()
    if elsewhere or (devices and ranks > devices):
        return Room(devices > 0)
    share = psutil.virtual_memory().available / ranks
    if not devices:
        return Room(False, share, None, f"{share / GIB:.1f} GiB of this machine's free memory a rank", True)
    least = min((torch.cuda.get_device_properties(index) for index in range(ranks)), key=lambda one: one.total_memory)
    return Room(True, least.total_memory, share, f"{least.name}, {least.total_memory / GIB:.0f} GiB", True)


def shipped_engines() -> dict[str, EngineConfig]:
    """The engine JSONs of ds_configs/engine, by name."""
    folders = (place / "ds_configs" / "engine" for place in SHIPPED)
    folder = next((one for one in folders if one.is_dir()), Path())
    return {file.name: EngineConfig.read(read_json(file), str(file)) for file in sorted(folder.glob("*.json"))}


def offload(config: EngineConfig) -> int:
    """How far an engine JSON moves memory away from the device: 0 not at all, 1 to the host, 2 to NVMe."""
    return max(OFFLOAD.index(one.device) for one in (config.offload_optimizer, config.offload_parameters))


def in_order(engines: dict[str, EngineConfig], chosen: EngineConfig) -> list[tuple[str, EngineConfig]]:
    """Those that cost least communication first: without offload, then in the precision chosen, then by ZeRO stage."""

    def rank(item: tuple[str, EngineConfig]) -> tuple[int, bool, int, str]:
        name, config = item
        return offload(config), config.precision_record != chosen.precision_record, config.zero_stage, name

    return sorted(engines.items(), key=rank)


# ------------------------------------------------------------------------------------------- what is needed


class Need:
    """Memory that training a model takes on a rank, under any engine JSON and micro-batch size."""

    def __init__(self, space: Workspace, name: str, tokenizer: TextTokenizer, ranks: int, gpu: bool):
        model = space.experiment.models[name]
        assert model.train is not None
        self.e: Experiment = space.experiment
        self.train, self.ranks, self.gpu = model.train, ranks, gpu
        self.config = copy.deepcopy(space.model_config(name, tokenizer))
        architectures.set_dropout(self.config, model.train.dropout)
        self.k = model.inherit.targets.selection(model.inherit.temperature).k if model.inherit else 0
        self.found: dict[Pass, Kept] = {}

    @cached_property
    def model(self) -> memory.Model:
        return memory.outlined(self.config, self.e.objective)

    def kept(self, engine: EngineConfig, sequences: int) -> Kept:
        """Activations grow by as much with every sequence, so that two sizes tell of all."""
        for count in (1, 2):
            how = Pass.of(count, self.e.sequence_length, engine, self.gpu)
            if how not in self.found:
                self.found[how] = kept(self.config, self.e.objective, how)
        one, two = (self.found[how._replace(sequences=count)] for count in (1, 2))
        return Kept(*(a + (sequences - 1) * (b - a) for a, b in zip(one, two, strict=True)))

    def at(self, engine: EngineConfig, sequences: int) -> memory.Estimate:
        """Under an engine JSON, with so many sequences at once."""
        tokens = sequences * self.e.sequence_length
        rows = math.ceil(sequences * rows_per_sequence(self.e))
        micro = memory.Micro(tokens, rows, self.k, self.kept(engine, sequences))
        return memory.estimate(self.model, micro, self.ranks, engine, self.gpu)

    def sizes(self) -> Iterator[int]:
        """Micro-batch sizes that go, from the largest."""
        share = self.train.batch_size // self.ranks
        return (size for size in range(share, 0, -1) if share % size == 0)


def verdict(need: Need, sequences: int, chosen: EngineConfig, there: Room) -> str:
    """Whether what is there is enough; else the first engine JSON that would do, or the first smaller micro-batch."""
    found = need.at(chosen, sequences)
    said = f"needs {amounts(found, there.gpu)} a rank with micro_batch_size {sequences}"
    if there.device is None:
        kind = "on GPUs" if there.gpu else "on CPUs"
        return f"{said} {kind}; what is there is not known from here (ask with --memory GIB)"
    if there.holds(found):
        return f"{said}; fits ({there.source})"
    known = ["fp32", *(half for half in ("fp16", "bf16") if not there.here or engine_config.supported(half))]
    order = [(name, one) for name, one in in_order(shipped_engines(), chosen) if one.precision in known]
    smaller = [size for size in need.sizes() if size < sequences]
    for size in (sequences, *smaller):
        for name, config in order:
            if there.holds(would := need.at(config, size)):
                engine = f"ds_configs/engine/{name} would ({amounts(would, there.gpu)})"
                if size == sequences:
                    return f"{said}; DOES NOT FIT ({there.source}); {engine}"
                return (
                    f"{said}; DOES NOT FIT ({there.source}); no engine JSON fits at this size; with "
                    f'"micro_batch_size": {size} {engine}'
                )
    return (
        f"{said}; DOES NOT FIT ({there.source}); no engine JSON fits, not even with micro_batch_size 1: take more "
        "processes, devices with more memory, a shorter sequence_length or a smaller model"
    )


def amounts(need: memory.Estimate, gpu: bool) -> str:
    """Bytes of a rank in words."""
    device, host = (need.device, need.host) if gpu else (need.device + need.host, 0.0)
    parts = [f"{device / GIB:.2g} GiB" if device < GIB else f"{device / GIB:.1f} GiB"]
    parts += [
        f"{amount / GIB:.1f} GiB {place}"
        for amount, place in ((host, "of host memory"), (need.nvme, "of NVMe"))
        if amount
    ]
    return " and ".join(parts)


# ------------------------------------------------------------------------------------------------- the plan


def plan(space: Workspace, ranks: int, there: Room) -> tuple[list[dict[str, Any]], list[str]]:
    """What each stage costs and its state; and a line about memory for every model that is to be trained."""
    e, tokenizer = space.experiment, expected_tokenizer(space)
    rows, lines = [], []
    for stage in stages(e):
        row: dict[str, Any] = {"stage": str(stage), "state": stage_state(space, stage)}
        if stage.kind == "teach":
            row |= taught(space, stage, tokenizer, there.gpu)
        if stage.kind == "train":
            train = e.models[stage.name].train
            assert train is not None
            spent = cost(space, stage.name, tokenizer)
            row |= {
                "steps": train.steps,
                "tokens": train.steps * train.batch_size * e.sequence_length,
                "flops": train.steps * spent["flops_per_step"],
                "parameters": spent["parameters"],
            }
            if row["state"] != "sealed":
                need = Need(space, stage.name, tokenizer, ranks, there.gpu)
                sequences = engine_config.micro_batch_size(train, ranks, f"models.{stage.name}")
                found = need.at(space.engine_config, sequences)
                row["memory"] = found.device + (0 if there.gpu else found.host)
                lines.append(f"{stage.name}: {verdict(need, sequences, space.engine_config, there)}")
        rows.append(row)
    return rows, lines


def taught(space: Workspace, stage: Stage, tokenizer: TextTokenizer, gpu: bool) -> dict[str, Any]:
    """What storing a teacher's predictions costs."""
    e = space.experiment
    needed = targets_needed(e, stage.name)
    if stage_state(space, Stage("corpus", needed.corpus)) == "sealed":
        needed = space.needed(stage)
    per_entry = 4 if tokenizer.size > 1 << 16 else 3  # before zstd
    config = space.model_config(needed.teacher, tokenizer)
    return {
        "tokens": needed.samples * e.sequence_length,
        "flops": needed.samples * cost(space, needed.teacher, tokenizer)["flops_per_sequence"],
        "bytes": needed.samples * rows_per_sequence(e) * (10 + needed.selection.k * per_entry),
        "memory": memory.inference(config, e.objective, MICRO_BATCH, e.sequence_length, gpu),
    }
