"""The engine JSON, a DeepSpeed configuration: read once, into what the rest of the package asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

import torch

from ki_ds.engine import refusals
from ki_ds.engine.low_precision import HALF_MASTERS, SECONDARY, ZERO_PLUS_PLUS
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Train

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["none", "cpu", "nvme"]
# what changes rounding, and with it the identity of what is trained
ROUNDING = ("fp16", "bf16", "torch_autocast", "data_types", "communication_data_type")
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


@dataclass(frozen=True)
class Offload:
    """Where something is kept that leaves the GPU: host memory ("cpu"), NVMe, or "none": it stays."""

    device: Device = "none"
    nvme_path: str = ""  # the folder to swap to

    @property
    def active(self) -> bool:
        return self.device != "none"


@dataclass(frozen=True)
class OptimizerOffload(Offload):
    """Of the master weights and the optimizer's moments."""

    buffer_count: int = 4  # NVMe buffers in host memory


@dataclass(frozen=True)
class ParameterOffload(Offload):
    """Of the weights, at ZeRO 3."""

    buffer_count: int = 5  # NVMe buffers in host memory
    buffer_size: float = 1e8  # elements
    max_in_cpu: float = 1e9  # elements that stay in host memory beside NVMe


AnyOffload = TypeVar("AnyOffload", bound=Offload)


@dataclass(frozen=True, kw_only=True)
class _DeepSpeedJson:
    """What the engine JSONs of training and of inference share."""

    source: str = "engine"  # where it comes from, for errors
    precision: Precision = "fp32"
    zero_stage: int = 0
    raw: Mapping[str, Any] = field(default_factory=dict, hash=False)  # the JSON as it was given


