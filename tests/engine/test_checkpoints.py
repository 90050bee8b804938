"""Checkpoints of the engine: kept, resumed, damaged."""

import json
import os
import resource
import signal
import socket

import pytest
import torch
from helpers.engines import STAGES, new_engine, step, weights, world  # noqa: F401

from ki_ds.engine import checkpoints
from ki_ds.errors import UserError


@pytest.mark.parametrize(("stage", "half"), [*((stage, False) for stage in STAGES), (1, True), (2, True), (3, True)])
def test_checkpoints_are_kept_resumed_and_named_last(stage, half, tmp_path):
    one = new_engine(stage, half)
    for number in range(4):
        step(one, number)
        checkpoints.save(one.deepspeed, tmp_path, number + 1, keep=2, state={"fingerprint": "x"})
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004"  # for DeepSpeed's own tools
    two = new_engine(stage, half)
    assert checkpoints.resume(two.deepspeed, tmp_path, {"fingerprint": "x"}) == 4
    for this in (one, two):
        step(this, 9)
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    with pytest.raises(UserError, match="belongs to another run"):
        checkpoints.resume(new_engine(stage, half).deepspeed, tmp_path, {"fingerprint": "y"})


def test_a_record_that_says_stage_is_read(tmp_path):
    """As records were written before they said zero_stage."""
    one = saved(tmp_path, 1)
    file = tmp_path / "step-00000001" / checkpoints.RECORD
    record = json.loads(file.read_bytes())
    file.write_text(json.dumps({"stage": record.pop("zero_stage"), **record}))
    assert "zero_stage" not in file.read_text()
    two = new_engine(1)
    assert checkpoints.resume(two.deepspeed, tmp_path, {}) == 1
    for mine, theirs in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def saved(folder, steps):
    """An engine that has saved after every step."""
    one = new_engine(1)
    for number in range(steps):
        step(one, number)
        checkpoints.save(one.deepspeed, folder, number + 1, keep=steps, state={})
    return one


def test_checkpoints_of_many_steps_are_found_and_kept_by_number(tmp_path):
    """From step 10^8 on names are longer, and their order is no longer that of the alphabet."""
    one = new_engine(1)
    for number in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        checkpoints.save(one.deepspeed, tmp_path, number, keep=2, state={})
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-100000000", "step-100000001"]
    checkpoints.save(one.deepspeed, tmp_path, 99_999_999, keep=3, state={})
    assert checkpoints.latest(tmp_path).step == 100_000_001


@pytest.mark.parametrize("damage", ["truncated", "missing", "unfinished", "record"])
def test_resumes_from_the_checkpoint_before_a_damaged_one(damage, tmp_path, capsys):
    saved(tmp_path, 2)
    last = tmp_path / "step-00000002"
    states = next(last.glob("*_optim_states.pt"))
    if damage == "truncated":
        states.write_bytes(states.read_bytes()[:-1])
    elif damage == "missing":
        states.unlink()
    elif damage == "unfinished":  # killed while saving
        (last / checkpoints.RECORD).unlink()
    else:
        (last / checkpoints.RECORD).write_bytes(b'{"files"')
    two = new_engine(1)
    assert checkpoints.resume(two.deepspeed, tmp_path, {}) == 1
    words = {"truncated": f"{states.name} has", "missing": f"{states.name} is missing", "record": "cannot be read"}
    assert words.get(damage, "") in capsys.readouterr().out
    assert not last.exists()
    whole = saved(tmp_path / "again", 2)
    step(two, 1)
    for mine, theirs in zip(weights(two), weights(whole), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_damaged_checkpoints_alone_are_not_taken_for_none(tmp_path):
    saved(tmp_path, 1)
    next((tmp_path / "step-00000001").glob("*_optim_states.pt")).write_bytes(b"")
    with pytest.raises(UserError, match=r"has 0 bytes, expected \d+. No whole checkpoint is left: remove"):
        checkpoints.resume(new_engine(1).deepspeed, tmp_path, {})


def test_damage_that_keeps_the_size_names_the_remedy(tmp_path):
    saved(tmp_path, 1)
    states = next((tmp_path / "step-00000001").glob("*_optim_states.pt"))
    states.write_bytes(b"\0" * states.stat().st_size)
    with pytest.raises(UserError, match=r"step-00000001: cannot be loaded .*Remove it to go on from the checkpoint"):
        checkpoints.resume(new_engine(1).deepspeed, tmp_path, {})


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "file"), [(0, "mp_rank_*_model_states.pt"), (1, "*_optim_states.pt")])
def test_damage_found_while_converting_names_the_remedy(stage, file, tmp_path):
    one = new_engine(stage)
    step(one, 0)
    checkpoints.save(one.deepspeed, tmp_path, 1, keep=1, state={})
    states = next((tmp_path / "step-00000001").glob(file))
    states.write_bytes(b"\0" * states.stat().st_size)
    with pytest.raises(UserError, match=r"step-00000001: cannot be converted .*remove it to go on from the checkpoint"):
        checkpoints.resume(new_engine(2).deepspeed, tmp_path, {})
    assert not [*tmp_path.glob("universal-*")]


