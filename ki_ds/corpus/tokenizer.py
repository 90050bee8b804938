"""The experiment's one tokenizer: byte-level BPE trained on its corpora, or any Hugging Face tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError, reason
from ki_ds.files import digest

MLM_SPECIAL = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
CLM_SPECIAL = {"eos_token": "<|endoftext|>"}
PROBE = "Naïve café, 東京! def f(x):\n\treturn  x**2  # 3.14 <s></s><mask><|endoftext|>"


@dataclass(frozen=True)
class TextTokenizer:
    """A Hugging Face tokenizer with what the pipeline needs to know of it."""

    hugging_face: Any
    size: int  # ids in all
    special: list[int]
    separator: int  # between documents: the end token
    begin: int | None  # opens a sequence of a masked language model
    mask: int | None
    digest: str  # of the vocabulary, the merges, the special tokens and what the tokenizer does with a probe

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, in parallel; special tokens that stand in the text are text."""
        backend = self.hugging_face.backend_tokenizer
        backend.encode_special_tokens = True
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def train(texts: Iterable[str], vocabulary_size: int, objective: str) -> Any:
    """A byte-level BPE tokenizer (Radford et al. 2019); special tokens first, then 256 bytes, then merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = MLM_SPECIAL if objective == "mlm" else CLM_SPECIAL
    bpe = Tokenizer(models.BPE(unk_token=None, fuse_unk=False))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if objective == "mlm":
        sep, cls = (("</s>", 2), ("<s>", 0))  # the order of MLM_SPECIAL
        bpe.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=False)
        special = {**special, "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def load(source: str | Path, objective: str, place: str) -> TextTokenizer:
    """A tokenizer folder or name.

    Raises:
        UserError: it cannot be loaded, is not a fast tokenizer, or lacks a token that the objective needs.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), use_fast=True)
    except Exception as error:  # whatever the library raises: the input is at fault
        raise UserError(f"{place}: no tokenizer can be loaded from {source}: {reason(error)}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{place}: {source} is not a fast tokenizer (tokenizer.json), which is needed")
    return describe(tokenizer, objective, place)


def describe(tokenizer: Any, objective: str, place: str) -> TextTokenizer:
    """What the pipeline needs to know of a Hugging Face tokenizer.

    Raises:
        UserError: it lacks an end token or, for a masked language model, a mask token.
    """

    def first(*names: str) -> int | None:
        found = [getattr(tokenizer, f"{name}_token_id", None) for name in names]
        return next((number for number in found if number is not None), None)

    separator = first("sep", "eos") if objective == "mlm" else first("eos", "sep")
    if separator is None:
        raise UserError(f"{place}: the tokenizer has no end or separator token, which must stand between documents")
    if objective == "mlm" and tokenizer.mask_token_id is None:
        raise UserError(f'{place}: the tokenizer has no mask token, which the objective "mlm" needs')
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    probe = backend.encode(PROBE, add_special_tokens=False).ids
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in _model(backend).get("merges") or []]
    begin = first("bos", "cls") if objective == "mlm" else None
    special = sorted(set(tokenizer.all_special_ids))
    roles = {"separator": separator, "begin": begin, "mask": tokenizer.mask_token_id, "special": special}
    return TextTokenizer(
        hugging_face=tokenizer,
        size=len(tokenizer),
        special=special,
        separator=separator,
        begin=begin,
        mask=tokenizer.mask_token_id if objective == "mlm" else None,
        digest=digest([sorted(tokenizer.get_vocab().items()), merges, roles, probe]),
    )


def _model(backend: Any) -> dict[str, Any]:
    return dict(json.loads(backend.to_str())["model"])


def expected(vocabulary_size: int, objective: str) -> TextTokenizer:
    """What is known of a tokenizer that is yet to be trained; it cannot encode."""
    from types import SimpleNamespace

    if objective == "mlm":
        return TextTokenizer(SimpleNamespace(pad_token_id=1), vocabulary_size, [0, 1, 2, 3, 4], 2, 0, 4, "")
    return TextTokenizer(SimpleNamespace(pad_token_id=None), vocabulary_size, [0], 0, None, None, "")
