"""The engine JSON: what is refused, and how a batch is cut."""

import pytest
from small_engines import settings

from ki_ds import engine_config
from ki_ds.errors import UserError
from ki_ds.experiment import Train


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size: the experiment owns"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: the experiment owns"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        ({"bf16": {"enabled": True}}, "ZeRO stage 0"),
        ({"zero_optimisation": {"stage": 3}}, 'unknown key.*did you mean "zero_optimization"'),
        ({"fp16": True}, "fp16: found true; expected an object"),
        ({"bf16": {"enable": True}}, '"enabled" is missing'),
        ({"zero_optimization": {"stage": 7}}, "stage: found 7; allowed: 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload is not supported"),
    ],
)
def test_engine_json_that_cannot_be_meant_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        engine_config.check(config, "engine.json")
    engine_config.check({"train_batch_size": "auto", "zero_optimization": {"stage": 2}}, "engine.json")


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
        engine_config.check({half: {"enabled": True}, "zero_optimization": {"stage": 1}}, "engine.json")
    with pytest.raises(UserError, match=message):
        engine_config.check({wanted: {"enabled": True}, "zero_optimization": {"stage": 1}}, "engine.json")


def test_batch_that_the_ranks_do_not_divide():
    with pytest.raises(UserError, match=r"models.m.train.batch_size: 4 cannot be divided among 3 processes"):
        engine_config.micro_batch_size(settings(), 3, "models.m")
    with pytest.raises(UserError, match="micro_batch_size: 2 does not divide"):
        engine_config.micro_batch_size(settings(), 4, "models.m")
    wide = Train(on={"a": 1.0}, steps=1, batch_size=96, learning_rate=1e-3)
    assert [engine_config.micro_batch_size(wide, n, "m") for n in (1, 2, 3, 32)] == [32, 24, 32, 3]
