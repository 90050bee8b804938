"""A run that goes on with another number of ranks, or at another ZeRO stage.

Two ranks save checkpoints and go on from all there are; the tests do the same as one rank. What a
checkpoint is converted to is the same for every target, so that DeepSpeed's converter runs once for each.
"""

import shutil

import pytest
import torch
from helpers.engines import batch, means, new_engine, weights, world  # noqa: F401
from helpers.ranks import run_ranks

from ki_ds.engine import checkpoints, universal
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.launch import distributed

# all runs are made before the first test
pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(400)]

SAVED_BY_TWO = ((0, False), (1, False), (3, False))  # ZeRO stage, whether in bf16
SAVED_BY_ONE = ((2, True), (3, False))
FIRST, LAST = 4, 8  # steps: the checkpoint, the end


def targets(half):
    return (1, 2, 3) if half else (0, 1, 2, 3)


def name(stage, half, ranks):
    return f"zero{stage}-{'bf16' if half else 'fp32'}-{ranks}"


def engine_of_world(stage, half):
    layout = BatchLayout(batch_size=4, micro_batch_size=2, rank=distributed.rank(), world_size=distributed.world_size())
    return new_engine(stage, half, layout=layout)


def steps(one, begin, end):
    """Losses; each rank takes its share of a step's two micro-batches, which have different numbers of targets."""
    found = []
    for number in range(begin, end):
        micros = batch(number)[distributed.rank() :: distributed.world_size()]
        found.append(means(one, number, micros)["loss"])
        assert one.step(1e-2)[0]
    return torch.tensor(found, dtype=torch.float64)


def save(folder, stage, half):
    """Save in the middle of a run; the losses and weights of the rest, without interruption."""
    one = engine_of_world(stage, half)
    steps(one, 0, FIRST)
    checkpoints.save(one.deepspeed, folder, FIRST, keep=1, state={})
    return {"losses": steps(one, FIRST, LAST), "weights": weights(one)}


def go_on(folder, stage, half):
    one = engine_of_world(stage, half)
    assert checkpoints.resume(one.deepspeed, folder, {}) == FIRST
    return {"losses": steps(one, FIRST, LAST), "weights": weights(one)}


def convert_once(source, zero_stage, groups, target, convert=universal.convert):
    """Convert, or copy what was converted before."""
    kept = source.parent / f"kept-{source.name}"
    if not distributed.broadcast_object(kept.exists()):
        convert(source, zero_stage, groups, target)
        if distributed.rank() == 0:
            shutil.copytree(target, kept)
    elif distributed.rank() == 0:
        shutil.copytree(kept, target)
    distributed.barrier()


def every(root):
    """Of all checkpoints under a folder, the run that goes on at each stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(universal, "convert", convert_once)
        return goes_on_from(root)


def goes_on_from(root):
    found = {}
    for folder in sorted(root.glob("zero*")):
        half = "bf16" in folder.name
        for stage in targets(half):
            found[folder.name, stage, distributed.world_size()] = go_on(folder, stage, half)
    return found


def as_two(root):
    """On each of two ranks: what was wanted by checkpoint, and what came of all checkpoints there are."""
    wanted = {name(*case, 2): save(root / name(*case, 2), *case) for case in SAVED_BY_TWO}
    return wanted, every(root)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What was wanted by checkpoint, and what came of it by (checkpoint, ZeRO stage, ranks)."""
    root = tmp_path_factory.mktemp("elastic")
    wanted = {name(*case, 1): save(root / name(*case, 1), *case) for case in SAVED_BY_ONE}
    both_wanted, both_found = run_ranks(as_two, 2, root, timeout_s=280)[0]
    return wanted | both_wanted, both_found | every(root)


CASES = [
    (name(stage, half, ranks), target, now)
    for ranks, saved in ((2, SAVED_BY_TWO), (1, SAVED_BY_ONE))
    for stage, half in saved
    for target in targets(half)
    for now in (1, 2)
]


@pytest.mark.parametrize(("saved", "stage", "ranks"), CASES)
def test_run_goes_on_elsewhere_as_if_nothing_had_happened(runs, saved, stage, ranks):
    """To rounding: another number of ranks adds gradients up in another order; bf16 weights are rounded from masters
    that differ in their last bits, so that a weight may differ by one bf16 step."""
    wanted, found = runs[0][saved], runs[1][saved, stage, ranks]
    half = "bf16" in saved
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=2e-3 if half else 2e-6, atol=0)
    for mine, theirs in zip(found["weights"], wanted["weights"], strict=True):
        torch.testing.assert_close(
            mine.float(), theirs.float(), rtol=2**-7 if half else 1e-4, atol=1e-3 if half else 1e-5
        )


def test_same_ranks_and_stage_go_on_to_the_last_bit(runs):
    for saved in runs[0]:
        stage, ranks = int(saved[4]), int(saved[-1])
        assert torch.equal(runs[1][saved, stage, ranks]["losses"], runs[0][saved]["losses"])


def test_nothing_of_the_conversion_stays(runs, tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    assert not [*root.rglob("universal-*"), *root.rglob("latest_universal")]
