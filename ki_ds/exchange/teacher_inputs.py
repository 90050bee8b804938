"""Teacher inputs: the input ids and rows at the samples of a targets folder; from a corpus, or as a file for a teacher
elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.masking import View, Viewer
from ki_ds.corpus.stream import CorpusStream
from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.corpus.tokens import Tokens, open_tokens
from ki_ds.errors import UserError
from ki_ds.exchange.parquet import lists, parquet_writer
from ki_ds.experiment.schema import NAME, Experiment
from ki_ds.targets.codec import Codec
from ki_ds.targets.header import FolderHeader, Masking, Origin, StreamOrder
from ki_ds.targets.selection import Selection
from ki_ds.targets.source import Place

Spans = np.ndarray  # int64 [P], where the rows of each sample end
AT_ONCE = 64  # samples that are written at once


@dataclass(frozen=True)
class TeacherInputs:
    """A corpus as its teacher saw it."""

    tokens: Tokens
    stream: CorpusStream
    viewer: Viewer
    tokenizer: TextTokenizer

    def view(self, samples: np.ndarray) -> View:
        """Inputs, target indices and labels at samples."""
        sequences, views = self.stream.pairs(samples)
        return self.viewer(self.tokens.train[sequences], sequences, views)

    def rows(self, view: View) -> tuple[np.ndarray, np.ndarray, Spans]:
        """(index in its sequence [n], true token [n], ends [P]) of a view's rows."""
        index = np.nonzero(view.loss_mask_BS)[1]
        return index, view.labels_BS[view.loss_mask_BS], np.cumsum(view.loss_mask_BS.sum(axis=1))


def work_directory(folder: Place, given: Path | None) -> Path:
    """The work directory that a targets folder lies in, or the one that is named.

    Raises:
        UserError: there is none.
    """
    root = given or (folder.resolve().parent.parent if isinstance(folder, Path) else None)
    if root is None or not (root / "corpora").is_dir():
        raise UserError(f"{root or folder}: not a work directory (it has no corpora/). Name it: --workdir WORK")
    return root


def folder_header(
    experiment: Experiment, corpus: str, tokens: Tokens, tokenizer: str, teacher: Origin, selection: Selection,
    how: Codec,
) -> FolderHeader:  # fmt: skip
    """What every shard of a targets folder says of itself, beside its own samples and counts; `tokenizer` is its
    digest."""
    masking = experiment.masking
    return FolderHeader(
        experiment.sequence_length, how, teacher, Origin(corpus, tokens.digest), tokenizer, experiment.objective,
        Masking(masking.probability, masking.views) if experiment.objective == "mlm" else None,
        StreamOrder(experiment.seed, experiment.views, len(tokens.train)), selection,
    )  # fmt: skip


def teacher_inputs(header: FolderHeader, root: Path) -> TeacherInputs:
    """What the teacher of a folder was shown, from the header of its shards and the corpus in a work directory.

    Raises:
        UserError: the corpus or the tokenizer is not there, or another one.
    """
    corpus, order, objective, masking = header.corpus, header.stream, header.objective, header.masking
    viewed = order and order.views and (objective == "clm" or (objective == "mlm" and masking))
    if not (corpus and NAME.fullmatch(corpus.name) and order and objective and viewed and header.tokenizer):
        said = f"{corpus}, {order}, objective {objective}, {masking}, tokenizer {header.tokenizer}"
        raise UserError(f"the header of the shards does not say from which corpus they are ({said})")
    tokenizer = tokenizers.load(root / "tokenizer", objective, "tokenizer")
    tokens = open_tokens(root / "corpora" / corpus.name)
    for what, found, wanted in (
        (root / "corpora" / corpus.name, tokens.digest, corpus.digest),
        (root / "tokenizer", tokenizer.digest, header.tokenizer),
    ):
        if found != wanted:
            raise UserError(f"{what}: its digest is {found}, but the targets were made from {wanted}")
    stream = CorpusStream(len(tokens.train), order.views, order.seed, tokens.digest)
    probability = 0.15 if masking is None else masking.probability  # of a causal model it is not read
    special = (tokenizer.special, tokenizer.mask)
    return TeacherInputs(
        tokens, stream, Viewer(objective, order.seed, tokens.digest, tokenizer.size, *special, probability), tokenizer
    )


def write_teacher_inputs(inputs: TeacherInputs, samples: int, path: Path) -> int:
    """Write what a teacher elsewhere is to be shown, as Parquet: `sample`, `input_ids` and the `index` and true `token`
    of each row as lists; their number of rows."""
    total = 0
    with parquet_writer(path) as write:
        for start in range(0, samples, AT_ONCE):
            here = np.arange(start, min(start + AT_ONCE, samples))
            view = inputs.view(here)
            index, token, ends = inputs.rows(view)
            whole = np.arange(1, len(here) + 1) * view.inputs_BS.shape[1]
            ids = lists(whole, view.inputs_BS.reshape(-1))
            write({"sample": here, "input_ids": ids, "index": lists(ends, index), "token": lists(ends, token)})
            total += len(index)
    return total
