"""Checkpoints of a DeepSpeed engine, and the finished model.

A checkpoint is a folder `step-…` of DeepSpeed's files. `ki_ds.json` in it is written last: what the checkpoint is of,
by how many ranks, and the size of every file. Without it, or with a file of another size, the folder is not whole and
the checkpoint before it is taken.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_ds.engine import optimizers, universal
from ki_ds.errors import UserError, reason
from ki_ds.files import as_umask_says, sync, write_atomically, writing
from ki_ds.launch import distributed, heartbeat
from ki_ds.models.language_model import LanguageModel
from ki_ds.models.partitioned import shape
from ki_ds.progress import say

RECORD = "ki_ds.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: the steps done, what run it belongs to, and how it was cut."""

    folder: Path
    step: int
    state: dict[str, Any]
    world_size: int
    zero_stage: int
    groups: list[dict[str, list[int]]]  # names and shapes of the parameters in the optimizer's groups


def save(engine: Any, folder: Path, step: int, keep: int, state: dict[str, Any], always: int = 0) -> None:
    """Write checkpoint `step`, of the run that `state` names; the last `keep` are kept, and that of step `always`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    tag = f"step-{step:08d}"
    here = folder / tag
    if distributed.rank() == 0 and here.exists():
        shutil.rmtree(here)  # begun by a run of another number of ranks, perhaps: its files would stay
    distributed.barrier()
    with writing(here), heartbeat.lengthy(f"saving {here}"):
        engine.save_checkpoint(str(folder), tag=tag, client_state={}, save_latest=False)
        own = [file for file in here.rglob("*") if file.is_file() and _is_own(file)]
        for file in own:
            with heartbeat.lengthy(f"writing {file} through to disk"):
                sync(file)
    files = distributed.all_gather_object({str(file.relative_to(here)): file.stat().st_size for file in own})
    if distributed.rank() == 0:
        record = {
            "step": step, "state": state, "world_size": distributed.world_size(),
            "zero_stage": engine.zero_optimization_stage(), "groups": _groups(engine),
            "files": {name: size for one in files for name, size in one.items()},
            "owner": {"uid": os.geteuid(), "host": socket.gethostname()},
        }  # fmt: skip
        write_atomically(here / RECORD, json.dumps(record, indent=1).encode())
        write_atomically(folder / "latest", tag.encode())  # for DeepSpeed's own tools
        for number, old in [*saved(folder).items()][:-keep]:
            if number != always:
                shutil.rmtree(old)
    distributed.barrier()


def saved(folder: Path) -> dict[int, Path]:
    """The folders of all checkpoints, whole or not, by step and in that order."""
    found = {int(here.name[5:]): here for here in folder.glob("step-*") if here.name[5:].isdecimal()}
    return dict(sorted(found.items()))


def reaches(folder: Path, step: int) -> bool:
    """Whether there is a whole checkpoint of at most so many steps."""
    return any(number <= step and not _damage(here) for number, here in saved(folder).items())


def go_back(folder: Path, step: int) -> None:
    """Remove the checkpoints of more than so many steps; one rank calls this."""
    for number, here in reversed(saved(folder).items()):
        if number > step:
            shutil.rmtree(here)


def _is_own(file: Path) -> bool:
    """Whether this rank wrote a file of a checkpoint; rank 0 vouches for those that belong to none."""
    rank, name = distributed.rank(), file.name
    if "offloaded_tensors" in file.parts:
        return file.parts[file.parts.index("offloaded_tensors") + 1] == f"rank{rank:0>2d}"
    return f"zero_pp_rank_{rank}_" in name or (rank == 0 and "zero_pp_rank_" not in name)


def _groups(engine: Any) -> list[dict[str, list[int]]]:
    """Names and full shapes of the parameters, in the order of the optimizer's groups."""
    groups = optimizers.grouped(engine.module)
    return [{name: list(shape(p)) for name, p in group} for group in groups if group]


def latest(folder: Path, trusted: bool = False) -> Checkpoint | None:
    """The last whole checkpoint, the same on every rank; what is newer and not whole is removed.

    Args:
        trusted: whatever user wrote it.

    Raises:
        UserError: there are checkpoints, but all are damaged; or the last is not this user's, and so not `trusted`.
    """
    found, problem = None, ""
    if distributed.rank() == 0:
        damaged = []
        for here in reversed(saved(folder).values()):
            why = _damage(here)
            if not why:
                found = _read(here)
                break
            if (here / RECORD).exists():
                damaged.append((here, why))
                say(f"{here}: {why}; going back to the checkpoint before it")
            else:
                shutil.rmtree(here)  # begun, but never finished
        if damaged and found is None:
            lines = "; ".join(f"{here}: {why}" for here, why in damaged)
            problem = f"{lines}. No whole checkpoint is left: remove {folder} to begin again."
        if found and not trusted:
            problem = _strange(found.folder)
        for here, _ in damaged if found and not problem else ():
            shutil.rmtree(here)
        for left in folder.glob("universal-step-*"):  # of a conversion that was interrupted
            shutil.rmtree(left)
    # one rank reads for all: on a shared file system others may still see older files
    found, problem = distributed.broadcast_object((found, problem))
    if problem:
        raise UserError(problem)
    return found


def _damage(here: Path) -> str:
    """What is wrong with a checkpoint folder; empty: nothing."""
    try:
        files = json.loads((here / RECORD).read_bytes())["files"]
        for name, size in files.items():
            there = (here / name).stat().st_size
            if there != size:
                return f"{name} has {there} bytes, expected {size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD} cannot be read ({reason(error)})"
    return ""


