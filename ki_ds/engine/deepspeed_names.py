"""Names of DeepSpeed that it does not promise to keep, and that this package leans on; a test looks for each of them.

They are why setup.cfg holds DeepSpeed below the next minor version (docs/engine.md). Raising that bound begins here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class PrivateName(NamedTuple):
    """One of DeepSpeed's names. `kind`: "attribute" of a module or of a class in it; "instance": set by a class on its
    instances; "text": in a module's source, such as a file name or an option."""

    module: str  # beneath deepspeed
    name: str  # dotted
    kind: Literal["attribute", "instance", "text"]
    purpose: str


_STAGE_1_2, _STAGE_3 = "runtime.zero.stage_1_and_2", "runtime.zero.stage3"
_ZERO = ((_STAGE_1_2, "DeepSpeedZeroOptimizer"), (_STAGE_3, "DeepSpeedZeroOptimizer_Stage3"))
_FP16 = "runtime.fp16.loss_scaler"
_BLOCKS = (
    ("runtime.zero.config", "DeepSpeedZeroConfig"),
    ("runtime.precision_config", "DeepSpeedFP16Config"),
    ("runtime.precision_config", "DeepSpeedBF16Config"),
    *(("monitor.config", name) for name in ("TensorBoardConfig", "WandbConfig", "CSVConfig", "CometConfig")),
)
_MUON = "runtime.zero.muon"
_COMPILED = ("muon_update", "zeropower_via_gram_newtonschulz", "zeropower_via_newtonschulz5")
_BUILDERS = ("CPUAdamBuilder", "FusedAdamBuilder", "AsyncIOBuilder", "PinMemoryBuilder", "QuantizerBuilder")

NAMES: tuple[PrivateName, ...] = (
    # engine/refusals.py
    *(PrivateName(module, name, "attribute", "describes a block of the engine JSON") for module, name in _BLOCKS),
    # engine/engine.py
    PrivateName(_STAGE_1_2, "DeepSpeedZeroOptimizer.check_grad_overflow", "instance", "fp32 steps are checked too"),
    PrivateName("runtime.engine", "DeepSpeedEngine.was_step_applied", "attribute", "whether a step was skipped"),
    PrivateName("runtime.engine", "DeepSpeedEngine.get_global_grad_norm", "attribute", "the norm before clipping"),
    PrivateName("runtime.engine", "DeepSpeedEngine.zero_optimization_stage", "attribute", "checkpoints, exports"),
    PrivateName("runtime.engine", "DeepSpeedEngine.monitor", "instance", "gets a step's numbers"),
    PrivateName("runtime.engine", "DeepSpeedEngine.global_samples", "instance", "the monitors' axis"),
    PrivateName("runtime.engine", "self.optimizer.overflow", "text", "at ZeRO 0, ClippedOptimizer says so"),
    # engine/muon.py
    PrivateName(f"{_MUON}.muon_optimizer", "MuonWithAuxAdam", "attribute", "the optimizer, with an AdamW of ours"),
    *(PrivateName(f"{_MUON}.original_muon", name, "attribute", "is not to be compiled") for name in _COMPILED),
    *(PrivateName(module, "'use_muon'", "text", "marks Muon's parameters") for module, _ in _ZERO),
    PrivateName(_STAGE_3, "Muon and reduce scatter cannot be used together", "text", "it is turned off"),
    # engine/loss_scale.py
    *(PrivateName(module, f"{name}._update_scale", "attribute", "the scale moves later") for module, name in _ZERO),
    *(PrivateName(module, f"{name}.loss_scaler", "instance", "the scale itself") for module, name in _ZERO),
    PrivateName(_FP16, "LossScalerBase.loss_scale", "attribute", "its value"),
    PrivateName(_FP16, "LossScalerBase.dynamic", "instance", "whether it moves"),
    PrivateName(_FP16, "DynamicLossScaler.update_scale", "attribute", "moves it"),
    PrivateName(_FP16, "DynamicLossScaler.min_scale", "instance", "how far overflows lower it"),
    PrivateName(_FP16, "DynamicLossScaler.raise_error_at_min_scale", "instance", "the lowest scale ends no run"),
    # engine/ops.py
    PrivateName("accelerator.abstract_accelerator", "DeepSpeedAccelerator.create_op_builder", "attribute", "compiles"),
    PrivateName("ops.op_builder.builder", "OpBuilder.name", "instance", "the folder of what is compiled"),
    PrivateName("ops.op_builder.builder", "OpBuilder.load", "attribute", "compiles and loads"),
    PrivateName("ops.op_builder.cpu.no_impl", "NotImplementedBuilder", "attribute", "an operator that a CPU lacks"),
    *(PrivateName("ops.op_builder", name, "attribute", "is compiled when it is needed") for name in _BUILDERS),
    # engine/checkpoints.py
    PrivateName("runtime.engine", "zero_pp_rank_", "text", "which rank wrote a file"),
    PrivateName("runtime.engine", "offloaded_tensors", "text", "likewise, of what lies on NVMe"),
    # engine/universal.py
    PrivateName("checkpoint.ds_to_universal", "--inject_missing_state", "text", "runs as a program, with this option"),
    PrivateName("checkpoint.ds_to_universal", "latest_universal", "text", "is removed afterwards"),
    PrivateName("checkpoint.ds_to_universal", "optimizer_state.pt", "text", "the settings beside the states"),
    PrivateName("checkpoint.constants", "CAT_DIM", "attribute", "the key is written here too"),
    *(
        PrivateName(module, f"{name}.load_state_dict", "attribute", "loads what was converted")
        for module, name in _ZERO
    ),
    PrivateName(_STAGE_1_2, "DeepSpeedZeroOptimizer.update_lp_params", "attribute", "weights from loaded masters"),
    PrivateName(_STAGE_3, "DeepSpeedZeroOptimizer_Stage3.checkpoint_event_prologue", "attribute", "around a loading"),
    PrivateName(_STAGE_3, "DeepSpeedZeroOptimizer_Stage3.checkpoint_event_epilogue", "attribute", "around a loading"),
    PrivateName(_STAGE_3, "DeepSpeedZeroOptimizer_Stage3.swap_optimizer", "instance", "states on NVMe: refused"),
    # models/partitioned.py
    PrivateName("runtime.zero.partition_parameters", "param.ds_shape", "text", "whole shape of a partitioned weight"),
    PrivateName("runtime.zero.partition_parameters", "param.ds_id", "text", "whether a weight is partitioned"),
    # teaching/checks.py
    PrivateName("module_inject.auto_tp", "AutoTP.tp_parser", "attribute", "whether a model can be cut"),
    # teaching/teacher.py
    PrivateName("inference.engine", "self.mpu.get_model_parallel_group()", "text", "all that is asked of `mpu`"),
    # launch/
    PrivateName("launcher.runner", "main", "attribute", "runs as a program, python -m"),
    PrivateName("ops", "__compatible_ops__", "attribute", "turns deepspeed_shm_comm off, which would be compiled"),
    PrivateName("ops.op_builder.all_ops", "ALL_OPS", "attribute", "what ki-ds doctor lists"),
)
