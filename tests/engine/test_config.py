"""The engine JSON: what is refused, and how a batch is cut."""

import json
from pathlib import Path

import pytest
from helpers.engines import settings

from ki_ds.engine import config as engine_config
from ki_ds.engine.config import EngineConfig, InferenceEngineConfig, Offload, OptimizerOffload, ParameterOffload
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Train


def zero(stage, **more):
    return {"zero_optimization": {"stage": stage, **more}}


CPU = {"device": "cpu"}
NVME = {"device": "nvme", "nvme_path": "/tmp"}
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size: the experiment owns"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping: the experiment owns.*train\.gradient_clipping"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: the experiment owns"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        (BF16, "ZeRO stage 0"),
        (["bf16"], "engine.json: expected a JSON object, a DeepSpeed configuration"),
        ({"torch_autocast": True}, "torch_autocast: found true; expected an object"),
        ({"data_types": "fp32"}, 'data_types: found "fp32"; expected an object'),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, 'float16 needs a loss scale.*expected "bfloat16"'),
        ({"torch_autocast": {"enabled": True, "dtype": []}}, r"torch_autocast\.dtype: found \[\]; allowed: fp32"),
        ({"data_types": {"grad_accum_dtype": {}}}, r"data_types\.grad_accum_dtype: found \{\}; allowed: fp32"),
        ({"communication_data_type": "half"}, 'communication_data_type: found "half"; allowed: fp32, bf16, fp16'),
        (zero(1, reduce_bucket_size=10**400), r"zero_optimization\.reduce_bucket_size: found a number beyond 1e\+300"),
        ({"checkpoint": {"load_universal": True}}, r"checkpoint\.load_universal: is not supported .*leave it out"),
        ({"checkpoint": {"use_node_local_storage": True}}, r"checkpoint\.use_node_local_storage: is not supported"),
        ({"checkpoint": []}, r"checkpoint: found \[\]; expected an object"),
        ({"optimizer": {"type": ["AdamW"]}}, r'optimizer\.type: found \["AdamW"\]; expected AdamW'),
        ({"zero_optimisation": {"stage": 3}}, 'unknown key.*did you mean "zero_optimization"'),
        ({"amp": {"enabled": True}}, "amp: unknown key"),
        ({"fp16": True}, "fp16: found true; expected an object"),
        ({"bf16": {"enable": True}}, '"enabled" is missing'),
        (zero(7), "stage: found 7; allowed: 0, 1, 2, 3"),
        (zero(2, overlap_com=True), r"zero_optimization\.overlap_com: unknown.*did you mean \"overlap_comm\""),
        (zero(2, reduce_bucket_size="big"), r"zero_optimization\.reduce_bucket_size: .*integer"),
        ({"csv_monitor": {"enabled": True, "path": "x"}}, r"csv_monitor\.path: unknown key"),
        ({"wandb": True}, "wandb: found true; expected an object"),
        # the optimizer
        ({"optimizer": {"type": "Adam"}}, 'optimizer: found .*did you mean "AdamW"'),
        ({"optimizer": {"params": {}}}, "optimizer: found .*expected an object with the type"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, r"params\.lr: the experiment owns.*learning_rate"),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, r"params\.adam_w_mode: is not read"),
        (
            {"optimizer": {"type": "OneBitAdam"}},
            r"OneBitAdam: DeepSpeed 0\.19\.8 no longer.*communication_data_type",
        ),
        ({"optimizer": {"type": "Lamb"}}, "DeepSpeed's Lamb runs in fp16 at ZeRO 0 only"),
        ({"optimizer": {"type": "ApexAdam"}, **zero(2, offload_optimizer=CPU)}, "ApexAdam runs on the GPU only"),
        # offload
        (zero(0, offload_optimizer=CPU), '"device": "cpu" with ZeRO stage 0; expected "stage": 1 or higher'),
        (zero(2, offload_optimizer=CPU, offload_param=CPU), 'offload_param: .*ZeRO stage 2; expected "stage": 3'),
        (zero(3, offload_param=CPU), "offload_param without offload_optimizer"),
        (zero(2, offload_optimizer=NVME), '"device": "nvme" with ZeRO stage 2; expected "stage": 3'),
        (zero(3, offload_optimizer={"device": "nvme"}), '"nvme_path", the folder to swap to, is missing'),
        (zero(3, offload_optimizer=CPU, offload_param=NVME), "nvme in fp32: DeepSpeed silently stores .*bf16"),
        (zero(2, offload_optimizer={"device": "disk"}), 'offload_optimizer: found .*expected {"device": "cpu"}'),
        (zero(2, offload_optimizer="cpu"), 'offload_optimizer: found "cpu"; expected'),
        (zero(3, offload_optimizer={**CPU, "ratio": 0.5}), r"offload_optimizer\.ratio: is not supported"),
        (zero(2, offload_optimizer={**CPU, "pin_memry": True}), r"offload_optimizer\.pin_memry: unknown key"),
        (zero(2, cpu_offload=True), r"cpu_offload: is DeepSpeed's old name; expected \"offload_optimizer\""),
        (zero(2, zenflow={"topk_ratio": 0.1}), "zenflow: is not supported"),
        # activation checkpointing, and our own block
        ({"activation_checkpointing": True}, "activation_checkpointing: found true; expected an object"),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, 'unknown option; did you mean "cpu_checkpointing"'),
        ({"activation_checkpointing": {"partition_activations": True}}, "partition_activations: is not supported"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "cpu_checkpointing: is not supported"),
        ({"ki_ds": {"layernorm": "apex"}}, 'ki_ds.layernorm: unknown key; did you mean "layer_norm"'),
        ({"ki_ds": {"layer_norm": "Apex"}}, 'layer_norm: found "Apex"; allowed: torch, apex'),
        ({"ki_ds": {"layer_norm": True}}, "layer_norm: found true; allowed: torch, apex"),
        ({"ki_ds": {"compile": 1}}, "ki_ds.compile: found 1; allowed: true, false"),
        (
            {"ki_ds": {"compile": True}, "zero_optimization": {"stage": 3}},
            "ki_ds.compile: with ZeRO stage 3",
        ),
        ({"compile": {"deepcompile": True}}, 'compile: DeepSpeed\'s DeepCompile is not supported.*expected.*"ki_ds"'),
    ],
)
def test_engine_json_that_cannot_be_meant_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        EngineConfig.read(config, "engine.json")


