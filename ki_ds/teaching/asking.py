"""A teacher asked without waiting: while it computes one micro-batch, the host makes the view of the next and takes
what it said of the last.

On a GPU `ask` returns when the work is on its way, and `Answer.take` waits for it. The copies to the host are begun
before the next micro-batch is, since a device does one thing after the other. On a CPU `ask` is where the time goes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ki_ds.corpus.hashing import counter_hash, derive_key
from ki_ds.corpus.masking import View, Viewer
from ki_ds.corpus.stream import CorpusStream
from ki_ds.errors import UserError
from ki_ds.kernels.select.pack import Predictions, planes_of
from ki_ds.pinned import copied, host_tensor
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.selection import Selection
from ki_ds.teaching.teacher import Teacher


@dataclass(frozen=True)
class Question:
    """What a teacher is shown at some samples, on the host, ready to be sent."""

    samples: np.ndarray
    view: View
    rows: np.ndarray  # indices in the flattened [B · S]
    tensors: tuple[Tensor | None, ...]  # the arguments of a `Predictor`


class Said(NamedTuple):
    """What it said: packed rows, what packing cost each (nats), and the seconds it took."""

    planes: Planes
    distortion_n: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What a teacher says to a question, on its way to the host."""

    question: Question
    predictions: Predictions  # on the host, once `end` has passed
    seconds: float  # on a CPU
    begin: Any = None  # events of the device, on a GPU
    end: Any = None

    def take(self, codec: Codec, teacher: str) -> Said:
        """Wait for it.

        Raises:
            UserError: a prediction is not a number or infinite; names the sample and the row.
        """
        seconds, found, question = self.seconds, self.predictions, self.question
        if self.end is not None:
            self.end.synchronize()
            seconds = self.begin.elapsed_time(self.end) / 1e3
        broken = np.isnan(found.scalars["truth"].numpy())
        if broken.any():
            first = int(broken.argmax())
            which, index = divmod(int(question.rows[first]), question.view.inputs_BS.shape[1])
            row = int(question.view.loss_mask_BS[which, :index].sum())
            raise UserError(
                f"models.{teacher}: its prediction is not a number or infinite at sample {question.samples[which]} of "
                f"its corpus, row {row} (index {index}); the teacher's weights are broken, or too large for "
                "inference.precision. Expected finite logits, or -inf at some ids"
            )
        return Said(planes_of(found, codec), found.distortion_N.numpy(), seconds)


def question(
    samples: np.ndarray, tokens: np.ndarray, stream: CorpusStream, viewer: Viewer, selection: Selection
) -> Question:
    """The question at some samples of a stream over the sequences `tokens`."""
    sequences, views = stream.pairs(samples)
    view = viewer(tokens[sequences], sequences, views)
    rows = np.flatnonzero(view.loss_mask_BS)
    labels = view.labels_BS.reshape(-1)[rows]
    drawn = uniforms(derive_key("draw", stream.seed, stream.corpus), sequences, views, rows, view, selection)
    arrays = (view.inputs_BS.astype(np.int64), rows, labels.astype(np.int64), drawn)
    return Question(samples, view, rows, tuple(None if x is None else host_tensor(x) for x in arrays))


def ask(teacher: Teacher, asked: Question, device: torch.device) -> Answer | None:
    """Have a question computed; None: memory was short for it."""
    began = time.perf_counter()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    for event in events[:1]:
        event.record()
    try:
        given = (None if x is None else x.to(device, non_blocking=True) for x in asked.tensors)
        found = teacher.predict(*given).on_host(copied)
    except torch.OutOfMemoryError:
        return None
    for event in events[1:]:
        event.record()
    return Answer(asked, found, time.perf_counter() - began, *events)


def uniforms(
    key: int, sequences_B: np.ndarray, views_B: np.ndarray, rows_N: np.ndarray, view: View, selection: Selection
) -> np.ndarray | None:
    """float64 [N, draws] in [0, 1), for sampled targets: a function of the place alone, whatever the batch."""
    if not selection.counts:
        return None
    which, index = np.divmod(rows_N, view.inputs_BS.shape[1])
    places = (sequences_B[which][:, None], views_B[which][:, None], index[:, None])
    return (counter_hash(key, *places, np.arange(selection.k)[None, :]) >> np.uint64(11)) * 2.0**-53
