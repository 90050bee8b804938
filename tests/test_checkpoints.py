"""Checkpoints of the engine: kept, resumed, damaged."""

import pytest
import torch
from small_engines import STAGES, new_engine, step, weights, world  # noqa: F401

from ki_ds import checkpoints
from ki_ds.errors import UserError


@pytest.mark.parametrize(("stage", "half"), [*((stage, False) for stage in STAGES), (1, True), (2, True), (3, True)])
def test_checkpoints_are_kept_resumed_and_named_last(stage, half, tmp_path):
    one = new_engine(stage, half)
    for number in range(4):
        step(one, number)
        checkpoints.save(
            one.deepspeed, tmp_path, number + 1, keep=2, state={"step": number + 1, "state": {"fingerprint": "x"}}
        )
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004"
    two = new_engine(stage, half)
    assert checkpoints.resume(two.deepspeed, tmp_path, {"fingerprint": "x"}) == 4
    for this in (one, two):
        step(this, 9)
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    with pytest.raises(UserError, match="belongs to another run"):
        checkpoints.resume(new_engine(stage, half).deepspeed, tmp_path, {"fingerprint": "y"})


def test_truncated_checkpoint_names_the_one_before(tmp_path):
    one = new_engine(1)
    for number in range(2):
        step(one, number)
        checkpoints.save(one.deepspeed, tmp_path, number + 1, keep=3, state={"step": number + 1, "state": {}})
    for file in (tmp_path / "step-00000002").glob("*.pt"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"step-00000002.*write step-00000001 into"):
        checkpoints.resume(new_engine(1).deepspeed, tmp_path, {})


def test_checkpoint_of_another_world_size_is_refused(tmp_path):
    one = new_engine(1)
    step(one, 0)
    checkpoints.save(one.deepspeed, tmp_path, 1, keep=1, state={"step": 1, "state": {}})
    shard = next((tmp_path / "step-00000001").glob("*zero_pp_rank_0*"))
    (shard.parent / shard.name.replace("rank_0", "rank_1")).write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match=r"written by 2 processes.*--processes 2"):
        checkpoints.resume(new_engine(1).deepspeed, tmp_path, {})
