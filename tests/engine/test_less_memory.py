"""Master weights and moments in bf16, and ZeRO++: what runs on a CPU, what is refused, what a plan reckons."""

import gc

import pytest
import torch
from helpers.engines import batch, engine_of, new_student, settings, step, weights, world  # noqa: F401
from helpers.ranks import run_ranks

from ki_ds.engine.config import EngineConfig, check_ranks
from ki_ds.errors import UserError
from ki_ds.planning.memory import Model, Setting, gradients, states

HALF = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
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


@pytest.mark.parametrize("stage", [1, 2])
def test_the_plan_reckons_what_bf16_states_take(stage):
    gc.collect()
    one = engine_of(half(stage))
    step(one, 0)
    sizes = tuple(p.numel() for p in one.deepspeed.module.parameters())
    said = states(Model(sizes, 32, 300), 1, Setting.of(EngineConfig.read(half(stage), "e")))
    found = {item.name: item.bytes for item in said}
    kept = [x for state in one.optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.dim()]
    assert found["moments"] == pytest.approx(sum(x.nbytes for x in kept), abs=64)
    assert found["master weights"] == pytest.approx(sum(x.nbytes for x in masters(one)), abs=64)


def test_the_plan_counts_the_second_copy_of_the_weights():
    zero = {"stage": 3, "zero_hpz_partition_size": 4}
    how = [Setting.of(EngineConfig.read({"bf16": {"enabled": True}, "zero_optimization": z}, "e"))
           for z in (zero, {"stage": 3})]  # fmt: skip
    more, less = (sum(item.bytes for item in (*states(SMALL, 8, one), *gradients(SMALL, 8, one, True))) for one in how)
    assert more - less == 2 * SMALL.parameters / 4


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
    ],
)  # fmt: skip
def test_combinations_that_do_not_run_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        EngineConfig.read(given, "engine.json")


@pytest.mark.parametrize("ranks", [1, 6, 2])
def test_second_copies_that_the_ranks_cannot_share_are_refused(ranks):
    config = EngineConfig.read({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, "engine.json")
    check_ranks(config, 8)
    with pytest.raises(UserError, match=rf"zero_hpz_partition_size: 4 does not divide the {ranks} process"):
        check_ranks(config, ranks)


def trained(hpz):
    """Losses and weights of a rank of two, at ZeRO 3."""
    from ki_ds.engine.batch_layout import BatchLayout
    from ki_ds.launch import distributed

    distributed.init_distributed()
    zero = {"stage": 3, "zero_hpz_partition_size": hpz, "stage3_param_persistence_threshold": 0}
    layout = BatchLayout(4, 1, distributed.rank(), 2)
    one = engine_of({"zero_optimization": zero}, layout=layout)
    losses = [step(one, number)[0]["loss"] for number in range(3)]
    return losses, weights(one)


@pytest.mark.launch
@pytest.mark.slow
def test_a_second_copy_of_the_weights_changes_no_number():
    plain, twice = (run_ranks(trained, 2, hpz) for hpz in (1, 2))
    assert plain[0][0] == twice[0][0]
    for mine, theirs in zip(plain[0][1], twice[0][1], strict=True):
        assert torch.equal(mine, theirs)


def test_they_shape_the_identity_where_they_round():
    zero = {"stage": 3, "zero_hpz_partition_size": 2}
    assert EngineConfig.read({"zero_optimization": zero}, "e").precision_record == {}
    assert EngineConfig.read(half(1), "e").precision_record == {"bf16": HALF}
    assert EngineConfig.read(half(1), "e").lossy and not EngineConfig.read({"zero_optimization": zero}, "e").lossy


def test_all_of_the_package_that_round_are_known_by_the_plan():
    from ki_ds.planning.plan import shipped_engines

    lossy = [name for name, config in shipped_engines().items() if config.lossy]
    assert lossy == ["zero2_bf16_states.json", "zero3_bf16_zeropp.json"]
