"""Whether the memory that training a model takes is there; and if not, what would fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ki_ds.engine import config as engine_config
from ki_ds.engine import optimizers
from ki_ds.engine.config import EngineConfig
from ki_ds.experiment.graph import TrainedModel
from ki_ds.experiment.schema import Experiment
from ki_ds.experiment.strict import read_json
from ki_ds.models import architectures
from ki_ds.planning import memory
from ki_ds.planning.activations import Kept, Pass, kept
from ki_ds.planning.costs import rows_per_sequence
from ki_ds.planning.room import GIB, Room
from ki_ds.workspace import SHIPPED

UNTRACED = "which are not estimated: the model's way depends on values, which a plan does not have"
OFFLOAD = ("none", "cpu", "nvme")


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

    def __init__(self, e: Experiment, student: TrainedModel, config: Any, ranks: int, gpu: bool):
        """`config`: its Hugging Face configuration."""
        inherit = student.model.inherit
        self.e, self.train, self.ranks, self.gpu = e, student.train, ranks, gpu
        self.config = copy.deepcopy(config)
        architectures.set_dropout(self.config, student.train.dropout)
        self.k = inherit.targets.selection(inherit.temperature).k if inherit else 0
        self.found: dict[Pass, Kept] = {}

    @cached_property
    def model(self) -> memory.Model:
        return memory.outlined(self.config, self.e.objective, self.train.optimizer)

    def kept(self, engine: EngineConfig, sequences: int) -> Kept:
        """Activations grow by as much with every sequence, so that two sizes tell of all."""
        for count in (1, 2):
            how = Pass.of(count, self.e.sequence_length, engine, self.gpu)
            if how not in self.found:
                self.found[how] = kept(self.config, self.e.objective, how)
        one, two = (self.found[how._replace(sequences=count)] for count in (1, 2))
        grown = (a + (sequences - 1) * (b - a) for a, b in zip(one[:3], two[:3], strict=True))
        return Kept._make((*grown, one.traced and two.traced))

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
    if not need.kept(chosen, sequences).traced:
        said += f" and what its activations take, {UNTRACED}"
    if there.device is None:
        kind = "on GPUs" if there.gpu else "on CPUs"
        return f"{said} {kind}; what is there is not known from here (ask with --memory GIB)"
    if there.holds(found):
        return f"{said}; fits ({there.source})"
    fitting = {name: one for name, one in shipped_engines().items() if optimizers.fits(need.train, one)}
    known = ["fp32", *(half for half in ("fp16", "bf16") if not there.here or engine_config.supported(half))]
    candidates = {name: one for name, one in fitting.items() if one.precision in known and not one.lossy}
    order = in_order(candidates, chosen)
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
