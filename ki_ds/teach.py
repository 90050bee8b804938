"""Stage: teacher model + tokens → targets.

The teacher runs under DeepSpeed inference, data parallel over ranks, over exactly the stream positions that the
students read while α_t > 0. A shard is a fixed range of positions, computed in the same micro-batches whoever comes to
it, so that an interrupted run continues and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ki_ds import distributed
from ki_ds.corpus.masking import Viewer
from ki_ds.corpus.stream import CorpusStream
from ki_ds.corpus.tokens import Tokens
from ki_ds.errors import UserError
from ki_ds.models import LanguageModel
from ki_ds.progress import Progress
from ki_ds.sealed import MANIFEST, Identity, Manifest, prepare, read_manifest, reopen, seal, state
from ki_ds.targets import codec, select
from ki_ds.targets.shard import Frame, ShardFolder, write_shard

MICRO_BATCH = 16  # sequences
LOGIT_BYTES = 64 << 20  # of fp32 logits at once


@dataclass(frozen=True)
class Lesson:
    """What a teacher is asked: the first `positions` of a corpus's stream, k ids at each target position."""

    load: Callable[[], Any]  # the teacher as a Hugging Face model, loaded only where something is missing
    teacher_name: str
    tokens: Tokens
    stream: CorpusStream
    viewer: Viewer
    positions: int
    k: int
    vocabulary: int
    positions_per_shard: int


def teach(folder: Path, identity: Identity, lesson: Lesson, device: torch.device) -> Manifest:
    """Compute what is missing of a targets folder and seal it; every rank calls this.

    Raises:
        UserError: the folder belongs to something else, or the disk is full.
    """
    shards = ShardFolder(folder, lesson.positions, lesson.positions_per_shard)
    sealed = None
    if distributed.rank() == 0:
        if state(folder, identity) == "sealed" and not complete(folder, lesson.positions):
            reopen(folder, identity)  # a longer run than before, or a shard that was set aside, adds what is missing
        sealed = prepare(folder, identity)
    sealed = distributed.from_first(sealed)
    if sealed is not None:
        return sealed
    missing = distributed.from_first(shards.missing() if distributed.rank() == 0 else None)
    engine = inference_engine(lesson, device)
    header = {**identity.record, "k": lesson.k, "vocabulary": lesson.vocabulary, "quantum": codec.QUANTUM,
              "sequence_length": lesson.tokens.train.shape[1]}  # fmt: skip
    done = (len(shards) - len(missing)) * lesson.positions_per_shard
    shown = distributed.rank() == 0
    with Progress(f"teach {folder.name}", lesson.positions, "sequences", done, shown) as progress:
        for number in distributed.share_out(len(missing)):
            progress.reach(done + number * lesson.positions_per_shard)  # what other ranks have taken counts too
            start = missing[number] * lesson.positions_per_shard
            end = min(start + lesson.positions_per_shard, lesson.positions)
            frames, worst = compute(engine, lesson, np.arange(start, end), device, progress)
            write_shard(folder / shards.name(missing[number]), {**header, **worst, "start": start, "end": end}, frames)
    if distributed.rank() == 0:
        if shards.missing():
            raise UserError(
                f"{folder}: shards that other ranks wrote are not here. --workdir must lie on a file system that all "
                "nodes share."
            )
        for stray in set(folder.glob("*.kit")) - {folder / shards.name(number) for number in range(len(shards))}:
            stray.unlink()  # the last, partial shard of a shorter run
        facts = {"positions": lesson.positions, "positions_per_shard": lesson.positions_per_shard, "k": lesson.k,
                 "vocabulary": lesson.vocabulary, "quantum": codec.QUANTUM}  # fmt: skip
        sealed = seal(folder, identity, facts)
    return distributed.from_first(sealed)


def complete(folder: Path, positions: int) -> bool:
    """Whether a sealed folder has all its shards, for so many positions or more."""
    if not (folder / MANIFEST).exists():
        return False
    facts = read_manifest(folder)["facts"]
    return (
        facts["positions"] >= positions
        and not ShardFolder(folder, facts["positions"], facts["positions_per_shard"]).missing()
    )


def inference_engine(lesson: Lesson, device: torch.device) -> Any:
    """The teacher under DeepSpeed inference; called as a `Predictor`."""
    import deepspeed

    model = LanguageModel(lesson.load().eval(), lesson.vocabulary, lesson.teacher_name)
    predictor = Predictor(model).to(device)
    return deepspeed.init_inference(predictor, dtype=torch.float32, replace_with_kernel_inject=False)


class Predictor(nn.Module):
    """What a teacher says at given positions."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids_BS: Tensor, rows_N: Tensor, labels_N: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids [N, K], their log-probabilities [N, K] and the true token's [N]; a bounded number of logits at a time."""
        hidden_ND = self.model.hidden(input_ids_BS, rows_N)
        weight, bias = self.model.head.parameters_VD()
        size = max(LOGIT_BYTES // (4 * weight.shape[0]), 1)
        parts = []
        for start in range(0, max(len(hidden_ND), 1), size):
            logits = torch.nn.functional.linear(hidden_ND[start : start + size], weight, bias)
            ids, logp, normaliser = select.top_k(logits, k)
            truth = logits.gather(1, labels_N[start : start + size, None]).squeeze(1).float() - normaliser
            parts.append((ids, logp, truth))
        ids_NK, logp_NK, truth_N = (torch.cat(column) for column in zip(*parts, strict=True))
        return ids_NK, logp_NK, truth_N


@torch.inference_mode()
def compute(
    engine: Any, lesson: Lesson, positions: np.ndarray, device: torch.device, progress: Progress
) -> tuple[list[Frame], dict[str, float]]:
    """The frames of the given positions, and the mean and largest distortion of their targets in nats.

    Raises:
        UserError: the teacher's prediction is not finite.
    """
    frames: list[Frame] = []
    distortions: list[np.ndarray] = []
    for begin in range(0, len(positions), MICRO_BATCH):
        sequences, views = lesson.stream.pairs(positions[begin : begin + MICRO_BATCH])
        view = lesson.viewer(lesson.tokens.train[sequences], sequences, views)
        rows = np.flatnonzero(view.targets_BS)
        labels = view.labels_BS.reshape(-1)[rows]
        given = (
            torch.from_numpy(x).to(device) for x in (view.inputs_BS.astype(np.int64), rows, labels.astype(np.int64))
        )
        ids, logp, truth = (x.cpu().numpy() for x in engine(*given, lesson.k))
        if not np.isfinite(truth).all():
            raise UserError(
                f"models.{lesson.teacher_name}: a prediction is not finite at stream position "
                f"{positions[begin]} of its corpus; the teacher's weights are broken"
            )
        planes = codec.pack(ids, logp, truth, lesson.vocabulary)
        distortions.append(codec.distortion(logp, planes))
        ends = np.cumsum(view.targets_BS.sum(axis=1))
        for index, digest in enumerate(lesson.viewer.digests(view)):
            frames.append(Frame(int(digest), planes.rows(slice(ends[index - 1] if index else 0, ends[index]))))
        progress.advance(len(sequences))
    every = np.concatenate(distortions)
    return frames, {"distortion_mean": float(every.mean()), "distortion_max": float(every.max())} if len(every) else {}
