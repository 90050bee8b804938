"""What an engine JSON may not say: what DeepSpeed would ignore, get wrong or raise much later, and what others own."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from ki_ds.engine import low_precision
from ki_ds.errors import UserError, nearest
from ki_ds.launch import distributed

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "scheduler": "train.learning_rate and train.schedule",
}
KNOWN = (
    "fp16", "bf16", "zero_optimization", "torch_autocast", "data_types", "activation_checkpointing", "optimizer",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "comms_logger", "flops_profiler",
    "tensorboard", "wandb", "csv_monitor", "comet", "wall_clock_breakdown", "memory_breakdown", "dump_state", "aio",
    "checkpoint", "timers", "ki_ds",
)  # fmt: skip
OURS = ("ki_ds", "optimizer", "activation_checkpointing")  # read here, and kept from DeepSpeed
FOR_INFERENCE = ("zero_optimization", "aio", "communication_data_type", "comms_logger", "memory_breakdown")
DESCRIPTIONS = {  # DeepSpeed's own of blocks, which name what it does not know
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
FAMILIES = {"AdamW": "adamw", "ApexAdam": "adamw", "ApexLamb": "lamb", "Muon": "muon"}  # type of optimizer: algorithm
NUMBERS = {"lr": "learning_rate", "betas": "betas", "eps": "epsilon", "weight_decay": "weight_decay"}
ONE_BIT = ("OneBitAdam", "OneBitLamb", "ZeroOneAdam")
CHECKPOINTING = (
    "partition_activations", "contiguous_memory_optimization", "number_checkpoints", "cpu_checkpointing",
    "synchronize_checkpoint_boundary", "profile",
)  # fmt: skip
OWN: dict[str, tuple[Any, ...]] = {"layer_norm": ("torch", "apex"), "compile": (True, False)}  # keys of "ki_ds"
SHORT = ("fp32", "bf16", "fp16")
FLOATS = {  # types that a key may name, of the block before it
    ("torch_autocast", "dtype"): (*SHORT, "float32", "bfloat16", "float16"),
    ("data_types", "grad_accum_dtype"): (*SHORT, "float32", "bfloat16", "float16"),
    ("", "communication_data_type"): SHORT,
}
LARGEST = 1e300  # of numbers: what follows computes with floats
NO_RESUME = {  # keys of "checkpoint" with which no checkpoint could be gone on from
    "load_universal": "a checkpoint for other ranks or another ZeRO stage is converted when a run goes on from it",
    "use_node_local_storage": "the nodes of a run share its checkpoints",
}


def check_training(data: Any, source: str) -> None:
    """Refuse JSON data that is no engine JSON for training.

    Raises:
        UserError: naming the key.
    """
    _check_object(data, source)
    if "compile" in data:
        raise UserError(
            f"{source}: compile: DeepSpeed's DeepCompile is not supported, which would trace the loss too; expected "
            '"ki_ds": {"compile": true}, by which torch.compile compiles the layers'
        )
    for key in data:
        if key not in KNOWN and key not in OWNED:
            raise UserError(f"{source}: {key}: unknown key of a DeepSpeed configuration{nearest(key, KNOWN)}")
    for key in ("fp16", "bf16", "zero_optimization"):
        block = data.get(key, {})
        if not isinstance(block, dict) or not isinstance(block.get("enabled", False), bool):
            raise UserError(f'{source}: {key}: found {json.dumps(block)}; expected an object, "enabled" true or false')
        if key != "zero_optimization" and block and "enabled" not in block:
            raise UserError(f'{source}: {key}: "enabled" is missing, so DeepSpeed would ignore the rest')
    stage = data.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"{source}: zero_optimization.stage: found {json.dumps(stage)}; allowed: 0, 1, 2, 3")
    for key, owner in OWNED.items():
        if data.get(key, "auto") != "auto":
            raise UserError(
                f"{source}: {key}: the experiment owns this number ({owner}); leave it out of the engine JSON"
            )
    _check_precision(data, int(stage), source)
    _check_checkpoint(data, source)
    _check_offload(data, int(stage), source)
    _check_descriptions(data, DESCRIPTIONS, source)
    low_precision.check_half_masters(data, source)
    low_precision.check_zero_plus_plus(data, int(stage), source)
    _check_optimizer(data, source)
    _check_activation_checkpointing(data, source)
    _check_own(data, source)


def check_inference(data: Any, source: str, precision: str) -> None:
    """Refuse JSON data that is no engine JSON by which a teacher, computed in `precision`, can be partitioned.

    Raises:
        UserError: naming the key.
    """
    _check_object(data, source)
    for key in data:
        if key in ("fp16", "bf16", "torch_autocast", "amp", "data_types"):
            raise UserError(f"{source}: {key}: inference.precision says this; leave it out of the engine JSON")
        if key not in FOR_INFERENCE:
            raise UserError(
                f"{source}: {key}: not a key for inference; known: {', '.join(FOR_INFERENCE)}"
                f"{nearest(key, FOR_INFERENCE)}"
            )
    zero = data.get("zero_optimization")
    found = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or found != 3:
        raise UserError(f"{source}: zero_optimization.stage: found {json.dumps(found)}; expected 3 for inference")
    for key in (*low_precision.ZERO_PLUS_PLUS, low_precision.SECONDARY):
        if key in zero:
            raise UserError(f"{source}: zero_optimization.{key}: ZeRO++ is for training; leave it out")
    if "offload_optimizer" in zero:
        raise UserError(f"{source}: zero_optimization.offload_optimizer: inference has no optimizer; leave it out")
    offload = zero.get("offload_param", {})
    device = offload.get("device", "none") if isinstance(offload, dict) else None
    if device not in ("none", "cpu", "nvme"):
        raise UserError(
            f"{source}: zero_optimization.offload_param: found {json.dumps(offload)}; expected an object with "
            '"device": "cpu" or "nvme"'
        )
    if device == "nvme" and "nvme_path" not in offload:
        raise UserError(f'{source}: zero_optimization.offload_param: "nvme" needs "nvme_path", a folder')
    if device == "nvme" and precision == "fp32":
        raise UserError(
            f"{source}: zero_optimization.offload_param: DeepSpeed rounds what it keeps on nvme to bf16; expected "
            '"inference": {"precision": "bf16"}, or "device": "cpu"'
        )
    _check_descriptions(data, ["zero_optimization"], source)


def _check_object(data: Any, source: str) -> None:
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected a JSON object, a DeepSpeed configuration")
    for place, number in _numbers(data):
        if not -LARGEST <= number <= LARGEST:
            raise UserError(f"{source}: {place}: found a number beyond {LARGEST:g}; expected a smaller one")


def _numbers(data: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """All numbers within JSON data, and where they stand."""
    if isinstance(data, int | float):
        yield place, data
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield from _numbers(value, f"{place}.{key}" if place else str(key))


def _halves(data: dict[str, Any]) -> list[str]:
    """Which of fp16 and bf16 are enabled."""
    return [name for name in ("fp16", "bf16") if data.get(name, {}).get("enabled")]


def _check_precision(data: dict[str, Any], stage: int, source: str) -> None:
    halves = _halves(data)
    if len(halves) == 2:
        raise UserError(f"{source}: fp16 and bf16 are both enabled; choose one")
    if halves and stage == 0:
        raise UserError(
            f"{source}: {halves[0]} with ZeRO stage 0: DeepSpeed takes a wrong first optimizer step there; "
            'expected "zero_optimization": {"stage": 1} or higher'
        )
    for key in ("torch_autocast", "data_types"):
        if not isinstance(data.get(key, {}), dict):
            raise UserError(f"{source}: {key}: found {json.dumps(data[key])}; expected an object")
    for (block, key), allowed in FLOATS.items():
        found = (data.get(block, {}) if block else data).get(key)
        if found is not None and found not in allowed:
            place = f"{block}.{key}" if block else key
            raise UserError(f"{source}: {place}: found {json.dumps(found)}; allowed: {', '.join(allowed)}")
    autocast = data.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16"):
        raise UserError(
            f"{source}: torch_autocast.dtype: {autocast['dtype']} needs a loss scale, which DeepSpeed does not keep at "
            'every stage; expected "bfloat16", or "fp16": {"enabled": true} in place of torch_autocast'
        )


def _check_checkpoint(data: dict[str, Any], source: str) -> None:
    """Options with which checkpoints are written that cannot be gone on from."""
    block = data.get("checkpoint", {})
    if not isinstance(block, dict):
        raise UserError(f"{source}: checkpoint: found {json.dumps(block)}; expected an object")
    for key, why in NO_RESUME.items():
        if block.get(key):
            raise UserError(f"{source}: checkpoint.{key}: is not supported ({why}); leave it out")


def _check_offload(data: dict[str, Any], stage: int, source: str) -> None:
    """What DeepSpeed would ignore, or get wrong, of offloading."""
    zero = data.get("zero_optimization", {})
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
        if stage < least:
            raise UserError(
                f'{place}: "device": "{device}" with ZeRO stage {stage}; expected "stage": {least}'
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
    if devices["offload_param"] == "nvme" and not _halves(data):
        raise UserError(
            f"{source}: zero_optimization.offload_param to nvme in fp32: DeepSpeed silently stores the parameters in "
            'bf16; expected "bf16": {"enabled": true}, or "device": "cpu"'
        )


def _check_descriptions(data: dict[str, Any], keys: Iterable[str], source: str) -> None:
    """Blocks as DeepSpeed itself describes them: unknown keys and wrong types, which it would raise much later."""
    for key in keys:
        block = data.get(key, {})
        if not isinstance(block, dict):
            raise UserError(f"{source}: {key}: found {json.dumps(block)}; expected an object")
        if not block.keys() - FREE:
            continue
        distributed.quiet()
        module, name = DESCRIPTIONS[key]
        description = getattr(importlib.import_module(module), name)
        try:
            description(**block)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            unknown = first["type"] == "extra_forbidden"
            hint = nearest(str(first["loc"][-1]), description.model_fields) if unknown else ""
            word = "unknown key of DeepSpeed's" + hint if unknown else first["msg"]
            raise UserError(f"{source}: {key}.{place}: {word}") from None
        except (AssertionError, ValueError, TypeError) as error:
            raise UserError(f"{source}: {key}: {error}") from None


def _check_optimizer(data: dict[str, Any], source: str) -> None:
    """An unknown type, or a number that the experiment owns."""
    block = data.get("optimizer", "auto")
    if block == "auto":
        return
    kind, params = (block.get("type"), block.get("params", {})) if isinstance(block, dict) else (None, {})
    if not isinstance(kind, str | None):
        raise UserError(f"{source}: optimizer.type: found {json.dumps(kind)}; expected {', '.join(FAMILIES)}")
    if kind in ONE_BIT:
        raise UserError(
            f"{source}: optimizer.type: {kind}: DeepSpeed 0.19.8 no longer has the 1-bit optimizers; to send gradients "
            'in half the bytes, leave the optimizer out and set "communication_data_type": "bf16"'
        )
    if kind == "Lamb":
        raise UserError(
            f"{source}: optimizer.type: DeepSpeed's Lamb runs in fp16 at ZeRO 0 only, where it takes a wrong first "
            'step; expected the type "ApexLamb", which needs NVIDIA apex'
        )
    if kind not in FAMILIES or not isinstance(params, dict) or block.keys() - {"type", "params"}:
        raise UserError(
            f"{source}: optimizer: found {block}; expected an object with the type {', '.join(FAMILIES)}"
            f"{nearest(str(kind), FAMILIES)}, or none"
        )
    for key, value in params.items():
        if key not in NUMBERS:
            raise UserError(
                f"{source}: optimizer.params.{key}: is not read; expected no parameters beside the type, "
                "as the experiment gives the numbers"
            )
        if value != "auto":
            raise UserError(
                f"{source}: optimizer.params.{key}: the experiment owns this number (train.{NUMBERS[key]}); "
                "leave it out of the engine JSON"
            )
    offload = data.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and kind not in ("AdamW", "Muon"):
        raise UserError(
            f'{source}: optimizer.type: {kind} runs on the GPU only, but offload_optimizer is set; expected "AdamW"'
        )


def _check_activation_checkpointing(data: dict[str, Any], source: str) -> None:
    """An option that is unknown, or that nothing would read."""
    block = data.get("activation_checkpointing", {})
    place = f"{source}: activation_checkpointing"
    if not isinstance(block, dict):
        raise UserError(f"{place}: found {json.dumps(block)}; expected an object, {{}} for the plain kind")
    for key, value in block.items():
        if key not in CHECKPOINTING:
            raise UserError(f"{place}.{key}: unknown option{nearest(key, CHECKPOINTING)}")
        if value:
            raise UserError(
                f"{place}.{key}: is not supported: what is turned on is the model's own checkpointing, "
                "which has no such option; leave it out"
            )


def _check_own(data: dict[str, Any], source: str) -> None:
    """The block of this package."""
    block = data.get("ki_ds", {})
    if not isinstance(block, dict):
        raise UserError(f"{source}: ki_ds: found {json.dumps(block)}; expected an object")
    for key, value in block.items():
        if key not in OWN:
            raise UserError(f"{source}: ki_ds.{key}: unknown key{nearest(key, OWN)}; allowed: {', '.join(OWN)}")
        if not any(value is one or (isinstance(one, str) and value == one) for one in OWN[key]):
            allowed = ", ".join(one if isinstance(one, str) else json.dumps(one) for one in OWN[key])
            raise UserError(f"{source}: ki_ds.{key}: found {json.dumps(value)}; allowed: {allowed}")
    if block.get("compile") and data.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"{source}: ki_ds.compile: with ZeRO stage 3, whose hooks around every layer break the graph into pieces "
            "that are compiled again and again; expected stage 2 or lower, or no compile"
        )
