"""A teacher's job: its predictions over a range of samples, shard by shard.

The teacher runs under DeepSpeed (`ki_ds.teaching`) over exactly the samples that the students read while
α_t > 0. A shard is a fixed range of samples, computed in the same micro-batches whoever comes to it, so that an
interrupted run continues and ends with the same bytes. After the start, ranks that have a teacher each need nothing of
one another but the folder (`ki_ds.teaching.claims`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ki_ds.corpus.masking import View, Viewer
from ki_ds.corpus.stream import CorpusStream
from ki_ds.corpus.tokens import Tokens
from ki_ds.errors import UserError
from ki_ds.launch import distributed, heartbeat
from ki_ds.progress import Progress
from ki_ds.sealed import MANIFEST, UNSEALED, Identity, Manifest, prepare, reopen, state
from ki_ds.targets.codec import Codec
from ki_ds.targets.distortion import Bound, Distortion, check_bound
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.manifest import MOST_SHARDS, TargetFacts, begun_grid, open_folder, seal_targets
from ki_ds.targets.selection import Selection
from ki_ds.targets.shard import FrameBlock, pack_block, write_shard
from ki_ds.teaching.asking import Answer, Question, Said, ask, question
from ki_ds.teaching.claims import Claims, sealed_by_one, shared
from ki_ds.teaching.teacher import Teacher

ENCODERS = 4  # threads that encode and compress while the teacher computes on
AHEAD = 1  # micro-batches that the device computes while the host takes what was said of an earlier one


@dataclass(frozen=True)
class TeachJob:
    """What a teacher is shown: the first `samples` of a corpus's stream; and what is kept of its predictions."""

    teacher: Callable[[torch.device], Teacher]  # loaded only where something is missing
    teacher_name: str
    tokens: Tokens
    stream: CorpusStream
    viewer: Viewer
    samples: int
    samples_per_shard: int
    selection: Selection
    header: FolderHeader  # of every shard
    bound: Bound

    @property
    def codec(self) -> Codec:
        """How rows are packed."""
        return self.header.codec


