"""Loads what a rank is given at a step: a pure function of (experiment, step, rank, world size), one step ahead."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from ki_ds.corpus.masking import View, Viewer
from ki_ds.corpus.stream import CorpusStream, Mix
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.errors import UserError
from ki_ds.pinned import host_tensor
from ki_ds.targets.codec import Codec, Planes
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.source import Place
from ki_ds.training.batches import Batch, MicroBatch, TargetCollator


@dataclass(frozen=True)
class CorpusReader:
    """Reads one corpus of the mix, with the targets of its teacher where it has one."""

    name: str
    tokens: np.ndarray  # [sequences, S]
    stream: CorpusStream
    viewer: Viewer
    targets: ShardFolder | None

    def view(self, samples_B: np.ndarray) -> View:
        """What the model is shown of samples of this corpus's stream."""
        sequences, views = self.stream.pairs(samples_B)
        return self.viewer(self.tokens[sequences], sequences, views)

    def prove_alignment(self, folder: Place, stored_B: np.ndarray, view: View, entries_B: np.ndarray) -> None:
        """Compare what the teacher saw with what the student is about to see.

        Args:
            folder: of the targets.
            stored_B: the samples that they are read at.
            entries_B: what the shards' indices say of these.

        Raises:
            UserError: they differ; names the first sample.
        """
        shown = zip(self.viewer.digests(view).tolist(), view.loss_mask_BS.sum(axis=1).tolist(), strict=True)
        seen = zip(entries_B["digest"].tolist(), entries_B["rows"].tolist(), strict=True)
        for sample, theirs, ours in zip(stored_B.tolist(), seen, shown, strict=True):
            if theirs != ours:
                raise misaligned(folder, sample, self.name)


class Loader:
    """Loads the micro-batches of a step, and meanwhile those of the next."""

    def __init__(
        self,
        readers: list[CorpusReader],
        mix: Mix,
        layout: BatchLayout,
        alpha: Callable[[int], float],
        collate: TargetCollator | None = None,
    ):
        """Read from step to step, in a thread of its own.

        Args:
            readers: the corpora, in the order of the mix's weights.
            alpha: α of a step; where it is 0 no target is read.
            collate: where any corpus has targets.
        """
        self.readers, self.mix, self.layout, self.alpha, self.collate = readers, mix, layout, alpha, collate
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.ahead: dict[tuple[int, float], Future[list[MicroBatch]]] = {}
        self.reading_s = self.waited_s = 0.0  # so far: reading and decoding targets; the training loop waiting for it

    def __call__(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            UserError: a target is damaged, or the teacher saw another input than the student would.
        """
        alpha, next_alpha = self.alpha(step), self.alpha(step + 1)
        ready = self.ahead.pop((step, alpha), None) or self.thread.submit(self.load, step, alpha)
        began = time.perf_counter()
        micro_batches = ready.result()
        self.waited_s += time.perf_counter() - began
        self.ahead = {(step + 1, next_alpha): self.thread.submit(self.load, step + 1, next_alpha)}
        return Batch(step, alpha, micro_batches)

    def close(self) -> None:
        """Stop loading ahead."""
        self.thread.shutdown(wait=True, cancel_futures=True)

    def load(self, step: int, alpha: float) -> list[MicroBatch]:
        """The micro-batches of a step, at once.

        Raises:
            UserError: a target is damaged, or the teacher saw another input than the student would.
        """
        size = self.layout.micro_batch_size
        samples = self.layout.samples(step)
        return [self._micro_batch(samples[i : i + size], alpha) for i in range(0, len(samples), size)]

    def _micro_batch(self, samples_B: np.ndarray, alpha: float) -> MicroBatch:
        corpus_B, own_samples_B = self.mix(samples_B)  # which corpus, and which sample of its own stream
        shape = len(samples_B), self.readers[0].tokens.shape[1]
        inputs_BS, labels_BS = np.empty(shape, np.int32), np.empty(shape, np.int32)
        loss_mask_BS = np.empty(shape, bool)
        read: list[tuple[np.ndarray, Codec, Planes]] = []
        for number, reader in enumerate(self.readers):
            here = np.flatnonzero(corpus_B == number)
            if not len(here):
                continue
            view = reader.view(own_samples_B[here])
            inputs_BS[here], loss_mask_BS[here], labels_BS[here] = view.inputs_BS, view.loss_mask_BS, view.labels_BS
            if alpha > 0 and reader.targets is not None:
                read.append((here, reader.targets.codec, self._read(reader, reader.targets, own_samples_B[here], view)))
        rows_N = np.flatnonzero(loss_mask_BS)
        sequence_N = rows_N // shape[1]
        targets = alpha_N = None
        if read:
            assert self.collate is not None
            parts = [(np.flatnonzero(np.isin(sequence_N, here)), codec, planes) for here, codec, planes in read]
            targets = self.collate(len(rows_N), parts)
            alpha_N = host_tensor(np.full(len(rows_N), alpha, np.float32))
        return MicroBatch(
            host_tensor(inputs_BS.astype(np.int64)),
            host_tensor(rows_N),
            host_tensor(labels_BS.reshape(-1)[rows_N].astype(np.int64)),
            targets,
            alpha_N,
            host_tensor(corpus_B[sequence_N].astype(np.int16)),
        )

    def _read(self, reader: CorpusReader, targets: ShardFolder, samples_B: np.ndarray, view: View) -> Planes:
        began = time.perf_counter()
        stored_B = reader.stream.first_samples(samples_B)
        found = targets.read(stored_B, partial(reader.prove_alignment, targets.folder, stored_B, view))
        self.reading_s += time.perf_counter() - began
        return found.planes


def misaligned(folder: Place, sample: int, corpus: str) -> UserError:
    """The error of a teacher that saw another input than the student would."""
    return UserError(
        f"{folder}: sample {sample}: the teacher saw another input than the student is about to see "
        f"(corpus {corpus}, seed, masking or sequence length changed since). Remove the folder and run `ki-ds teach`, "
        "or import the predictions again."
    )