def test_an_export_on_a_full_disk_is_refused_and_leaves_nothing_that_looks_whole(tmp_path):
    """The model that an earlier end left there is gone too: it was not sealed."""
    one = new_engine(1)
    step(one, 0)
    (tmp_path / "model").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    held = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a file's end comes as the disk's would
    try:
        with pytest.raises(UserError, match=r"model: cannot be written: (File too large|No space left on device)\."):
            checkpoints.export(one.deepspeed, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, held)
    assert [*tmp_path.iterdir()] == []


def test_words_of_safetensors_for_a_full_disk_are_an_error_of_the_user(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*_given, **_named):
        raise SafetensorError('I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }')

    one = new_engine(0)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device\. Free some space"):
        checkpoints.export(one.deepspeed, tmp_path / "model")


def test_an_exported_model_is_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoints.export(new_engine(1).deepspeed, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in modes and {*modes.values()} == {0o640}


def loaded(monkeypatch):
    """Whether DeepSpeed has been asked to load anything."""
    asked = []
    monkeypatch.setattr(checkpoints, "_load", lambda _engine, found: asked.append(found.step))
    return asked


def test_a_checkpoint_whose_record_names_another_user_is_not_loaded_unasked(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    record, engine, asked = (
        tmp_path / "step-00000001" / checkpoints.RECORD,
        new_engine(1).deepspeed,
        loaded(monkeypatch),
    )
    said = json.loads(record.read_bytes())
    assert said["owner"] == {"uid": os.geteuid(), "host": socket.gethostname()}
    for owner in ({"uid": os.geteuid() + 1, "host": "elsewhere"}, {}, []):
        record.write_text(json.dumps({**said, "owner": owner}))
        with pytest.raises(UserError, match=r"step-00000001: its record says .*pickles.*--trust-checkpoints"):
            checkpoints.resume(engine, tmp_path, {})
    assert not asked
    assert checkpoints.resume(engine, tmp_path, {}, trusted=True) == 1 == asked.pop()
    del said["owner"]  # from before it was recorded
    record.write_text(json.dumps(said))
    assert checkpoints.resume(engine, tmp_path, {}) == 1 == asked.pop()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("given", [".", checkpoints.RECORD, "*_optim_states.pt", "unlisted.pt"])
def test_a_checkpoint_with_a_file_of_another_user_is_not_loaded_unasked(given, tmp_path, monkeypatch):
    saved(tmp_path, 1)
    here, asked = tmp_path / "step-00000001", loaded(monkeypatch)
    (here / "unlisted.pt").touch()
    os.chown(here if given == "." else next(here.glob(given)), 12_345, -1)
    engine = new_engine(1).deepspeed
    with pytest.raises(UserError, match=r"belongs to user 12345; this is user 0.*--trust-checkpoints"):
        checkpoints.resume(engine, tmp_path, {})
    assert not asked and checkpoints.resume(engine, tmp_path, {}, trusted=True) == 1
