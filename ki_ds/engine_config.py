"""The engine JSON, a DeepSpeed configuration: what is refused, and what it says of a run."""

from __future__ import annotations

import json
from typing import Any

from ki_ds.errors import UserError, nearest
from ki_ds.experiment import Train

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "train.learning_rate, betas, epsilon and weight_decay",
    "scheduler": "train.learning_rate and train.warmup",
}


KNOWN = (
    "fp16", "bf16", "zero_optimization", "torch_autocast", "amp", "data_types", "activation_checkpointing",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "comms_logger",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "aio", "checkpoint", "compile", "timers",
)  # fmt: skip


def check(config: dict[str, Any], source: str) -> None:
    """Refuse an engine JSON that gives a number of the experiment's, or a combination known to be wrong.

    Raises:
        UserError: naming the key.
    """
    for key in config:
        if key not in KNOWN and key not in OWNED:
            raise UserError(f"{source}: {key}: unknown key of a DeepSpeed configuration{nearest(key, KNOWN)}")
    for key in ("fp16", "bf16", "zero_optimization"):
        block = config.get(key, {})
        if not isinstance(block, dict) or not isinstance(block.get("enabled", False), bool):
            raise UserError(f'{source}: {key}: found {json.dumps(block)}; expected an object, "enabled" true or false')
        if key != "zero_optimization" and block and "enabled" not in block:
            raise UserError(f'{source}: {key}: "enabled" is missing, so DeepSpeed would ignore the rest')
    found = config.get("zero_optimization", {}).get("stage", 0)
    if found not in (0, 1, 2, 3):
        raise UserError(f"{source}: zero_optimization.stage: found {json.dumps(found)}; allowed: 0, 1, 2, 3")
    for key in ("offload_optimizer", "offload_param"):
        if config.get("zero_optimization", {}).get(key, {}).get("device", "none") != "none":
            raise UserError(
                f"{source}: zero_optimization.{key}: offload is not supported by this version; leave it out"
            )
    for key, owner in OWNED.items():
        if config.get(key, "auto") != "auto":
            raise UserError(
                f"{source}: {key}: the experiment owns this number ({owner}); leave it out of the engine JSON"
            )
    halves = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
    if len(halves) == 2:
        raise UserError(f"{source}: fp16 and bf16 are both enabled; choose one")
    if halves and stage(config) == 0:
        raise UserError(
            f"{source}: {halves[0]} with ZeRO stage 0: DeepSpeed takes a wrong first optimizer step there; "
            'expected "zero_optimization": {"stage": 1} or higher'
        )
    if halves and not supported(halves[0]):
        others = " or ".join(["fp32", *(name for name in ("bf16", "fp16") if name != halves[0] and supported(name))])
        raise UserError(
            f"{source}: {halves[0]} is not supported by this machine's device; use an engine JSON with {others}"
        )


def supported(half: str) -> bool:
    """Whether DeepSpeed can train in "fp16" or "bf16" on this machine's device."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return bool(device.is_fp16_supported() if half == "fp16" else device.is_bf16_supported())


def stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of an engine JSON."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def precision(config: dict[str, Any]) -> dict[str, Any]:
    """The parts of an engine JSON that decide in which precision is computed."""
    return {name: config[name] for name in ("fp16", "bf16", "torch_autocast", "amp", "data_types") if name in config}


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
