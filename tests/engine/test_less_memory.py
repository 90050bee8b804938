"""Master weights and moments in bf16, and ZeRO++: what runs on a CPU, what is refused, what a plan reckons."""

import gc

import pytest
import torch
from helpers.engines import batch, engine_of, means, new_student, settings, step, weights, world  # noqa: F401
from helpers.ranks import run_ranks

from ki_ds.engine.config import EngineConfig, InferenceEngineConfig, check_ranks
from ki_ds.errors import UserError
from ki_ds.planning.memory import Model, Setting, gradients, states

HALF = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
NVME = {"device": "nvme", "nvme_path": "/tmp"}
SMALL = Model((1000, 2000, 500), 10, 100)


def half(stage, **more):
    return {"bf16": HALF, "zero_optimization": {"stage": stage}, **more}


def plain_bf16(steps, rate):
    """Losses of the same model under torch's AdamW, everything in bf16."""
    model, train = new_student().to(torch.bfloat16), settings()
    matrices, rest = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=train.betas, eps=train.epsilon)
    found = []
    for number in range(steps):
        micros, total = batch(number), 0.0
        rows = sum(len(micro.labels_N) for micro in micros)
        for micro in micros:
            loss = model(*micro.to(torch.device("cpu")), 1.0).loss
            (loss / rows).backward()
            total += float(loss.detach()) / rows
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_states_train_as_an_optimizer_in_bf16_does(stage):
    """Sums of gradients round in another order, by a few units of bf16's last place, 2^-8."""
    one = engine_of(half(stage))
    losses = [step(one, number)[0]["loss"] for number in range(6)]
    assert losses == pytest.approx(plain_bf16(6, 1e-2), rel=2e-3)
    kept = [x for state in one.optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.dim()]
    assert kept and {x.dtype for x in kept} == {torch.bfloat16}


def test_updates_below_the_last_place_of_a_weight_are_lost():
    """Which is why it is no default: twenty steps at a rate of 1e-6 move masters in fp32, and hardly any in bf16."""

    def moved(given):
        one = engine_of(given)
        before = [x.float() for x in masters(one)]
        for number in range(20):
            step(one, number, rate=1e-6)
        pairs = list(zip(before, masters(one), strict=True))
        return sum(int((x != y.float()).sum()) for x, y in pairs) / sum(x.numel() for x in before)

    assert moved(half(1)) < 0.2
    assert moved({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}) > 0.8


