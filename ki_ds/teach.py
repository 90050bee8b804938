"""Stage: teacher model + tokens → targets.

The teacher runs under DeepSpeed inference, data parallel over ranks, over exactly the stream positions that the
students read while α_t > 0. A shard is a fixed range of positions, computed in the same micro-batches whoever comes to
it, so that an interrupted run continues and ends with the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ki_ds import distributed
from ki_ds.corpus.hashing import counter_hash, derive_key
from ki_ds.corpus.masking import View, Viewer
from ki_ds.corpus.stream import CorpusStream
from ki_ds.corpus.tokens import Tokens
from ki_ds.errors import UserError
from ki_ds.experiment import Distortion
from ki_ds.kernels.select import Predictions, select_targets
from ki_ds.language_model import LanguageModel
from ki_ds.progress import Progress
from ki_ds.sealed import MANIFEST, UNSEALED, Identity, Manifest, begun, prepare, read_manifest, reopen, state
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.folder import ShardFolder, finish
from ki_ds.targets.selection import Selection
from ki_ds.targets.shard import Block, check_bound, pack_block, write_shard

MICRO_BATCH = 16  # sequences
ENCODERS = 4  # threads that encode and compress while the teacher computes on


@dataclass(frozen=True)
class Lesson:
    """What a teacher is asked: the first `positions` of a corpus's stream, and what is kept of its answers."""

    load: Callable[[], Any]  # the teacher as a Hugging Face model, loaded only where something is missing
    teacher_name: str
    tokens: Tokens
    stream: CorpusStream
    viewer: Viewer
    positions: int
    positions_per_shard: int
    selection: Selection
    codec: Codec
    header: dict[str, Any]  # of every shard
    bound: Distortion


def teach(folder: Path, identity: Identity, lesson: Lesson, device: torch.device) -> Manifest:
    """Compute what is missing of a targets folder and seal it; every rank calls this.

    Raises:
        UserError: the folder belongs to something else, the disk is full, or the bound on the distortion is not met.
    """
    sealed, positions, per_shard = None, lesson.positions, lesson.positions_per_shard
    if distributed.rank() == 0:
        found = state(folder, identity)
        if found in ("sealed", "unsealed"):  # what was stored once stays, on its own grid of shards
            facts = begun(folder)
            positions = max(positions, facts.get("positions", 0))
            per_shard = facts.get("positions_per_shard", per_shard)
        elif found == "other" and not (folder / MANIFEST).exists() and not any(folder.glob("*.kit")):
            (folder / UNSEALED).unlink()  # begun with other settings, but nothing was stored
        grid = {"positions_per_shard": per_shard}
        if found == "sealed" and not complete(folder, positions):
            # a longer run than before, or a shard that was set aside: what is missing is added
            reopen(folder, identity, {**grid, "positions": positions})
        sealed = prepare(folder, identity, grid)
    sealed, positions, per_shard = distributed.from_first((sealed, positions, per_shard))
    if sealed is not None:
        return sealed
    lesson = replace(lesson, positions=positions, positions_per_shard=per_shard)
    shards = ShardFolder(folder, positions, per_shard)
    missing = distributed.from_first(shards.missing() if distributed.rank() == 0 else None)
    engine = inference_engine(lesson, device)
    done = (len(shards) - len(missing)) * lesson.positions_per_shard
    shown = distributed.rank() == 0
    with Progress(f"teach {folder.name}", lesson.positions, "sequences", done, shown) as progress:
        for number in distributed.share_out(len(missing)):
            progress.reach(done + number * lesson.positions_per_shard)  # what other ranks have taken counts too
            start = missing[number] * lesson.positions_per_shard
            end = min(start + lesson.positions_per_shard, lesson.positions)
            blocks = compute(engine, lesson, np.arange(start, end), device, progress)
            place = f"models.{lesson.teacher_name}: its targets from stream position {start} on"
            check_bound(blocks, lesson.bound, lesson.codec, place)
            write_shard(folder / shards.name(missing[number]), lesson.codec, lesson.header, start, blocks)
    if distributed.rank() == 0:
        if shards.missing():
            raise UserError(
                f"{folder}: shards that other ranks wrote are not here. --workdir must lie on a file system that all "
                "nodes share."
            )
        for path in folder.glob("*.kit"):
            if not shards.fits(path.name):
                path.unlink()  # the last, partial shard of another length; whole ones are of use to a longer run
        sealed = finish(folder, identity, positions, per_shard, lesson.header)
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

    model = LanguageModel(lesson.load().eval(), lesson.codec.vocabulary, lesson.teacher_name)
    predictor = Predictor(model, lesson.selection, lesson.codec).to(device)
    return deepspeed.init_inference(predictor, dtype=torch.float32, replace_with_kernel_inject=False)