def _strange(here: Path) -> str:
    """Why a checkpoint may not be this user's; empty: it is. Loading it runs what its pickles say.

    The record tells who wrote it, and can lie; the owner of a file cannot, but changes when it is copied. What this
    user's files look like in this folder is tried out: some file systems give all files to one owner.
    """
    with tempfile.TemporaryFile(dir=here.parent) as probe:
        own = os.fstat(probe.fileno()).st_uid
    owner = json.loads((here / RECORD).read_bytes()).get("owner", {"uid": os.geteuid()})  # older ones do not say
    what = ""
    if not isinstance(owner, dict) or owner.get("uid") != os.geteuid():
        what = f"its record says that it was written by {json.dumps(owner)}"
    for file in (here, *here.rglob("*")):
        if (theirs := file.stat().st_uid) != own:
            what = f"{'it' if file == here else file.relative_to(here)} belongs to user {theirs}"
    return what and (
        f"{here}: {what}; this is user {os.geteuid()}. Checkpoints are pickles: going on from one runs whatever its "
        "writer put into it. If you trust who wrote it, say --trust-checkpoints"
    )


def _read(here: Path) -> Checkpoint:
    record = json.loads((here / RECORD).read_bytes())
    zero_stage = record["zero_stage" if "zero_stage" in record else "stage"]  # as it once was called
    return Checkpoint(here, record["step"], record["state"], record["world_size"], zero_stage, record["groups"])


def resume(engine: Any, folder: Path, state: dict[str, Any], trusted: bool = False) -> int:
    """Load the last whole checkpoint: the number of steps done, 0 where there is none. With as many ranks and the ZeRO
    stage that it was made with, the run goes on to the last bit; else to rounding.

    Raises:
        UserError: the checkpoint is damaged, belongs to another run, or is another user's and not `trusted`.
    """
    found = latest(folder, trusted)
    if found is None:
        return 0
    if found.state != state:
        raise UserError(
            f"{found.folder}: belongs to another run: {json.dumps(found.state)}, expected {json.dumps(state)}"
        )
    zero_stage = engine.zero_optimization_stage()
    with heartbeat.lengthy(f"loading {found.folder}"):
        same_ranks = found.world_size == distributed.world_size() or zero_stage == 0
        if found.zero_stage == zero_stage and same_ranks:
            _load(engine, found)
        else:
            _load_elsewhere(engine, zero_stage, found)
    return found.step


def _load(engine: Any, found: Checkpoint) -> None:
    """Load a checkpoint of as many ranks at the same ZeRO stage."""
    groups = engine.optimizer.param_groups
    own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    try:
        path, _ = engine.load_checkpoint(str(found.folder.parent), tag=found.folder.name)
        if path is None:
            raise ValueError("DeepSpeed found nothing in it")
    except Exception as error:  # whatever a damaged pickle raises
        raise UserError(
            f"{found.folder}: cannot be loaded ({reason(error)}). Remove it to go on from the checkpoint before it."
        ) from None
    for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
        for key, value in settings.items():  # where the optimizer was another implementation of the same
            group.setdefault(key, value)


def _load_elsewhere(engine: Any, zero_stage: int, found: Checkpoint) -> None:
    """Load a checkpoint of another number of ranks or another ZeRO stage."""
    if any(group.get("use_muon") for group in engine.optimizer.param_groups):
        raise UserError(
            f"{found.folder}: was made by {found.world_size} ranks at ZeRO {found.zero_stage}. DeepSpeed keeps Muon's "
            "momentum in another way for every number of ranks, and converts none of it: a run with "
            '"optimizer": "muon" goes on with those only; expected the engine JSON and --processes that it had'
        )
    if distributed.rank() == 0:
        say(
            f"  {found.folder.name}: made by {found.world_size} ranks at ZeRO {found.zero_stage}, converted for "
            f"{distributed.world_size()} at ZeRO {zero_stage}"
        )
    converted = found.folder.parent / f"universal-{found.folder.name}"
    try:
        if distributed.rank() == 0:
            shutil.rmtree(converted, ignore_errors=True)
        universal.convert(found.folder, found.zero_stage, found.groups, converted)
        universal.load(engine, zero_stage, converted)
        distributed.barrier()
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(converted, ignore_errors=True)
            (converted.parent / "latest_universal").unlink(missing_ok=True)


def export(engine: Any, folder: Path) -> None:
    """Write the model as a Hugging Face folder, safetensors only, under another name until it is whole; afterwards this
    engine must not be used. Its files can be read by whom the umask says.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    import deepspeed

    model: LanguageModel = engine.module
    partitioned = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=partitioned):
        if distributed.rank() == 0:
            begun = _begun(folder)
            for old in (begun, folder):
                shutil.rmtree(old, ignore_errors=True)
            try:
                with writing(folder):
                    model.whole().save_pretrained(begun, safe_serialization=True)
                    as_umask_says(begun)
                    begun.rename(folder)
            finally:
                shutil.rmtree(begun, ignore_errors=True)
    distributed.barrier()


def withdraw(folder: Path) -> None:
    """Give an exported model, which is to be written anew, the name of one that is not whole; one rank calls this."""
    if folder.exists():
        shutil.rmtree(_begun(folder), ignore_errors=True)
        folder.rename(_begun(folder))


def _begun(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.begun")
