"""A run that goes on with another number of ranks, or at another ZeRO stage.

This file is its own program: under the launcher, `main` saves checkpoints as two ranks and goes on from all there are;
the tests do the same as one rank. What a checkpoint is converted to is the same for every target, so that DeepSpeed's
converter runs once for each.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import environment
from helpers.engines import batch, means, new_engine, weights, world  # noqa: F401

from ki_ds.engine import checkpoints, universal
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.launch import distributed
from ki_ds.launch.distributed import free_port

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What was wanted by checkpoint, and what came of it by (checkpoint, ZeRO stage, ranks)."""
    root = tmp_path_factory.mktemp("elastic")
    wanted = {name(*case, 1): save(root / name(*case, 1), *case) for case in SAVED_BY_ONE}
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank", "--num_gpus", "2",
        "--master_port", str(free_port()), __file__, str(root),
    ]  # fmt: skip
    tests = str(Path(__file__).parent.parent)
    given = {**environment(), "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]
    both = torch.load(root / "two.pt", weights_only=False)
    found = both["found"] | every(root)
    return wanted | both["wanted"], found


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


def main(root):
    distributed.init_distributed()
    torch.set_num_threads(1)
    wanted = {name(*case, 2): save(root / name(*case, 2), *case) for case in SAVED_BY_TWO}
    found = every(root)
    if distributed.rank() == 0:
        torch.save({"wanted": wanted, "found": found}, root / "two.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