class Predictor(nn.Module):
    """What a teacher says at given positions."""

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
            vocabulary=head.vocabulary, logits=head.logits,
        )  # fmt: skip


@torch.inference_mode()
def compute(
    engine: Any, lesson: Lesson, positions: np.ndarray, device: torch.device, progress: Progress
) -> list[Block]:
    """The frames of the given positions; compressed in threads while the teacher goes on.

    Raises:
        UserError: the teacher's prediction is not a number.
    """
    blocks: list[Block] = []
    waiting: deque[Future[Block]] = deque()
    draw_key = derive_key("draw", lesson.stream.seed, lesson.stream.corpus)
    with ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoder") as encoders:
        for begin in range(0, len(positions), MICRO_BATCH):
            sequences, views = lesson.stream.pairs(positions[begin : begin + MICRO_BATCH])
            view = lesson.viewer(lesson.tokens.train[sequences], sequences, views)
            rows = np.flatnonzero(view.targets_BS)
            labels = view.labels_BS.reshape(-1)[rows]
            drawn = uniforms(draw_key, sequences, views, rows, view, lesson.selection)
            arrays = (view.inputs_BS.astype(np.int64), rows, labels.astype(np.int64), drawn)
            found = engine(*(None if x is None else torch.from_numpy(x).to(device) for x in arrays))
            if torch.isnan(found.scalars["truth"]).any():
                raise UserError(
                    f"models.{lesson.teacher_name}: a prediction is not a number at stream position "
                    f"{positions[begin]} of its corpus; the teacher's weights are broken"
                )
            planes, distortion_n = on_host(found, lesson.codec), found.distortion_N.cpu().numpy()
            waiting.append(encoders.submit(_pack, lesson, planes, distortion_n, view))
            if len(waiting) > ENCODERS:
                blocks.append(waiting.popleft().result())
            progress.advance(len(sequences))
        blocks += [future.result() for future in waiting]
    return blocks


def on_host(found: Predictions, how: Codec) -> Planes:
    """Predictions as they are stored."""
    ids, values, count = (x.cpu().numpy() for x in (found.ids_NK, found.values_NK, found.count_N))
    high = None if found.high_NK is None else found.high_NK.cpu().numpy()
    scalars = how.store({name: x.cpu().numpy() for name, x in found.scalars.items()}, len(ids))
    return Planes(ids.view(np.uint16), high, values, count.astype(np.uint16), scalars)


def _pack(lesson: Lesson, planes: Planes, distortion_n: np.ndarray, view: View) -> Block:
    ends = np.cumsum(view.targets_BS.sum(axis=1))
    return pack_block(lesson.codec, planes, ends, lesson.viewer.digests(view), distortion_n)


def uniforms(
    key: int, sequences_B: np.ndarray, views_B: np.ndarray, rows_N: np.ndarray, view: View, selection: Selection
) -> np.ndarray | None:
    """float64 [N, draws] in [0, 1), for sampled targets: a function of the place alone, whatever the batch."""
    if selection.kind != "sampled":
        return None
    which, index = np.divmod(rows_N, view.inputs_BS.shape[1])
    places = (sequences_B[which][:, None], views_B[which][:, None], index[:, None])
    return (counter_hash(key, *places, np.arange(selection.k)[None, :]) >> np.uint64(11)) * 2.0**-53
