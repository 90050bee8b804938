"""The DeepSpeed engine: the engine JSON joined with the experiment's numbers, the optimizer, checkpoints, export."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ki_ds import distributed
from ki_ds.batches import Plan
from ki_ds.errors import UserError, nearest, reason
from ki_ds.experiment import Train
from ki_ds.language_model import LanguageModel
from ki_ds.sealed import remedy, sync, write_atomically

WRITE_FAILED = ("PytorchStreamWriter", "file write failed", "No space left")  # how torch says that a disk is full
OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "train.learning_rate, betas, epsilon and weight_decay",
    "scheduler": "train.learning_rate and train.warmup",
}


KNOWN = (
    "fp16", "bf16", "zero_optimization", "torch_autocast", "amp", "data_types", "activation_checkpointing",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "comms_logger",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "aio", "checkpoint", "compile", "timers",
)  # fmt: skip


def check(config: dict[str, Any], source: str) -> None:
    """Refuse an engine JSON that gives a number of the experiment's, or a combination known to be wrong.

    Raises:
        UserError: naming the key.
    """
    for key in config:
        if key not in KNOWN and key not in OWNED:
            raise UserError(f"{source}: {key}: unknown key of a DeepSpeed configuration{nearest(key, KNOWN)}")
    for key in ("fp16", "bf16", "zero_optimization"):
        block = config.get(key, {})
        if not isinstance(block, dict) or not isinstance(block.get("enabled", False), bool):
            raise UserError(f'{source}: {key}: found {json.dumps(block)}; expected an object, "enabled" true or false')
        if key != "zero_optimization" and block and "enabled" not in block:
            raise UserError(f'{source}: {key}: "enabled" is missing, so DeepSpeed would ignore the rest')
    found = config.get("zero_optimization", {}).get("stage", 0)
    if found not in (0, 1, 2, 3):
        raise UserError(f"{source}: zero_optimization.stage: found {json.dumps(found)}; allowed: 0, 1, 2, 3")
    for key in ("offload_optimizer", "offload_param"):
        if config.get("zero_optimization", {}).get(key, {}).get("device", "none") != "none":
            raise UserError(
                f"{source}: zero_optimization.{key}: offload is not supported by this version; leave it out"
            )
    for key, owner in OWNED.items():
        if config.get(key, "auto") != "auto":
            raise UserError(
                f"{source}: {key}: the experiment owns this number ({owner}); leave it out of the engine JSON"
            )
    halves = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
    if len(halves) == 2:
        raise UserError(f"{source}: fp16 and bf16 are both enabled; choose one")
    if halves and stage(config) == 0:
        raise UserError(
            f"{source}: {halves[0]} with ZeRO stage 0: DeepSpeed takes a wrong first optimizer step there; "
            'expected "zero_optimization": {"stage": 1} or higher'
        )
    if halves == ["fp16"] and not torch.cuda.is_available():
        raise UserError(f"{source}: fp16 needs a GPU; on this machine use an engine JSON with fp32 or bf16")


def stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of an engine JSON."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def precision(config: dict[str, Any]) -> dict[str, Any]:
    """The parts of an engine JSON that decide in which precision is computed."""
    return {name: config[name] for name in ("fp16", "bf16", "torch_autocast", "amp", "data_types") if name in config}


def micro_batch_size(train: Train, world_size: int, place: str) -> int:
    """Sequences a rank computes at once: as given, or the largest divisor of its share up to 32.

    Raises:
        UserError: the world size, or the micro-batch size, does not divide the batch.
    """
    if train.batch_size % world_size:
        raise UserError(
            f"{place}.train.batch_size: {train.batch_size} cannot be divided among {world_size} processes; "
            f"expected a multiple of {world_size}, or another --processes"
        )
    share = train.batch_size // world_size
    if train.micro_batch_size is None:
        return next(size for size in range(min(32, share), 0, -1) if share % size == 0)
    if share % train.micro_batch_size:
        raise UserError(
            f"{place}.train.micro_batch_size: {train.micro_batch_size} does not divide a process's share of the batch, "
            f"{share} ({train.batch_size} sequences over {world_size} processes)"
        )
    return train.micro_batch_size


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips, and skips a step that is not finite: at ZeRO 0 DeepSpeed leaves both to the optimizer."""

    clip = 0.0
    overflow = False  # DeepSpeed reads this after the step
    norm: float | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"))
        self.norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        return None if self.overflow else super().step(closure)


class Engine:
    """A DeepSpeed engine around a language model, stepped with a learning rate given at every step."""

    def __init__(self, model: LanguageModel, train: Train, plan: Plan, config: dict[str, Any]):
        import deepspeed

        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]  # biases and norms do not decay (Devlin et al. 2019)
        self.bare = stage(config) == 0
        optimizer = (GuardedAdamW if self.bare else torch.optim.AdamW)(
            [{"params": matrices, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=train.learning_rate, betas=train.betas, eps=train.epsilon, fused=True,
        )  # fmt: skip
        self.fp16 = bool(config.get("fp16", {}).get("enabled"))
        if isinstance(optimizer, GuardedAdamW):
            optimizer.clip = train.gradient_clipping
        joined = {
            **{key: value for key, value in config.items() if key not in OWNED},
            "train_batch_size": plan.batch_size,
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.accumulation,
            "gradient_clipping": 0.0 if self.bare else train.gradient_clipping,
            "steps_per_print": 1 << 40,
        }
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=joined, dist_init_required=False
        )
        self.optimizer = optimizer
        if stage(config) in (1, 2):  # they check in half precision only
            self.deepspeed.optimizer.check_grad_overflow = True

    def step(self, learning_rate: float) -> tuple[bool, float]:
        """Apply the accumulated gradients: (whether they were finite and applied, their norm before clipping)."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        norm = (
            self.optimizer.norm if isinstance(self.optimizer, GuardedAdamW) else self.deepspeed.get_global_grad_norm()
        )
        return bool(self.deepspeed.was_step_applied()), float("nan") if norm is None else float(norm)

    # --------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path, step: int, keep: int, state: dict[str, Any]) -> None:
        """Write checkpoint `step`; `latest` names it only once it is whole; the last `keep` are kept.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        tag = f"step-{step:08d}"
        try:
            self.deepspeed.save_checkpoint(str(folder), tag=tag, client_state={"ki_ds": state}, save_latest=False)
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

    def resume(self, folder: Path, state: dict[str, Any]) -> int:
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
            path, client = self.deepspeed.load_checkpoint(str(folder), tag=tag)
        except Exception as error:  # whatever a damaged pickle raises
            raise UserError(f"{saved}: cannot be loaded ({reason(error)}). {_older(folder, tag)}") from None
        if path is None or "ki_ds" not in client:
            raise UserError(f"{saved}: is not whole. {_older(folder, tag)}")
        found = client["ki_ds"]
        if found["state"] != state:
            raise UserError(
                f"{saved}: belongs to another run: {json.dumps(found['state'])}, expected {json.dumps(state)}"
            )
        return int(found["step"])

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder, safetensors only; afterwards this engine must not be used."""
        import deepspeed

        model: LanguageModel = self.deepspeed.module
        partitioned = stage(self.deepspeed.config) == 3
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=partitioned):
            if distributed.rank() == 0:
                model.whole().save_pretrained(folder, safe_serialization=True)
        distributed.barrier()


def _older(folder: Path, tag: str) -> str:
    others = sorted(other.name for other in folder.glob("step-*") if other.name < tag)
    if others:
        return f"To go on from the one before it, write {others[-1]} into {folder / 'latest'}."
    return f"Remove {folder.parent} to begin again."
