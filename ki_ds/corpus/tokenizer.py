"""The experiment's one tokenizer: byte-level BPE trained on its corpora, or any Hugging Face tokenizer."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError, reason
from ki_ds.files import digest, writing

MLM_SPECIAL = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
CLM_SPECIAL = {"eos_token": "<|endoftext|>"}
MAX_IDS = 1 << 24
PROBE = "Naïve café, 東京! def f(x):\n\treturn  x**2  # 3.14 <s></s><mask><|endoftext|>"
PLAIN = {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}, "model": {"type": "BPE"}}  # as `train` makes it


@dataclass(frozen=True)
class TextTokenizer:
    """A Hugging Face tokenizer with what the pipeline needs to know of it."""

    hugging_face: Any
    size: int  # one more than the largest id
    special: list[int]  # never masked nor drawn: special tokens, and numbers below `size` that are no token's id
    separator: int  # between documents: the end token
    begin: int | None  # opens a sequence of a masked language model
    mask: int | None
    digest: str  # of all that shapes ids: vocabulary, merges, rules, special tokens, what becomes of a probe

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, in parallel; special tokens that stand in the text are text.

        Raises:
            UserError: the tokenizer fails on one of them.
        """
        backend = self.hugging_face.backend_tokenizer
        backend.encode_special_tokens = True
        with _refusing("the tokenizer cannot encode a document; expected one that encodes any text"):
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def save(self, folder: Path, length: int | None = None) -> None:
        """Write the tokenizer's files into a folder; `length`: tokens that the model beside it takes at most.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        known = copy.copy(self.hugging_face)
        if length is not None:
            known.model_max_length = length
        with writing(folder):
            known.save_pretrained(folder)


@contextlib.contextmanager
def _refusing(refusal: str) -> Iterator[None]:
    """Make a UserError of what the library raises: the input is at fault. A panic of its Rust side is no Exception, and
    its class cannot be imported."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{refusal}: {reason(error)}") from None
        raise


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

    with _refusing(f"{place}: no tokenizer can be loaded from {source}"):
        tokenizer = AutoTokenizer.from_pretrained(str(source), use_fast=True, trust_remote_code=False)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{place}: {source} is not a fast tokenizer (tokenizer.json), which is needed")
        return describe(tokenizer, objective, place)


def describe(tokenizer: Any, objective: str, place: str) -> TextTokenizer:
    """What the pipeline needs to know of a Hugging Face tokenizer, which is made to give the same ids of a text always.

    Raises:
        UserError: it lacks an end token or, for a masked language model, a mask token; or its ids are too large.
    """

    def first(*names: str) -> int | None:
        found = [getattr(tokenizer, f"{name}_token_id", None) for name in names]
        return next((number for number in found if number is not None), None)

    separator = first("sep", "eos") if objective == "mlm" else first("eos", "sep")
    if separator is None:
        raise UserError(f"{place}: the tokenizer has no end or separator token, which must stand between documents")
    if objective == "mlm" and tokenizer.mask_token_id is None:
        raise UserError(f'{place}: the tokenizer has no mask token, which the objective "mlm" needs')
    _steady(tokenizer)
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1
    if size > MAX_IDS:
        raise UserError(f"{place}: the tokenizer's largest id is {size - 1}; expected less than {MAX_IDS}")
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    probe = backend.encode(PROBE, add_special_tokens=False).ids
    merges, rules = _rules(json.loads(backend.to_str()))
    begin = first("bos", "cls") if objective == "mlm" else None
    holes = set(range(size)).difference(vocabulary.values())
    special = sorted(holes.union(tokenizer.all_special_ids))
    roles = {"separator": separator, "begin": begin, "mask": tokenizer.mask_token_id, "special": special}
    return TextTokenizer(
        hugging_face=tokenizer,
        size=size,
        special=special,
        separator=separator,
        begin=begin,
        mask=tokenizer.mask_token_id if objective == "mlm" else None,
        digest=digest([sorted(vocabulary.items()), merges, roles, probe, *([] if rules == PLAIN else [rules])]),
    )


def _steady(tokenizer: Any) -> None:
    """Switch off what cuts or fills up a text, or encodes it otherwise from call to call."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    for name in ("dropout", "alpha", "nbest_size"):  # of BPE; of Unigram, which then samples
        if hasattr(backend.model, name):
            setattr(backend.model, name, None)
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):  # would be saved with it
        tokenizer.init_kwargs.pop(name, None)


def _rules(data: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The merges of a tokenizer.json, and what else shapes ids beside the vocabulary; what is unset is left out, since
    versions of the library differ in how they say so."""

    def set_only(value: Any) -> Any:
        if isinstance(value, list):
            return [set_only(one) for one in value]
        if not isinstance(value, dict):
            return value
        kept = {key: set_only(one) for key, one in value.items() if key not in ("vocab", "merges", "trim_offsets")}
        return {key: one for key, one in kept.items() if one not in (None, "", []) and one is not False}

    model = data["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else None  # of Unigram
    added = [token for token in data["added_tokens"] if not token["special"]]  # special ones are text, as any other
    parts = {key: data[key] for key in ("normalizer", "pre_tokenizer", "model")}
    return merges, set_only({**parts, "scores": scores, "added": added})


def expected(vocabulary_size: int, objective: str) -> TextTokenizer:
    """What is known of a tokenizer that is yet to be trained; it cannot encode."""
    from types import SimpleNamespace

    if objective == "mlm":
        return TextTokenizer(SimpleNamespace(pad_token_id=1), vocabulary_size, [0, 1, 2, 3, 4], 2, 0, 4, "")
    return TextTokenizer(SimpleNamespace(pad_token_id=None), vocabulary_size, [0], 0, None, None, "")
