"""Teacher inputs: the input ids and true tokens at the samples of a targets folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.masking import View, Viewer
from ki_ds.corpus.stream import CorpusStream
from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.corpus.tokens import Tokens, open_tokens
from ki_ds.errors import UserError
from ki_ds.experiment.schema import NAME, Experiment
from ki_ds.targets.codec import Codec
from ki_ds.targets.source import Place

Spans = np.ndarray  # int64 [P], where the rows of each sample end


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


def header(
    experiment: Experiment, corpus: str, tokens: Tokens, tokenizer: str, teacher: dict[str, str],
    selection: dict[str, Any], how: Codec,
) -> dict[str, Any]:  # fmt: skip
    """What every shard of a targets folder says of itself, beside its own samples and counts.

    Args:
        tokenizer: its digest.
        teacher: its name and digest.
    """
    masked = experiment.objective == "mlm"
    return {
        "teacher": teacher,
        "corpus": {"name": corpus, "digest": tokens.digest},
        "tokenizer": tokenizer,
        "objective": experiment.objective,
        "masking": experiment.masking.model_dump(mode="json") if masked else None,
        "stream": {"seed": experiment.seed, "views": experiment.views, "sequences": len(tokens.train)},
        "sequence_length": experiment.sequence_length,
        "selection": selection,
        "codec": how.header,
    }


def teacher_inputs(header: dict[str, Any], root: Path) -> TeacherInputs:
    """What the teacher of a folder was shown, from the header of its shards and the corpus in a work directory.

    Raises:
        UserError: the corpus or the tokenizer is not there, or another one.
    """
    try:
        name, expected = header["corpus"]["name"], header["corpus"]["digest"]
        objective, seed, views = header["objective"], header["stream"]["seed"], header["stream"]["views"]
        probability = float((header["masking"] or {"probability": 0.15})["probability"])
        digests = [str(expected), str(header["tokenizer"])]
        whole = all(type(number) is int and number >= 0 for number in (seed, views)) and views > 0
        if not whole or not NAME.fullmatch(name) or objective not in ("mlm", "clm"):
            raise ValueError(f"corpus {name}, objective {objective}, seed {seed}, views {views}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the header of the shards does not say from which corpus they are ({error!r})") from None
    tokenizer = tokenizers.load(root / "tokenizer", objective, "tokenizer")
    tokens = open_tokens(root / "corpora" / name)
    for what, found, wanted in (
        (root / "corpora" / name, tokens.digest, digests[0]), (root / "tokenizer", tokenizer.digest, digests[1])
    ):  # fmt: skip
        if found != wanted:
            raise UserError(f"{what}: its digest is {found}, but the targets were made from {wanted}")
    stream = CorpusStream(len(tokens.train), views, seed, tokens.digest)
    special = (tokenizer.special, tokenizer.mask)
    return TeacherInputs(
        tokens, stream, Viewer(objective, seed, tokens.digest, tokenizer.size, *special, probability), tokenizer
    )