@pytest.mark.parametrize(
    "config",
    [
        {"train_batch_size": "auto", **zero(2)},
        {"optimizer": "auto"},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}}, **zero(1)},
        zero(1, offload_optimizer=CPU),
        zero(3, offload_optimizer={**CPU, "pin_memory": False}, offload_param=CPU),
        zero(2, offload_optimizer={"device": "none"}, offload_param=None),
        zero(3, offload_optimizer=NVME),
        {**BF16, **zero(3, offload_optimizer=NVME, offload_param=NVME)},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"ki_ds": {"layer_norm": "torch"}},
    ],
)
def test_engine_json_that_is_accepted(config):
    assert EngineConfig.read(config, "engine.json").raw == config


def test_every_engine_json_of_the_package_is_accepted():
    files = sorted(Path("ds_configs/engine").glob("*.json"))
    assert len(files) >= 10
    for file in files:
        EngineConfig.read(json.loads(file.read_text()), str(file))


def test_what_an_engine_json_says():
    """Blocks that are not enabled say nothing, "auto" is not given, and null is none."""
    read = EngineConfig.read
    assert read({}, "engine.json") == EngineConfig(source="engine.json")
    sizes = {
        "reduce_bucket_size": 1000,
        "stage3_max_live_parameters": "auto",
        "stage3_param_persistence_threshold": 0,
        "offload_param": {**NVME, "max_in_cpu": 0, "buffer_size": "auto"},
        "offload_optimizer": {**NVME, "buffer_count": 5},
    }
    found = read(
        BF16 | zero(3, **sizes) | {"fp16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}}, "e.json"
    )
    assert (found.source, found.zero_stage, found.precision, found.accumulation) == ("e.json", 3, "bf16", "fp32")
    assert (found.reduce_bucket_size, found.max_live_parameters) == (1000, 1e9)
    assert (found.param_persistence_threshold, found.sub_group_size) == (0, 1e9)
    assert found.offload_optimizer == OptimizerOffload("nvme", "/tmp", buffer_count=5)
    assert found.offload_parameters == ParameterOffload("nvme", "/tmp", 5, buffer_size=1e8, max_in_cpu=0)
    plain = read(zero(2, offload_optimizer=None, offload_param={"device": "none"}, overlap_comm=True), "e.json")
    assert not plain.offload_optimizer.active and not plain.offload_parameters.active and plain.overlap_comm
    more = read(
        {
            "torch_autocast": {"enabled": True},
            "optimizer": {"type": "ApexAdam"},
            "ki_ds": {"layer_norm": "apex"},
            "activation_checkpointing": {},
            "csv_monitor": {"enabled": True},
            "wandb": {"enabled": False},
        },
        "e.json",
    )
    assert (more.autocast, more.optimizer, more.layer_norm) == ("bfloat16", "ApexAdam", "apex")
    assert (more.activation_checkpointing, more.monitors) == (True, ("csv_monitor",))
    assert hash(more) and Offload("cpu").active


def test_deepspeed_is_given_what_is_its_own():
    given = {"optimizer": {"type": "AdamW"}, "ki_ds": {}, "activation_checkpointing": {}, "train_batch_size": "auto"}
    assert EngineConfig.read(given | zero(2), "engine.json").for_deepspeed == zero(2)


def test_a_teachers_engine_json_is_read():
    """With the experiment's precision; the keys of its block are those that DeepSpeed knows."""
    found = InferenceEngineConfig.read(zero(3, offload_param=CPU), "engine.json", "bf16")
    assert (found.source, found.zero_stage, found.precision) == ("engine.json", 3, "bf16")
    assert found.for_deepspeed == zero(3, offload_param=CPU) | BF16 | {"train_micro_batch_size_per_gpu": 1}
    whole = InferenceEngineConfig.read(zero(3), "engine.json", "fp32")
    assert whole.for_deepspeed == zero(3) | {"train_micro_batch_size_per_gpu": 1}
    with pytest.raises(UserError, match=r"zero_optimization\.stage3_max_live_parameter: unknown key"):
        InferenceEngineConfig.read(zero(3, stage3_max_live_parameter=1), "engine.json", "fp32")
    with pytest.raises(UserError, match=r"engine\.json: expected a JSON object, a DeepSpeed configuration"):
        InferenceEngineConfig.read([], "engine.json", "fp32")


def test_precision_is_what_changes_rounding_and_nothing_else():
    """Offload and communication settings that change no number do not change a model's identity."""

    def record(config):
        return EngineConfig.read(config, "engine.json").precision_record

    assert record(BF16 | zero(3, offload_optimizer=CPU)) == BF16
    half = {"fp16": {"enabled": True}, "communication_data_type": "fp16"}
    assert record(half | zero(3, zero_quantized_gradients=True)) == {**half, "zero_quantized_gradients": True}


@pytest.mark.parametrize(
    ("wanted", "device", "message"),
    [
        ("fp16", [], "fp16 is not supported by this machine's device; use an engine JSON with fp32$"),
        ("fp16", ["bf16"], "fp16 is not supported.*with fp32 or bf16$"),
        ("bf16", ["fp16"], "bf16 is not supported.*with fp32 or fp16$"),
    ],
)
def test_a_precision_that_the_device_lacks_names_those_it_has(wanted, device, message, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    for half in ("fp16", "bf16"):
        monkeypatch.setattr(get_accelerator(), f"is_{half}_supported", lambda half=half: half in device)
    for half in device:
        engine_config.check_device(EngineConfig.read({half: {"enabled": True}, **zero(1)}, "engine.json"))
    with pytest.raises(UserError, match=message):
        engine_config.check_device(EngineConfig.read({wanted: {"enabled": True}, **zero(1)}, "engine.json"))


def test_batch_that_the_ranks_do_not_divide():
    with pytest.raises(UserError, match=r"models.m.train.batch_size: 4 cannot be divided among 3 processes"):
        engine_config.micro_batch_size(settings(), 3, "models.m")
    with pytest.raises(UserError, match="micro_batch_size: 2 does not divide"):
        engine_config.micro_batch_size(settings(), 4, "models.m")
    wide = Train(on={"a": 1.0}, steps=1, batch_size=96, learning_rate=1e-3)
    assert [engine_config.micro_batch_size(wide, n, "m") for n in (1, 2, 3, 32)] == [32, 24, 32, 3]
