"""Checkpoints of a DeepSpeed engine, and the finished model."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from ki_ds import distributed, engine_config
from ki_ds.errors import UserError, reason
from ki_ds.language_model import LanguageModel
from ki_ds.sealed import remedy, sync, write_atomically

WRITE_FAILED = ("PytorchStreamWriter", "file write failed", "No space left")  # how torch says that a disk is full


def save(engine: Any, folder: Path, step: int, keep: int, state: dict[str, Any]) -> None:
    """Write checkpoint `step`; `latest` names it only once it is whole; the last `keep` are kept.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    tag = f"step-{step:08d}"
    try:
        engine.save_checkpoint(str(folder), tag=tag, client_state={"ki_ds": state}, save_latest=False)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in WRITE_FAILED):
            raise
        problem = error if isinstance(error, OSError) else OSError(errno.ENOSPC, reason(error))
        raise UserError(f"{folder / tag}: cannot be written: {problem.strerror}. {remedy(problem)}") from None
    distributed.barrier()
    if distributed.rank() == 0:
        for file in (folder / tag).iterdir():
            sync(file)
        write_atomically(folder / "latest", tag.encode())
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


def resume(engine: Any, folder: Path, state: dict[str, Any]) -> int:
    """Load the latest checkpoint: the number of steps done, 0 where there is none.

    Raises:
        UserError: the checkpoint is damaged, or was made by another number of processes.
    """
    latest = folder / "latest"
    # one rank reads it for all: on a shared file system others may still see an older one
    tag = distributed.from_first(latest.read_text().strip() if latest.exists() else None)
    if tag is None:
        return 0
    saved = folder / tag
    if distributed.rank() == 0:
        for newer in folder.glob("step-*"):
            if newer.name > tag:  # begun, but never finished
                shutil.rmtree(newer)
    distributed.barrier()
    ranks = len(list(saved.glob("*zero_pp_rank_*_optim_states.pt"))) or None  # none at ZeRO 0
    if ranks is not None and ranks != distributed.world_size():
        raise UserError(
            f"{saved}: written by {ranks} processes, but this run has {distributed.world_size()}; "
            f"run with --processes {ranks}"
        )
    try:
        path, client = engine.load_checkpoint(str(folder), tag=tag)
    except Exception as error:  # whatever a damaged pickle raises
        raise UserError(f"{saved}: cannot be loaded ({reason(error)}). {_older(folder, tag)}") from None
    if path is None or "ki_ds" not in client:
        raise UserError(f"{saved}: is not whole. {_older(folder, tag)}")
    found = client["ki_ds"]
    if found["state"] != state:
        raise UserError(f"{saved}: belongs to another run: {json.dumps(found['state'])}, expected {json.dumps(state)}")
    return int(found["step"])


def export(engine: Any, folder: Path) -> None:
    """Write the model as a Hugging Face folder, safetensors only; afterwards this engine must not be used."""
    import deepspeed

    model: LanguageModel = engine.module
    partitioned = engine_config.stage(engine.config) == 3
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=partitioned):
        if distributed.rank() == 0:
            model.whole().save_pretrained(folder, safe_serialization=True)
    distributed.barrier()


def _older(folder: Path, tag: str) -> str:
    others = sorted(other.name for other in folder.glob("step-*") if other.name < tag)
    if others:
        return f"To go on from the one before it, write {others[-1]} into {folder / 'latest'}."
    return f"Remove {folder.parent} to begin again."
