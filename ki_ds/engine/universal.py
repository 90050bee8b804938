"""Checkpoints for another number of ranks or another ZeRO stage, through DeepSpeed's universal format.

DeepSpeed's converter writes a file for every parameter and state. What it leaves out is added here: ZeRO 0 as source
and as target, and going between stages 1, 2 and 3. And what its loader of stage 3 changes is put back: all parameter
groups take the first one's weight decay, and share one step counter, which then counts too fast.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ki_ds.errors import UserError, reason
from ki_ds.launch import distributed

STATES = ("fp32", "exp_avg", "exp_avg_sq")
OPTIMIZER_STATE = "optimizer_state.pt"


def convert(source: Path, zero_stage: int, groups: list[dict[str, list[int]]], target: Path) -> None:
    """Write the checkpoint folder `source`, made at a ZeRO stage, to `target` in the universal format; rank 0 does it.

    Args:
        groups: of the optimizer's parameter groups, names and shapes of the parameters.

    Raises:
        UserError: the checkpoint is damaged, or DeepSpeed cannot convert it.
    """
    process: subprocess.Popen[str] | None = None
    problem = ""
    if distributed.rank() == 0:
        if zero_stage == 0:
            try:
                _from_replicas(source, groups, target)
            except Exception as error:  # whatever a damaged pickle raises
                problem = reason(error)
        else:
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            command += ["--input_folder", str(source), "--output_folder", str(target)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while True:  # the others wait in short turns: how long this takes has no bound
        if process is not None and process.poll() is not None:
            problem = "" if process.returncode == 0 else (process.communicate()[1].strip().splitlines() or ["?"])[-1]
            process = None
        busy, problem = distributed.broadcast_object((process is not None, problem))
        if not busy:
            break
        time.sleep(0.5)
    if problem:
        raise UserError(
            f"{source}: cannot be converted to another number of ranks or ZeRO stage ({problem}). Go on with those "
            "that it was made with; where that fails too, remove it to go on from the checkpoint before it."
        )
    if distributed.rank() == 0 and zero_stage:
        _complete(target, groups)
    distributed.barrier()


def _from_replicas(source: Path, groups: list[dict[str, list[int]]], target: Path) -> None:
    """From ZeRO 0, where one file holds everything."""
    saved = torch.load(source / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False, mmap=True)
    states = saved["optimizer"]["state"]
    for number, name in enumerate(name for group in groups for name in group):
        values = {"fp32": saved["module"][name], **{key: states[number][key] for key in STATES[1:]}}
        for key, value in values.items():
            _write(target / "zero" / name / f"{key}.pt", {"param": value.float(), "cat_dim": 0})
        _write(target / "zero" / name / "step.pt", states[number]["step"].clone())
    _write_settings(target, {"ds_version": saved["ds_version"]}, states[0]["step"], len(groups))


def _complete(target: Path, groups: list[dict[str, list[int]]]) -> None:
    """Make what the converter wrote readable at every stage."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    settings = torch.load(target / "zero" / OPTIMIZER_STATE, map_location="cpu", weights_only=False)
    partitioned = "optimizer_state_dict" in settings  # ZeRO 3: flat tensors, the step in the settings only
    first = target / "zero" / next(iter(shapes))
    step = settings["optimizer_state_dict"]["state"][0]["step"] if partitioned else torch.load(first / "step.pt")
    for name, shape in shapes.items() if partitioned else ():
        for key in STATES:
            path = target / "zero" / name / f"{key}.pt"
            _write(path, {"param": torch.load(path, map_location="cpu").reshape(shape), "cat_dim": 0})
        _write(target / "zero" / name / "step.pt", torch.tensor(float(step)))
    kept = {key: settings[key] for key in ("loss_scaler", "dynamic_loss_scale", "ds_version") if key in settings}
    _write_settings(target, kept, step, len(groups))


def _write_settings(target: Path, kept: dict[str, Any], step: Any, groups: int) -> None:
    import deepspeed

    nothing: list[dict[str, Any]] = [{}] * groups  # learning rate and the like are the engine's own
    states = {"state": {0: {"step": step}}, "param_groups": nothing}
    whole = {"ds_version": deepspeed.__version__, **kept, "param_groups": nothing, "optimizer_state_dict": states}
    _write(target / "zero" / OPTIMIZER_STATE, whole)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def load(engine: Any, zero_stage: int, folder: Path) -> None:
    """Put the weights and optimizer states of a universal checkpoint into an engine of the given ZeRO stage.

    Raises:
        UserError: the optimizer's states lie on NVMe.
    """
    if zero_stage == 0:
        _into_replicas(engine, folder)
        return
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise UserError(
            f"{folder}: with the optimizer's states on NVMe, a run continues only with the number of ranks and the "
            "ZeRO stage that it had; expected the engine JSON and --processes of the run that was interrupted"
        )
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    events = zero_stage == 3
    if events:
        optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict(
        state_dict_list=None, load_optimizer_states=True, load_from_fp32_weights=False, checkpoint_folder=str(folder),
        load_serial=None, param_shapes=None,
    )  # fmt: skip
    if events:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in optimizer.optimizer.state.values():
        if "step" in state:  # one of its own for each, of the kind that torch's optimizers count with
            state["step"] = torch.tensor(float(state["step"]))


@torch.no_grad()
def _into_replicas(engine: Any, folder: Path) -> None:
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        here = folder / "zero" / name
        values = {key: torch.load(here / f"{key}.pt", map_location="cpu")["param"] for key in STATES}
        parameter.copy_(values["fp32"].view_as(parameter))
        step = torch.load(here / "step.pt")
        optimizer.state[parameter] = {
            "step": torch.as_tensor(float(step), dtype=torch.float32, device=parameter.device),
            **{key: values[key].view_as(parameter).to(parameter.device, copy=True) for key in STATES[1:]},
        }
