"""How a teacher is run: a copy on every rank, one cut among a few ranks (tensor parallel), or one partitioned over all
ranks (ZeRO-3); and how many sequences are computed at once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
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
from ki_ds.models.language_model import LanguageModel
from ki_ds.targets.codec import Codec
from ki_ds.targets.selection import Selection
from ki_ds.teaching.batch_size import MICRO_BATCH, REMEDY, MicroBatchFinder
from ki_ds.teaching.checks import DTYPES
from ki_ds.teaching.parallel import Partitioned, Replicated, TensorParallel


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


@dataclass
class Teacher:
    """A teacher that is ready to be asked."""

    predict: Callable[..., Predictions]  # of a Predictor's arguments
    group: Replicated | TensorParallel | Partitioned
    micro_batch: MicroBatchFinder
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
    micro_batch = MicroBatchFinder(own or MICRO_BATCH, growing, group.adapts)
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