def teach(folder: Path, identity: Identity, job: TeachJob, device: torch.device) -> Manifest:
    """Compute what is missing of a targets folder and seal it; every rank calls this.

    Raises:
        UserError: the folder belongs to something else, the disk is full, or the bound on the distortion is not met.
    """
    sealed, samples, per_shard = None, job.samples, job.samples_per_shard
    if distributed.rank() == 0:
        found = state(folder, identity)
        if found in ("sealed", "unsealed"):
            stored, per_shard = begun_grid(folder, per_shard)
            samples = max(samples, stored)
        elif found == "other" and not (folder / MANIFEST).exists() and not any(folder.glob("*.kit")):
            (folder / UNSEALED).unlink()  # begun with other settings, but nothing was stored
        grid = {"samples_per_shard": per_shard}
        if -(-samples // per_shard) > MOST_SHARDS:
            raise UserError(
                f"{folder}: {samples} samples in shards of {per_shard} are more than {MOST_SHARDS} files; expected a "
                "larger samples_per_shard"
            )
        if found == "sealed" and not complete(folder, samples):
            # a longer run than before, or a shard that was set aside: what is missing is added
            check_unchanged(folder)
            reopen(folder, identity, {**grid, "samples": samples})
        sealed = prepare(folder, identity, grid)
    sealed, samples, per_shard = distributed.broadcast_object((sealed, samples, per_shard))
    if sealed is not None:
        return sealed
    job = replace(job, samples=samples, samples_per_shard=per_shard)
    shards = ShardFolder(folder, samples, per_shard)
    claims = shared(shards)
    if claims.left:
        fill(shards, claims, job, device)

    facts = TargetFacts(samples, per_shard, job.header)
    return sealed_by_one(claims, lambda: seal_targets(folder, identity, facts), f"teach {folder.name}")


def fill(shards: ShardFolder, claims: Claims, job: TeachJob, device: torch.device) -> None:
    """Compute shards until all are there; every rank calls this.

    Raises:
        UserError: as `teach`.
        Stopped: it was asked for.
    """
    folder, total = Path(shards.folder), job.samples
    with heartbeat.lengthy(f"teach {folder.name}: loading models.{job.teacher_name}"):
        teacher = job.teacher(device)
    done, shown = max(total - len(claims.left) * job.samples_per_shard, 0), distributed.rank() == 0
    storing: list[Future[None]] = []  # the last shard, while the next one is computed

    def stored() -> None:
        """Wait for it."""
        while storing:
            storing.pop().result()

    def task() -> int | None:
        """The next shard."""
        if not claims.untried:  # else the one that is being stored would look like another rank's that is slow
            stored()
        return claims.next(teacher.group.backs_up)

    try:
        with (
            torch.inference_mode(),
            Progress(f"teach {folder.name}", total, "sequences", done, shown) as progress,
            ThreadPoolExecutor(1, thread_name_prefix="writer") as writer,
        ):
            while (number := teacher.group.task(task)) is not None:
                start = number * job.samples_per_shard
                samples = np.arange(start, min(start + job.samples_per_shard, total))
                written = claims.count() + sum(not one.done() for one in storing) if shown else 0
                there = min(written * job.samples_per_shard, total)

                def told(here: int, number: int = number, count: int = len(samples), there: int = there) -> bool:
                    """Say how far this shard is; whether it is still wanted."""
                    heartbeat.report(f"teach {folder.name}: shard {number}, {here} of {count} sequences")
                    progress.reach(there + here)
                    progress.advance(0)
                    return not claims.there(number)

                blocks = compute(teacher, job, samples, device, told)
                if blocks is not None and teacher.group.leads:
                    place = f"models.{job.teacher_name}: its targets from sample {start} on"
                    lost = Distortion.of(block.distortion_n for block in blocks)
                    check_bound(lost, job.bound, job.codec.quantum, place)
                    stored()
                    storing.append(writer.submit(store, folder / shards.name(number), job, start, blocks))
            stored()
            progress.reach(total)
    finally:
        teacher.close()


def store(path: Path, job: TeachJob, start: int, blocks: list[FrameBlock]) -> None:
    """Write a shard, which another rank may be writing too: the first stays, since a manifest may already vouch for it.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        write_shard(path, job.header, start, blocks, keep=True)
    except UserError:
        if not path.exists():  # it was written by another rank, and its sealing has tidied up here
            raise


def complete(folder: Path, samples: int) -> bool:
    """Whether a sealed folder has all its shards, for so many samples or more."""
    if not (folder / MANIFEST).exists():
        return False
    stored = open_folder(folder)
    return stored.samples >= samples and not stored.missing()


def check_unchanged(folder: Path) -> None:
    """Check the shards of a sealed folder before it is sealed anew, and its manifest vouches for them again.

    Raises:
        UserError: one is damaged, or another than it was.
    """
    stored = open_folder(folder)
    for number in {*range(len(stored))} - {*stored.missing()}:
        stored.shard(number)


def compute(
    teacher: Teacher, job: TeachJob, samples: np.ndarray, device: torch.device, told: Callable[[int], bool]
) -> list[FrameBlock] | None:
    """The frames of the given samples. While the teacher computes, the next view is made and earlier answers are taken,
    encoded and compressed.

    Args:
        told: hears before every micro-batch how many samples are done, and says whether the rest is wanted.

    Returns:
        None: they are not wanted any more.

    Raises:
        UserError: a prediction is not a number or infinite, or memory is short for a single sequence.
        Stopped: it was asked for.
    """
    blocks: list[FrameBlock] = []
    packing: deque[Future[FrameBlock]] = deque()
    place, begin, computing = f"models.{job.teacher_name}", 0, deque[Answer]()

    def take() -> None:
        """Have the oldest answer packed."""
        answer = computing.popleft()
        said = answer.take(job.codec, job.teacher_name)
        teacher.micro_batch.took(len(answer.question.samples), said.seconds)
        if teacher.group.leads:
            packing.append(encoders.submit(_pack, job, said, answer.question.view))
        if len(packing) > ENCODERS:
            blocks.append(packing.popleft().result())

    with (
        ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoder") as encoders,
        ThreadPoolExecutor(1, thread_name_prefix="viewer") as viewers,
    ):

        def following(begin: int) -> Future[Question]:
            """The question at the samples from there on, made in a thread."""
            chosen = samples[begin : begin + teacher.micro_batch.size]
            return viewers.submit(question, chosen, job.tokens.train, job.stream, job.viewer, job.selection)

        next_one = following(begin)
        while begin < len(samples):
            if not teacher.group.goes_on(told(begin)):
                return None
            asked = next_one.result()
            answer = ask(teacher, asked, device)
            if answer is None:
                while computing:
                    take()
                teacher.micro_batch.failed(len(asked.samples), place)
                next_one = following(begin)
                continue
            computing.append(answer)
            begin += len(asked.samples)
            next_one = following(begin)
            if len(computing) > AHEAD:
                take()
        while computing:
            take()
        blocks += [future.result() for future in packing]
    return blocks


def _pack(job: TeachJob, said: Said, view: View) -> FrameBlock:
    ends = np.cumsum(view.loss_mask_BS.sum(axis=1))
    return pack_block(job.codec, said.planes, ends, job.viewer.digests(view), said.distortion_n)
