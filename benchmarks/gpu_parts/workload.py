"""Models, tokens and targets of the right sizes, made up: for speed, what is learnt does not matter.

Token ids are drawn uniformly. A row's target keeps K ids, one from each of K equal parts of the vocabulary, with values
drawn uniformly: such ids compress worse than a language model's, so that reading them takes no less time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.masking import Viewer
from ki_ds.corpus.stream import CorpusStream, Mix
from ki_ds.corpus.tokens import Tokens
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.experiment.schema import Inherit, Train
from ki_ds.models import architectures, flops, hugging_face
from ki_ds.models.language_model import LanguageModel
from ki_ds.sealed import Manifest
from ki_ds.targets.codec import Planes
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.selection import Selection
from ki_ds.targets.shard import pack_block, shard_name, write_shard
from ki_ds.targets.spec import TargetSpec
from ki_ds.training.batches import TargetCollator
from ki_ds.training.loader import CorpusReader, Loader
from ki_ds.training.run import TrainRun

SEED, TEMPERATURE, MEAN_NATS = 1, 2.0, 2e-4
LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192,
}  # fmt: skip
PER_SHARD = 512


@dataclass(frozen=True)
class Workload:
    """A model and what it reads."""

    architecture: str | dict[str, Any]
    objective: str
    vocabulary: int
    length: int
    samples: int
    k: int = 100

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizers.expected(self.vocabulary, self.objective)

    @cached_property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return architectures.configuration(
            self.architecture, self.objective, self.tokenizer, self.length, "the benchmark"
        )  # fmt: skip

    @cached_property
    def tokens(self) -> Tokens:
        """Random ids that are no special tokens."""
        low = max(self.viewer.special.tolist(), default=-1) + 1
        random = np.random.default_rng(SEED)
        found = random.integers(low, self.vocabulary, (self.samples, self.length), dtype=np.int32)
        return Tokens(Manifest(Path(), "", {"content": "random"}, {}), found, found[:8])

    @cached_property
    def stream(self) -> CorpusStream:
        return CorpusStream(self.samples, 1, SEED, "random")

    @cached_property
    def viewer(self) -> Viewer:
        one = self.tokenizer
        return Viewer(self.objective, SEED, "random", one.size, one.special, one.mask, 0.15)

    @cached_property
    def spec(self) -> TargetSpec:
        return TargetSpec(Selection("top_k", self.k), (1.0, TEMPERATURE), MEAN_NATS, self.samples)

    @cached_property
    def header(self) -> FolderHeader:
        codec = self.spec.codec(self.vocabulary)
        return FolderHeader(self.length, codec, objective=self.objective, selection=self.spec.selection)

    @cached_property
    def rows_per_sequence(self) -> float:
        return self.length - 1 if self.objective == "clm" else (self.length - 2) * 0.15

    def forward_flops(self) -> float:
        """Of a sequence: matrix products, attention, and the head at the rows that are predicted."""
        return flops.forward_flops(self.config, self.objective, self.length, self.rows_per_sequence)

    def new_model(self, dropout: float) -> Any:
        """With random weights."""
        architectures.set_dropout(self.config, dropout)
        return hugging_face.new_model(self.config, self.objective, SEED)

    def language_model(self, dropout: float, device: str) -> LanguageModel:
        """The same, taken apart, on a device."""
        return LanguageModel(self.new_model(dropout), self.vocabulary).to(device)

    def stored_targets(self, folder: Path) -> ShardFolder:
        """Targets of all samples, written now."""
        for start in range(0, self.samples, PER_SHARD):
            samples = np.arange(start, min(start + PER_SHARD, self.samples))
            sequences, views = self.stream.pairs(samples)
            view = self.viewer(self.tokens.train[sequences], sequences, views)
            ends = np.cumsum(view.loss_mask_BS.sum(axis=1))
            planes = self.planes(int(ends[-1]), start)
            lost = np.zeros(len(planes.ids_nK), np.float32)
            block = pack_block(self.header.codec, planes, ends, self.viewer.digests(view), lost)
            write_shard(folder / shard_name(start, start + len(samples)), self.header, start, [block])
        return ShardFolder(folder, self.samples, PER_SHARD, self.header)

    def planes(self, rows: int, seed: int) -> Planes:
        """Made-up targets of so many rows."""
        codec, random = self.header.codec, np.random.default_rng(seed)
        gap = self.vocabulary // self.k
        ids = np.arange(self.k) * gap + random.integers(0, gap, (rows, self.k))
        values = random.integers(1, 200, (rows, self.k)).astype(np.uint8)
        values[:, random.integers(0, self.k)] = 0  # some id is the most probable one
        scalars = codec.store({scalar: np.full(rows, -1.0, np.float32) for scalar in codec.scalars}, rows)
        high = (ids >> 16).astype(np.uint8) if self.vocabulary > 1 << 16 else None
        return Planes((ids & 0xFFFF).astype(np.uint16), high, values, np.full(rows, self.k, np.uint16), scalars)

    def run(self, train: Train) -> TrainRun:
        """A run that inherits at the paper's temperature."""
        inherit = Inherit.model_validate({"from": {"random": "teacher"}, "schedule": "constant", "alpha": 0.5,
                                          "temperature": TEMPERATURE, "targets": {"k": self.k}})  # fmt: skip
        return TrainRun("student", train, inherit, SEED, self.length, {})

    def loader(self, layout: BatchLayout, alpha: Callable[[int], float], targets: ShardFolder | None) -> Loader:
        """The loader that training has."""
        reader = CorpusReader("random", self.tokens.train, self.stream, self.viewer, targets)
        return Loader([reader], Mix([1.0]), layout, alpha, TargetCollator(self.k, None))


def on_device() -> torch.device:
    """This process as the only rank, and its device."""
    from ki_ds.launch import distributed

    distributed.quiet()
    return distributed.init_distributed()
