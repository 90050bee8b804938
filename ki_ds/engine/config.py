"""The engine JSON, a DeepSpeed configuration: what is refused, and what it says of a run."""

from __future__ import annotations

import importlib
import json
from typing import Any

from pydantic import ValidationError

from ki_ds.engine import features, optimizers
from ki_ds.errors import UserError, nearest
from ki_ds.experiment.schema import Train
from ki_ds.launch import distributed

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "scheduler": "train.learning_rate and train.warmup",
}

KNOWN = (
    "fp16", "bf16", "zero_optimization", "torch_autocast", "data_types", "activation_checkpointing", "optimizer",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "comms_logger", "flops_profiler",
    "tensorboard", "wandb", "csv_monitor", "comet", "wall_clock_breakdown", "memory_breakdown", "dump_state", "aio",
    "checkpoint", "compile", "timers", "ki_ds",
)  # fmt: skip
OURS = ("ki_ds", "optimizer", "activation_checkpointing")  # read here, and kept from DeepSpeed
MODELS = {  # DeepSpeed's own descriptions of blocks, which name what it does not know
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "tensorboard": ("deepspeed.monitor.config", "TensorBoardConfig"),
    "wandb": ("deepspeed.monitor.config", "WandbConfig"),
    "csv_monitor": ("deepspeed.monitor.config", "CSVConfig"),
    "comet": ("deepspeed.monitor.config", "CometConfig"),
}
FREE = {"stage", "enabled"}  # checked here, without the seconds that importing DeepSpeed takes
OLD_OFFLOAD = {
    "cpu_offload": "offload_optimizer", "cpu_offload_params": "offload_param", "cpu_offload_param": "offload_param",
    "cpu_offload_use_pin_memory": "offload_optimizer",
}  # fmt: skip
UNSUPPORTED = {
    "zenflow": "ZenFlow updates with gradients of earlier steps",
    "legacy_stage1": "DeepSpeed has removed it",
    "elastic_checkpoint": "DeepSpeed has removed it",
}


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
    autocast = config.get("torch_autocast", {})
    if isinstance(autocast, dict) and autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16"):
        raise UserError(
            f"{source}: torch_autocast.dtype: {autocast['dtype']} needs a loss scale, which DeepSpeed does not keep at "
            'every stage; expected "bfloat16", or "fp16": {"enabled": true} in place of torch_autocast'
        )
    _offload(config, source)
    _described(config, source)
    optimizers.check(config, source)
    features.check(config, source)


def check_device(config: dict[str, Any], source: str) -> None:
    """Refuse a precision that this machine's device does not know; for the machines where the ranks run.

    Raises:
        UserError: naming the precisions that it knows.
    """
    half = next((name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")), None)
    if half and not supported(half):
        others = " or ".join(["fp32", *(name for name in ("bf16", "fp16") if name != half and supported(name))])
        raise UserError(f"{source}: {half} is not supported by this machine's device; use an engine JSON with {others}")


def supported(half: str) -> bool:
    """Whether DeepSpeed can train in "fp16" or "bf16" on this machine's device."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return bool(device.is_fp16_supported() if half == "fp16" else device.is_bf16_supported())


def _offload(config: dict[str, Any], source: str) -> None:
    """What DeepSpeed would ignore, or get wrong, of offloading."""
    zero = config.get("zero_optimization", {})
    for key, new in OLD_OFFLOAD.items():
        if key in zero:
            raise UserError(
                f"{source}: zero_optimization.{key}: is DeepSpeed's old name; "
                f'expected "{new}": {{"device": "cpu"}} or nothing'
            )
    for key, why in UNSUPPORTED.items():
        if zero.get(key):
            raise UserError(f"{source}: zero_optimization.{key}: is not supported ({why}); leave it out")
    devices = {}
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        place, block = f"{source}: zero_optimization.{key}", zero.get(key) or {}
        if not isinstance(block, dict) or block.get("device", "none") not in ("none", "cpu", "nvme"):
            raise UserError(f'{place}: found {json.dumps(block)}; expected {{"device": "cpu"}}, "nvme" or "none"')
        device = devices[key] = block.get("device", "none")
        if device == "none":
            continue
        if device == "nvme":
            least = 3
            if not isinstance(block.get("nvme_path"), str):
                raise UserError(f'{place}: "nvme_path", the folder to swap to, is missing')
        if stage(config) < least:
            raise UserError(
                f'{place}: "device": "{device}" with ZeRO stage {stage(config)}; expected "stage": {least}'
                + (" or higher" if least < 3 else "")
            )
        for option, plain in (("ratio", 1.0), ("super_offload", False)):
            if block.get(option, plain) != plain:
                raise UserError(f"{place}.{option}: is not supported by this version; leave it out")
    if devices["offload_param"] != "none" and devices["offload_optimizer"] == "none":
        raise UserError(
            f"{source}: zero_optimization.offload_param without offload_optimizer: the optimizer's larger part "
            'would stay on the GPU; expected "offload_optimizer": {"device": "cpu"} beside it'
        )
    if devices["offload_param"] == "nvme" and not any(config.get(name, {}).get("enabled") for name in ("fp16", "bf16")):
        raise UserError(
            f"{source}: zero_optimization.offload_param to nvme in fp32: DeepSpeed silently stores the parameters in "
            'bf16; expected "bf16": {"enabled": true}, or "device": "cpu"'
        )


def _described(config: dict[str, Any], source: str) -> None:
    """Blocks as DeepSpeed itself describes them: unknown keys and wrong types, which it would raise much later."""
    for key, (module, name) in MODELS.items():
        block = config.get(key, {})
        if not isinstance(block, dict):
            raise UserError(f"{source}: {key}: found {json.dumps(block)}; expected an object")
        if not block.keys() - FREE:
            continue
        distributed.quiet()
        model = getattr(importlib.import_module(module), name)
        try:
            model(**block)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            hint = nearest(str(first["loc"][-1]), model.model_fields) if first["type"] == "extra_forbidden" else ""
            word = "unknown key of DeepSpeed's" + hint if hint or first["type"] == "extra_forbidden" else first["msg"]
            raise UserError(f"{source}: {key}.{place}: {word}") from None
        except (AssertionError, ValueError, TypeError) as error:
            raise UserError(f"{source}: {key}: {error}") from None


def for_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    """The engine JSON without what the experiment gives, and without what is read here."""
    return {key: value for key, value in config.items() if key not in OWNED and key not in OURS}


def stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of an engine JSON."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def precision(config: dict[str, Any]) -> dict[str, Any]:
    """The parts of an engine JSON that decide in which precision is computed."""
    names = ("fp16", "bf16", "torch_autocast", "data_types", "communication_data_type")
    zero = config.get("zero_optimization", {})
    quantized = {name: True for name in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(name)}
    return {name: config[name] for name in names if name in config} | quantized


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