def masters(one):
    return [p.detach().clone() for group in one.optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_with_bf16_states_goes_on_to_the_bit(stage, tmp_path):
    whole, first = engine_of(half(stage)), engine_of(half(stage))
    losses = [step(whole, number)[0]["loss"] for number in range(4)]
    for number in range(2):
        step(first, number)
    first.save(tmp_path, 2, 1, {})
    later = engine_of(half(stage))
    assert later.resume(tmp_path, {}, True) == 2
    assert [step(later, number)[0]["loss"] for number in (2, 3)] == losses[2:]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_plan_reckons_what_bf16_states_take(stage):
    gc.collect()
    one = engine_of(half(stage))
    step(one, 0)
    sizes = tuple(p.numel() for p in one.deepspeed.module.parameters())
    said = states(Model(sizes, 32, 300), 1, Setting.of(EngineConfig.read(half(stage), "e")))
    found = {item.name: item.bytes for item in said}
    kept = [x for state in one.optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.dim()]
    assert found["moments"] == pytest.approx(sum(x.nbytes for x in kept), abs=64)
    optimizer = one.deepspeed.optimizer
    copies = optimizer.fp32_partitioned_groups_flat if stage == 3 else masters(one)
    assert found["master weights"] == pytest.approx(sum(x.nbytes for x in copies), abs=64)
    if stage == 3:  # they are copies
        own = {x.untyped_storage().data_ptr() for x in copies}
        assert own.isdisjoint(x.untyped_storage().data_ptr() for x in optimizer.fp16_partitioned_groups_flat)


def test_the_plan_counts_the_second_copy_of_the_weights():
    zero = {"stage": 3, "zero_hpz_partition_size": 4}
    how = [Setting.of(EngineConfig.read({"bf16": {"enabled": True}, "zero_optimization": z}, "e"))
           for z in (zero, {"stage": 3})]  # fmt: skip
    more, less = (sum(item.bytes for item in (*states(SMALL, 8, one), *gradients(SMALL, 8, one, True))) for one in how)
    assert more - less == 2 * SMALL.parameters / 4


def test_the_second_copy_is_where_the_weights_are():
    zero = {"stage": 3, "zero_hpz_partition_size": 4, "offload_optimizer": {"device": "cpu"}}
    given = {"bf16": {"enabled": True}, "zero_optimization": {**zero, "offload_param": {"device": "cpu"}}}
    (found,) = (x for x in states(SMALL, 8, Setting.of(EngineConfig.read(given, "e"))) if x.name.startswith("second"))
    assert (found.where, found.bytes) == ("host", 2 * SMALL.parameters / 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}, "zero_optimization": {"stage": 1}},
         "bf16_optimizer_states: expected bf16_master_weights_and_grads and bf16_optimizer_states together"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 1}},
         "together, or neither"),
        ({"bf16": HALF, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         "with offload is not supported"),
        (half(1, data_types={"grad_accum_dtype": "fp32"}), "grad_accum_dtype: gradients are accumulated in bf16"),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}, "zero_optimization": {"stage": 1}},
         "fp16_master_weights_and_grads: is not supported"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}},
         'zero_quantized_gradients: DeepSpeed would ignore it at stage 2; expected "stage": 3'),
        ({"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 2}}, "would ignore it at stage 1"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}}, "found 0; expected the number of ranks"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}}, "every weight is trained"),
        (half(2, optimizer={"type": "AdamW"}), "is for torch's AdamW; leave it or the optimizer out"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
         'zero_quantized_gradients: .* takes all gradients for fp16 .*expected "fp16"'),
        ({"bf16": {"enabled": True}, "communication_data_type": "fp16",
          "zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "takes all gradients for fp16"),
        ({"fp16": {"enabled": True}, "communication_data_type": "fp32",
          "zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "no other communication_data_type"),
        ({"fp16": {"enabled": True},
          "zero_optimization": {"stage": 3, "zero_quantized_gradients": True, "reduce_scatter": False}},
         "reduce_scatter: found false with zero_quantized_gradients"),
        ({"torch_autocast": {"enabled": True}, "zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
         "zero_quantized_weights: DeepSpeed refuses it beside torch_autocast"),
        ({"bf16": {"enabled": True},
          "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2, "offload_optimizer": NVME,
                                "offload_param": NVME}},
         "keeps no second copy beside weights on nvme"),
    ],
)  # fmt: skip
def test_combinations_that_do_not_run_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        EngineConfig.read(given, "engine.json")


@pytest.mark.parametrize(
    "given",
    [
        {"bf16": HALF, "zero_optimization": {"stage": 2, "offload_optimizer": None}},
        {"zero_optimization": {"stage": 1, "zero_hpz_partition_size": "auto"}},
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
    ],
)
def test_combinations_that_run_are_not_refused(given):
    EngineConfig.read(given, "engine.json")


def test_what_is_not_enabled_saves_nothing():
    config = EngineConfig.read({"bf16": {**HALF, "enabled": False}, "zero_optimization": {"stage": 2}}, "e")
    assert not config.half_states


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients", "zero_hpz_partition_size"])
def test_a_teacher_takes_none_of_it(key):
    """What is quantised would change its predictions, and not their identity."""
    with pytest.raises(UserError, match=rf"zero_optimization\.{key}: ZeRO\+\+ is for training"):
        InferenceEngineConfig.read({"zero_optimization": {"stage": 3, key: 2}}, "engine.json", "fp32")


@pytest.mark.parametrize("ranks", [1, 6, 2])
def test_second_copies_that_the_ranks_cannot_share_are_refused(ranks):
    config = EngineConfig.read({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, "engine.json")
    check_ranks(config, 8)
    with pytest.raises(UserError, match=rf"zero_hpz_partition_size: 4 does not divide the {ranks} process"):
        check_ranks(config, ranks)


def trained(folder, hpz):
    """Losses and weights of a rank at ZeRO 3, and bytes of its second copy before a step."""
    from ki_ds.engine.batch_layout import BatchLayout
    from ki_ds.launch import distributed

    distributed.init_distributed()
    zero = {"stage": 3, "zero_hpz_partition_size": hpz, "stage3_param_persistence_threshold": 0}
    ranks, rank = distributed.world_size(), distributed.rank()
    layout, losses, held = BatchLayout(4 * ranks, 2, rank, ranks), [], 0
    for first in (0, 2):  # the second engine goes on from what the first has saved
        one = engine_of({"zero_optimization": zero}, layout=layout)
        assert one.resume(folder, {}, True) == first
        for number in (first, first + 1):
            losses.append(means(one, number, batch(number * ranks + rank))["loss"])
            copies = [p.ds_secondary_tensor for p in one.deepspeed.module.parameters()]
            held = sum(copy.nbytes for copy in copies if copy is not None)
            with torch.no_grad():  # as in a validation
                one(*batch(0)[0].to(one.device), 1.0)
            assert one.step(1e-2)[0]
        one.save(folder, first + 2, 1, {})
    return losses, weights(one), held


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_second_copy_of_the_weights_changes_no_number(ranks, tmp_path):
    """Over a validation and a checkpoint too; and it takes what is planned, but for the padding of every weight."""
    plain, twice = (run_ranks(trained, ranks, tmp_path / str(hpz), hpz) for hpz in (1, 2))
    for (losses, found, none), (others, theirs, held) in zip(plain, twice, strict=True):
        assert losses == others and none == 0
        assert all(torch.equal(mine, other) for mine, other in zip(found, theirs, strict=True))
        assert held == pytest.approx(4 * sum(weight.numel() for weight in found) / 2, abs=16 * len(found))


def test_they_shape_the_identity_where_they_round():
    zero = {"stage": 3, "zero_hpz_partition_size": 2}
    assert EngineConfig.read({"zero_optimization": zero}, "e").precision_record == {}
    assert EngineConfig.read(half(1), "e").precision_record == {"bf16": HALF}
    assert EngineConfig.read(half(1), "e").lossy and not EngineConfig.read({"zero_optimization": zero}, "e").lossy


def test_all_of_the_package_that_round_are_known_by_the_plan():
    from ki_ds.planning.plan import shipped_engines

    lossy = [name for name, config in shipped_engines().items() if config.lossy]
    assert lossy == ["zero2_bf16_states.json", "zero3_fp16_zeropp.json"]
