"""How a teacher is run: a copy on every rank, one cut among a few ranks (tensor parallel), or one partitioned over all
ranks (ZeRO-3); and how many sequences are computed at once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ki_ds.engine.config import InferenceEngineConfig
from ki_ds.errors import UserError, reason
from ki_ds.experiment.schema import Inference
from ki_ds.kernels.select.eager import Predictions, select_targets
from ki_ds.launch import distributed
from ki_ds.models import flops
from ki_ds.models.language_model import LanguageModel
from ki_ds.targets.codec import Codec
from ki_ds.targets.selection import Selection
from ki_ds.teaching.parallel import Partitioned, Replicated, TensorParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MICRO_BATCH = 16  # sequences
WORTH = 1.05  # so much faster must twice the micro-batch be, to be kept
REMEDY = (
    'Expected more memory, or in "inference" of the experiment file: "precision": "bf16", or "tensor_parallel": 2 or '
    'more, or "engine": a DeepSpeed JSON with ZeRO stage 3'
)


class Predictor(nn.Module):
    """What a teacher says at given rows."""

    def __init__(self, model: LanguageModel, selection: Selection, codec: Codec):
        super().__init__()
        self.model, self.selection, self.codec = model, selection, codec

    def forward(
        self, input_ids_BS: Tensor, rows_N: Tensor, labels_N: Tensor, uniforms_NK: Tensor | None
    ) -> Predictions:
        """What is kept at N rows of the flattened input; a bounded number of logits at a time."""
        hidden_ND = self.model.hidden(input_ids_BS, rows_N)
        head, codec = self.model.head, self.codec
        return select_targets(
            hidden_ND, head.weight, head.bias, labels_N, self.selection, codec.quantum, codec.temperatures, uniforms_NK,
            vocabulary=head.vocabulary, logit_transform=head.logit_transform,
        )  # fmt: skip


# ------------------------------------------------------------------------------------- before anything runs


def check(settings: Inference, processes: int, teachers: Mapping[str, Any], objective: str) -> None:
    """Check that teachers can be run as the experiment's `inference` says.

    Args:
        teachers: Hugging Face configurations by the models' names.

    Raises:
        UserError: the ranks cannot be grouped, the machine lacks the precision, or a teacher cannot be cut.
    """
    size = settings.tensor_parallel
    if processes % size:
        raise UserError(
            f"inference.tensor_parallel: {size} does not divide the {processes} processes; expected a divisor, or "
            f"--processes with a multiple of {size}"
        )
    if settings.precision != "fp32":
        _check_precision(settings.precision)
    for name, config in teachers.items() if size > 1 else ():
        _check_tensor_parallel(config, objective, size, f"models.{name}")


def _check_precision(precision: str) -> None:
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().supported_dtypes()
    if DTYPES[precision] not in found:
        able = [name for name in ("bf16", "fp32") if DTYPES[name] in found and name != precision]
        raise UserError(
            f'inference.precision: this machine ({get_accelerator().device_name()}) cannot compute in "{precision}"; '
            f"expected {' or '.join(able)}"
        )


def _check_tensor_parallel(config: Any, objective: str, size: int, place: str) -> None:
    from deepspeed.module_inject.auto_tp import AutoTP

    outline = flops.outline(config, objective)
    try:
        AutoTP.tp_parser(outline)
    except AssertionError:
        raise UserError(
            f"{place}: DeepSpeed cannot cut a {config.model_type} model for inference.tensor_parallel {size}; expected "
            "1, or inference.engine with ZeRO stage 3"
        ) from None
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise UserError(f"{place}: {name} is {heads}; expected inference.tensor_parallel {size} to divide it")


# -------------------------------------------------------------------------------------------- micro-batches


class MicroBatch:
    """How many sequences are computed at once: a fixed number, or found by doubling."""

    def __init__(self, size: int, growing: bool, halving: bool):
        self.size, self.growing, self.halving = size, growing, halving
        self.rates: dict[int, float] = {}  # sequences a second, the best of two
        self.seen = 0

    def took(self, sequences: int, seconds: float) -> None:
        """Hear how long a micro-batch took, and double the size while that pays."""
        if not self.growing or sequences < self.size:
            return
        self.rates[self.size] = max(self.rates.get(self.size, 0.0), sequences / max(seconds, 1e-9))
        self.seen += 1
        if self.seen < 2:  # the first of a size may pay for what later ones find ready
            return
        self.seen = 0
        if self.size // 2 in self.rates and self.rates[self.size] < WORTH * self.rates[self.size // 2]:
            self.size, self.growing = self.size // 2, False
        else:
            self.size *= 2

    def failed(self, sequences: int, place: str) -> None:
        """Hear that memory was short for so many sequences; the next try is for half of them.

        Raises:
            UserError: there is nothing to halve.
        """
        if not self.halving:
            raise UserError(
                f"{place}: memory was short for {sequences} sequences at once. Expected a smaller "
                "inference.micro_batch_size"
            )
        if sequences == 1:
            raise UserError(f"{place}: memory was short for a single sequence. {REMEDY}")
        self.size, self.growing = sequences // 2, False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------- engines


@dataclass
class Teacher:
    """A teacher that is ready to be asked."""

    predict: Callable[..., Predictions]  # of a Predictor's arguments
    group: Replicated | TensorParallel | Partitioned
    micro_batch: MicroBatch
    close: Callable[[], None]


def teacher(
    load: Callable[[torch.dtype], Any],
    name: str,
    selection: Selection,
    codec: Codec,
    settings: Inference,
    config: InferenceEngineConfig | None,
    device: torch.device,
) -> Teacher:
    """A teacher under DeepSpeed; every rank calls this.

    Args:
        load: gives the Hugging Face model, in a type.
        config: the DeepSpeed JSON of `settings.engine`.

    Raises:
        UserError: memory is short for it.
    """
    place, dtype = f"models.{name}", DTYPES[settings.precision]

    def predictor() -> Predictor:
        return Predictor(LanguageModel(load(dtype).eval(), codec.vocabulary, place), selection, codec)

    group: Replicated | TensorParallel | Partitioned = Replicated()
    try:
        if config is not None:
            engine = _partitioned(predictor, config)
            group = Partitioned(lambda: engine(*_nothing(selection, device)))
        elif settings.tensor_parallel > 1:
            engine, group = _tensor_parallel(predictor(), dtype, settings.tensor_parallel, device)
        else:
            engine = _replicated(predictor(), dtype, device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{place}: memory is short for the teacher itself ({reason(error)}). {REMEDY}") from None
    own = settings.micro_batch_size
    growing = group.adapts and own is None and device.type == "cuda"
    micro_batch = MicroBatch(own or MICRO_BATCH, growing, group.adapts)
    return Teacher(engine, group, micro_batch, engine.destroy if config is not None else lambda: None)


def _replicated(predictor: Predictor, dtype: torch.dtype, device: torch.device) -> Any:
    import deepspeed

    with _buffers_kept(predictor):
        return deepspeed.init_inference(predictor.to(device), dtype=dtype, replace_with_kernel_inject=False)


def _tensor_parallel(
    predictor: Predictor, dtype: torch.dtype, size: int, device: torch.device
) -> tuple[Any, TensorParallel]:
    """DeepSpeed cuts the layers; embeddings and the head stay whole on every rank."""
    import deepspeed

    group, first = _groups(size)
    backbone = predictor.model.backbone
    # without tp_group, DeepSpeed 0.19 takes the group from mpu but leaves every layer whole
    parallel = {"tp_size": size, "mpu": _ModelParallel(group), "tp_group": group}
    with _buffers_kept(predictor), contextlib.redirect_stdout(io.StringIO()):  # AutoTP tells what it does
        deepspeed.init_inference(backbone, dtype=dtype, replace_with_kernel_inject=False, tensor_parallel=parallel)
        predictor.to(device)
    return predictor, TensorParallel(group, first)


@cache
def _groups(size: int) -> tuple[Any, int]:
    """The group of consecutive ranks that this rank belongs to, and its first rank."""
    starts = range(0, distributed.world_size(), size)
    groups = [torch.distributed.new_group([*range(start, start + size)]) for start in starts]
    return groups[distributed.rank() // size], starts[distributed.rank() // size]


@dataclass
class _ModelParallel:
    """What DeepSpeed asks of its `mpu`."""

    group: Any

    def get_model_parallel_group(self) -> Any:
        return self.group


def _partitioned(predictor: Callable[[], Predictor], config: InferenceEngineConfig) -> Any:
    """ZeRO-3 without an optimizer: the parameters are partitioned while they are loaded (rank 0 reads the files)."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    joined = config.for_deepspeed
    partitioning = HfDeepSpeedConfig(joined)  # what is loaded while this lives is partitioned
    model = predictor()
    del partitioning
    engine, *_ = deepspeed.initialize(model=model, config=joined, dist_init_required=False)
    engine.eval()
    return engine


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Any:
    """Keep DeepSpeed from casting buffers: the frequencies of rotary positions lose their meaning in half precision."""
    kept = [(one, name, buffer) for one in module.modules() for name, buffer in one._buffers.items()]
    yield
    for one, name, buffer in kept:
        if buffer is not None and buffer.is_floating_point():
            now = one._buffers[name]
            one._buffers[name] = buffer.to(buffer.device if now is None else now.device)


def _nothing(selection: Selection, device: torch.device) -> tuple[Any, ...]:
    """Arguments of a forward pass whose result nobody reads."""
    one = torch.zeros(1, dtype=torch.int64, device=device)
    drawn = torch.zeros(1, selection.k, dtype=torch.float64, device=device) if selection.kind == "sampled" else None
    return torch.zeros(1, 8, dtype=torch.int64, device=device), one, one, drawn
