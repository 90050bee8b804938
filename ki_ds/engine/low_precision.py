"""What an engine JSON may not say of ZeRO++ (Wang et al. 2023) and of master weights in half precision.

ZeRO++: a second copy of the weights within a node (hpZ), and what is sent in fewer bits, weights in 8, gradients in 4.
What is refused was read from DeepSpeed 0.19.8.
"""

from __future__ import annotations

import json
from typing import Any

from ki_ds.errors import UserError

HALF_MASTERS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
ZERO_PLUS_PLUS = ("zero_quantized_weights", "zero_quantized_gradients")
SECONDARY = "zero_hpz_partition_size"


def check_half_masters(data: dict[str, Any], source: str) -> None:
    """Master weights in half precision: those combinations alone that DeepSpeed runs without its CPUAdam.

    Raises:
        UserError: naming the key.
    """
    if data.get("fp16", {}).get("fp16_master_weights_and_grads"):
        raise UserError(
            f"{source}: fp16.fp16_master_weights_and_grads: is not supported; leave it out, or use bf16 with "
            "bf16_master_weights_and_grads and bf16_optimizer_states"
        )
    block = data.get("bf16", {})
    chosen = [key for key in HALF_MASTERS if block.get(key)]
    if not chosen:
        return
    if len(chosen) < len(HALF_MASTERS):
        raise UserError(f"{source}: bf16.{chosen[0]}: expected {' and '.join(HALF_MASTERS)} together, or neither")
    zero = data.get("zero_optimization", {})
    if any((zero.get(key) or {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")):
        raise UserError(f"{source}: bf16.{chosen[0]} with offload is not supported; leave one of them out")
    if data.get("data_types", {}).get("grad_accum_dtype") not in (None, "bf16", "bfloat16"):
        raise UserError(
            f"{source}: bf16.{chosen[0]} with data_types.grad_accum_dtype: gradients are accumulated in bf16 then; "
            "leave one of them out"
        )
    if data.get("optimizer", "auto") != "auto":
        raise UserError(f"{source}: bf16.{chosen[0]} is for torch's AdamW; leave it or the optimizer out")


def check_zero_plus_plus(data: dict[str, Any], stage: int, source: str) -> None:
    """What DeepSpeed would ignore, or get wrong, of ZeRO++.

    Raises:
        UserError: naming the key.
    """
    zero = data.get("zero_optimization", {})
    if zero.get("zero_quantized_nontrainable_weights"):
        raise UserError(
            f"{source}: zero_optimization.zero_quantized_nontrainable_weights: every weight is trained here; "
            "leave it out"
        )
    hpz = zero.get(SECONDARY, "auto")
    hpz = 1 if hpz == "auto" else hpz
    if type(hpz) is not int or hpz < 1:
        raise UserError(
            f"{source}: zero_optimization.{SECONDARY}: found {json.dumps(hpz)}; expected the number of "
            "ranks that share a second copy of the weights, such as the GPUs of a node"
        )
    given = [key for key in ZERO_PLUS_PLUS if zero.get(key)] + ([SECONDARY] if hpz > 1 else [])
    if given and stage != 3:
        raise UserError(
            f"{source}: zero_optimization.{given[0]}: DeepSpeed would ignore it at stage {stage}; expected "
            '"stage": 3, or leave it out'
        )
    if hpz > 1 and (zero.get("offload_param") or {}).get("device") == "nvme":
        raise UserError(
            f"{source}: zero_optimization.{SECONDARY}: DeepSpeed keeps no second copy beside weights on nvme; "
            "leave one of them out"
        )
    if "zero_quantized_weights" in given and data.get("torch_autocast", {}).get("enabled"):
        raise UserError(
            f"{source}: zero_optimization.zero_quantized_weights: DeepSpeed refuses it beside torch_autocast; leave "
            "one of them out"
        )
    if "zero_quantized_gradients" in given:
        # sent as fp16, bf16's gradients would be read rightly, but small ones would vanish: there is no loss scale
        half = data.get("fp16", {}).get("enabled") and data.get("communication_data_type", "fp16") == "fp16"
        if not half:
            raise UserError(
                f"{source}: zero_optimization.zero_quantized_gradients: DeepSpeed's kernel takes all gradients for "
                'fp16 and would read others wrongly; expected "fp16": {"enabled": true}, and no other '
                "communication_data_type"
            )
        if zero.get("reduce_scatter") is False:
            raise UserError(
                f"{source}: zero_optimization.reduce_scatter: found false with zero_quantized_gradients; expected true"
            )