@dataclass(frozen=True, kw_only=True)
class EngineConfig(_DeepSpeedJson):
    """The engine JSON of training. Defaults are DeepSpeed's; sizes are in elements."""

    autocast: str | None = None  # the type that torch_autocast computes products in
    accumulation: str | None = None  # the type that gradients are accumulated in; None: that of the weights
    offload_optimizer: OptimizerOffload = OptimizerOffload()
    offload_parameters: ParameterOffload = ParameterOffload()
    reduce_bucket_size: float = 5e8
    overlap_comm: bool = False
    max_live_parameters: float = 1e9  # ZeRO 3: of gathered weights
    param_persistence_threshold: float = 1e5  # ZeRO 3: smaller weights are left whole
    sub_group_size: float = 1e9  # ZeRO 3: what is stepped at once
    quantized: tuple[str, ...] = ()  # keys of ZeRO++ that are set: weights, gradients
    secondary_ranks: int = 1  # ZeRO++: ranks that share a second copy of the weights (hpZ); 1: there is none
    half_states: bool = False  # master weights and the optimizer's moments in bf16
    optimizer: str | None = None  # the type of the implementation; None: the default
    activation_checkpointing: bool = False
    layer_norm: Literal["torch", "apex"] = "torch"
    compiled: bool = False  # the backbone, by torch.compile
    monitors: tuple[str, ...] = ()  # blocks that are enabled

    @classmethod
    def read(cls, data: Any, source: str) -> EngineConfig:
        """Of JSON data; "auto" counts as not given.

        Raises:
            UserError: naming the key: it is unknown, gives a number of the experiment's, or a combination that is
                known to be wrong.
        """
        refusals.check_training(data, source)
        zero, autocast = _given(data, "zero_optimization"), _given(data, "torch_autocast")
        return cls(
            source=source,
            raw=data,
            precision="fp16" if _enabled(data, "fp16") else "bf16" if _enabled(data, "bf16") else "fp32",
            zero_stage=int(zero.get("stage", 0)),
            autocast=autocast.get("dtype", "bfloat16") if autocast.get("enabled") else None,
            accumulation=_given(data, "data_types").get("grad_accum_dtype"),
            offload_optimizer=_offload(OptimizerOffload, _given(zero, "offload_optimizer")),
            offload_parameters=_offload(ParameterOffload, _given(zero, "offload_param")),
            reduce_bucket_size=float(zero.get("reduce_bucket_size", cls.reduce_bucket_size)),
            overlap_comm=bool(zero.get("overlap_comm", cls.overlap_comm)),
            max_live_parameters=float(zero.get("stage3_max_live_parameters", cls.max_live_parameters)),
            param_persistence_threshold=float(
                zero.get("stage3_param_persistence_threshold", cls.param_persistence_threshold)
            ),
            sub_group_size=float(zero.get("sub_group_size", cls.sub_group_size)),
            quantized=tuple(key for key in ZERO_PLUS_PLUS if zero.get(key)),
            secondary_ranks=int(zero.get(SECONDARY, 1)),
            half_states=_enabled(data, "bf16") and bool(data["bf16"].get(HALF_MASTERS[0])),
            optimizer=_given(data, "optimizer").get("type"),
            activation_checkpointing="activation_checkpointing" in data,
            layer_norm=_given(data, "ki_ds").get("layer_norm", cls.layer_norm),
            compiled=bool(_given(data, "ki_ds").get("compile")),
            monitors=tuple(name for name in MONITORS if _enabled(data, name)),
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of hidden states and logits."""
        half = self.precision != "fp32" or self.autocast
        return (torch.float16 if self.precision == "fp16" else torch.bfloat16) if half else torch.float32

    @property
    def lossy(self) -> bool:
        """Whether it saves memory or communication by rounding what other engine JSONs of its precision do not."""
        return bool(self.quantized) or self.half_states

    @property
    def for_deepspeed(self) -> dict[str, Any]:
        """The JSON without what the experiment gives, and without what is read here."""
        ours = (*refusals.OWNED, *refusals.OURS)
        return {key: value for key, value in self.raw.items() if key not in ours}

    @property
    def precision_record(self) -> dict[str, Any]:
        """The parts of the JSON that decide in which precision is computed, as they are written; for the identity."""
        more = (*self.quantized, *(["compile"] if self.compiled else []))
        return {key: self.raw[key] for key in ROUNDING if key in self.raw} | dict.fromkeys(more, True)


@dataclass(frozen=True, kw_only=True)
class InferenceEngineConfig(_DeepSpeedJson):
    """The engine JSON by which a teacher is partitioned over all ranks (ZeRO 3)."""

    @classmethod
    def read(cls, data: Any, source: str, precision: Precision) -> InferenceEngineConfig:
        """Of JSON data; the precision is the experiment's.

        Raises:
            UserError: naming the key.
        """
        refusals.check_inference(data, source, precision)
        return cls(source=source, raw=data, zero_stage=3, precision=precision)

    @property
    def for_deepspeed(self) -> dict[str, Any]:
        """The JSON with the precision, and with a batch size, which DeepSpeed demands."""
        half: dict[str, Any] = {} if self.precision == "fp32" else {self.precision: {"enabled": True}}
        return {**self.raw, **half, "train_micro_batch_size_per_gpu": 1}


def _given(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A block without what is "auto"; empty where there is none."""
    block = data.get(key)
    return {name: value for name, value in block.items() if value != "auto"} if isinstance(block, dict) else {}


def _enabled(data: Mapping[str, Any], key: str) -> bool:
    return bool(_given(data, key).get("enabled"))


def _offload(kind: type[AnyOffload], block: dict[str, Any]) -> AnyOffload:
    """Of a block of `zero_optimization`; null counts as not given."""
    types: dict[str, Any] = {one.name: type(one.default) for one in fields(kind)}
    return kind(**{name: plain(block[name]) for name, plain in types.items() if block.get(name) is not None})


# ------------------------------------------------------------------------------------------------ the machine


def check_device(config: EngineConfig) -> None:
    """Refuse a precision that this machine's device does not know; for the machines where the ranks run.

    Raises:
        UserError: naming the precisions that it knows.
    """
    half = config.precision
    if half != "fp32" and not supported(half):
        others = " or ".join(["fp32", *(name for name in ("bf16", "fp16") if name != half and supported(name))])
        raise UserError(
            f"{config.source}: {half} is not supported by this machine's device; use an engine JSON with {others}"
        )


def check_ranks(config: EngineConfig, ranks: int) -> None:
    """Refuse a number of ranks that ZeRO++'s second copies cannot be divided among.

    Raises:
        UserError: naming the key.
    """
    shared = config.secondary_ranks
    if ranks % shared:
        raise UserError(
            f"{config.source}: zero_optimization.zero_hpz_partition_size: {shared} does not divide the {ranks} "
            f"process{'es' if ranks > 1 else ''}; expected the ranks of a node, or another --processes"
        )


def supported(half: str) -> bool:
    """Whether DeepSpeed can train in "fp16" or "bf16" on this machine's device."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return bool(device.is_fp16_supported() if half == "fp16" else device.is_bf16_supported())


def micro_batch_size(train: Train, world_size: int, place: str) -> int:
    """Sequences a rank computes at once: as given, or the largest divisor of its share up to 32.

    Raises:
        UserError: the world size, or the micro-batch size, does not divide the batch.
    """
    if train.batch_size % world_size:
        raise UserError(
            f"{place}.train.batch_size: {train.batch_size} cannot be divided among {world_size} processes; "
            f"expected a multiple of {world_size}, or another --processes"
        )
    share = train.batch_size // world_size
    if train.micro_batch_size is None:
        return next(size for size in range(min(32, share), 0, -1) if share % size == 0)
    if share % train.micro_batch_size:
        raise UserError(
            f"{place}.train.micro_batch_size: {train.micro_batch_size} does not divide a process's share of the batch, "
            f"{share} ({train.batch_size} sequences over {world_size} processes)"
        )
    return train.micro_batch_size
