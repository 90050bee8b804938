"""The tokenizer: text is kept to the byte, special tokens in it are text, and another tokenizer has another digest."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.trained_tokenizers import KNOWN, OBJECTIVES, TRAINED, texts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.masking import Viewer
from ki_ds.errors import UserError

SPECIAL = [*tokenizers.MLM_SPECIAL.values(), *tokenizers.CLM_SPECIAL.values()]
calm = settings(deadline=None, max_examples=100)


def decoded(tokenizer, ids):
    return tokenizer.hugging_face.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("objective", OBJECTIVES)
@calm
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example("  two  spaces , before . punctuation ! and n't 's\t\n\r\n end ")
@example("\x00\x7f\u200b\ufeff\U0001f9ea e\u0301")
@example("<s></s><mask><pad><unk> <|endoftext|>")
def test_any_text_comes_back_to_the_byte(objective, text):
    (ids,) = KNOWN[objective].encode([text])
    assert decoded(KNOWN[objective], ids) == text
    assert not set(ids) & set(KNOWN[objective].special)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_special_tokens_that_stand_in_a_document_are_text(objective):
    """Also where the tokenizer was trained on text that is full of them."""
    full = tokenizers.train([f"{token} {token}{token} x{token}y" for token in SPECIAL * 50], 400, objective)
    for known in (KNOWN[objective], tokenizers.describe(full, objective, "tokenizer")):
        for text in [*SPECIAL, "a<mask>b", "<s> and </s>", "".join(SPECIAL)]:
            (ids,) = known.encode([text])
            assert not set(ids) & set(known.special) and decoded(known, ids) == text


def test_encoding_a_batch_is_encoding_each():
    known = KNOWN["mlm"]
    batch = ["", *texts(20), "東京"]
    assert known.encode(batch) == [known.encode([text])[0] for text in batch]
    assert known.encode([]) == [] and known.encode([""]) == [[]]


def test_what_is_known_of_a_trained_tokenizer():
    one = KNOWN["mlm"]
    assert (one.begin, one.separator, one.mask, one.special, one.size) == (0, 2, 4, [0, 1, 2, 3, 4], 330)
    assert one.hugging_face.pad_token_id == 1
    two = KNOWN["clm"]
    assert (two.begin, two.separator, two.mask, two.special, two.size) == (None, 0, None, [0], 330)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_expected_of_an_untrained_tokenizer_comes_true(objective):
    expected, known = tokenizers.expected(330, objective), KNOWN[objective]
    for key in ("size", "special", "separator", "begin", "mask"):
        assert getattr(expected, key) == getattr(known, key)
    assert expected.hugging_face.pad_token_id == known.hugging_face.pad_token_id


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_digest_is_the_same_trained_again_and_saved_and_loaded(objective, tmp_path):
    known = KNOWN[objective]
    again = tokenizers.describe(tokenizers.train(texts(200), 330, objective), objective, "tokenizer")
    assert again.digest == known.digest
    known.encode(["use must not change it"])
    known.hugging_face.save_pretrained(tmp_path)
    loaded = tokenizers.load(tmp_path, objective, "tokenizer")
    assert replace(loaded, hugging_face=None) == replace(known, hugging_face=None)
    for text in texts(20, seed=5) + SPECIAL:
        assert loaded.encode([text]) == known.encode([text])


def altered(change):
    """The trained tokenizer with its JSON changed."""
    data = json.loads(TRAINED["mlm"].backend_tokenizer.to_str())
    roles = {**tokenizers.MLM_SPECIAL, "cls_token": "<s>", "sep_token": "</s>"}
    change(data, roles)
    backend = Tokenizer.from_str(json.dumps(data))
    return tokenizers.describe(PreTrainedTokenizerFast(tokenizer_object=backend, **roles), "mlm", "tokenizer")


def swap_last_merges(data, _):
    data["model"]["merges"][-2:] = data["model"]["merges"][:-3:-1]


def swap_two_words(data, _):
    vocabulary = data["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def drop_begin(_, roles):
    del roles["bos_token"], roles["cls_token"]


def drop_pad(_, roles):
    del roles["pad_token"]


def lower_case(data, _):
    data["normalizer"] = {"type": "Lowercase"}


def replace_what_the_probe_lacks(data, _):
    data["normalizer"] = {"type": "Replace", "pattern": {"String": "Zürich"}, "content": "Zurich"}


def split_what_the_probe_lacks(data, _):
    split = {"type": "Split", "pattern": {"String": "ß"}, "behavior": "Isolated", "invert": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, data["pre_tokenizer"]]}


def ignore_merges(data, _):
    data["model"]["ignore_merges"] = True


def add_a_word_of_the_vocabulary(data, _):
    word = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"].append({"id": data["model"]["vocab"]["z"], "content": "z", **word})


@pytest.mark.parametrize(
    "change",
    [
        swap_last_merges, swap_two_words, drop_begin, drop_pad, lower_case, replace_what_the_probe_lacks,
        split_what_the_probe_lacks, ignore_merges, add_a_word_of_the_vocabulary,
    ],
)  # fmt: skip
def test_digest_of_another_tokenizer_is_another(change):
    """Whatever moves ids, frames or what may be masked."""
    assert altered(change).digest != KNOWN["mlm"].digest


def test_digest_of_an_unaltered_copy_is_the_same():
    assert altered(lambda *_: None).digest == KNOWN["mlm"].digest


def test_digest_covers_the_scores_of_a_unigram():
    def scored(score):
        words = [("<unk>", 0.0), ("</s>", 0.0), ("q", -1.0), ("z", -2.0), ("qz", score)]
        backend = Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=False))
        return tokenizers.describe(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "clm", "here")

    one, two = scored(-2.5), scored(-9.0)
    assert one.encode(["qz"]) != two.encode(["qz"]) and one.digest != two.digest


# ----------------------------------------------------------------------------------- of strangers: as steady as ours


def foreign(folder, change=lambda backend: None):
    """A saved causal tokenizer, changed."""
    backend = Tokenizer.from_str(TRAINED["clm"].backend_tokenizer.to_str())
    change(backend)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def padding(backend):
    backend.enable_padding(length=500, pad_token="<|endoftext|>", pad_id=0)


def dropout(backend):
    backend.model.dropout = 0.5


@pytest.mark.parametrize("change", [lambda backend: backend.enable_truncation(7), padding, dropout])
def test_what_cuts_fills_up_or_varies_is_off(tmp_path, change):
    plain = tokenizers.load(foreign(tmp_path / "plain"), "clm", "here")
    known = tokenizers.load(foreign(tmp_path / "changed", change), "clm", "here")
    batch = texts(20)
    assert known.encode(batch) == known.encode(batch) == plain.encode(batch) == KNOWN["clm"].encode(batch)
    assert known.digest == tokenizers.load(tmp_path / "changed", "clm", "here").digest
    if change is not padding:  # whose token becomes a special one of Hugging Face
        assert known.digest == plain.digest
    known.save(tmp_path / "copy")
    saved = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    assert saved["truncation"] is saved["padding"] is saved["model"]["dropout"] is None
    assert not {"max_length", "stride"} & json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text()).keys()


def test_a_unigram_does_not_sample():
    words = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.1), ("ab", -1.2)]
    backend = Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=False, alpha=0.1, nbest_size=9))
    known = tokenizers.describe(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "clm", "here")
    assert {str(known.encode(["ab" * 20])) for _ in range(9)} == {str([[4] * 20])}


def test_holes_between_ids_count_and_are_never_drawn():
    """The head needs a row for the largest id; an id that no token has is no noise that a teacher knows."""
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "[MASK]": 3, "a": 4, "b": 9}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    special = {"unk_token": "[UNK]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    known = tokenizers.describe(PreTrainedTokenizerFast(tokenizer_object=backend, **special), "mlm", "here")
    assert (known.size, known.special) == (10, [0, 1, 2, 3, 5, 6, 7, 8])
    viewer = Viewer("mlm", 1, "wb", known.size, known.special, known.mask, 0.9)
    shown = viewer(np.full((50, 50), 9), np.arange(50), np.zeros(50, int)).inputs_BS
    assert set(shown.ravel().tolist()) == {3, 4, 9}


def test_an_id_beyond_reason_is_refused():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1 << 31}, unk_token="[UNK]"))
    with pytest.raises(
        UserError, match=r"^here: the tokenizer's largest id is 2147483648; expected less than 16777216"
    ):
        tokenizers.describe(PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]"), "clm", "here")


def bare(**special):
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "[CLS]": 2, "[MASK]": 3, "a": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def test_tokenizer_without_mask_token_is_refused_for_mlm_only():
    with pytest.raises(UserError, match=r'^here: the tokenizer has no mask token, which the objective "mlm" needs'):
        tokenizers.describe(bare(sep_token="[SEP]"), "mlm", "here")
    assert tokenizers.describe(bare(sep_token="[SEP]"), "clm", "here").mask is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tokenizer_without_end_token_is_refused(objective):
    with pytest.raises(UserError, match=r"^here: the tokenizer has no end or separator token"):
        tokenizers.describe(bare(mask_token="[MASK]"), objective, "here")


def test_separator_of_a_bert_tokenizer():
    bert = bare(sep_token="[SEP]", cls_token="[CLS]", mask_token="[MASK]")
    one = tokenizers.describe(bert, "mlm", "here")
    assert (one.begin, one.separator, one.mask, one.special) == (2, 1, 3, [0, 1, 2, 3])


def test_a_tokenizer_that_cannot_be_loaded(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"^tokenizer.pretrained: no tokenizer can be loaded from {tmp_path}: "):
        tokenizers.load(tmp_path, "mlm", "tokenizer.pretrained")


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),  # a panic when it is read
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),  # a panic when it encodes
        ("model", {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}),
    ],
    ids=["damaged map", "chunks of nothing", "no unknown token", "no expression"],
)
def test_a_tokenizer_on_which_the_library_fails(tmp_path, part, damage):
    file = foreign(tmp_path / "given") / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), part: damage}))
    with pytest.raises(UserError, match=f"^here: no tokenizer can be loaded from {tmp_path / 'given'}: .+"):
        tokenizers.load(tmp_path / "given", "clm", "here")


def test_a_text_on_which_the_library_fails():
    backend = Tokenizer(models.WordLevel({"</s>": 0, tokenizers.PROBE: 1}, unk_token="[UNK]"))
    known = tokenizers.describe(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "clm", "here")
    with pytest.raises(
        UserError, match=r"^the tokenizer cannot encode a document; .+: WordLevel error: Missing \[UNK\]"
    ):
        known.encode(["beyond it"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_full_disk_is_named_with_the_folder(tmp_path, file):
    (tmp_path / file).symlink_to("/dev/full")
    with pytest.raises(UserError) as raised:
        KNOWN["clm"].save(tmp_path)
    found = str(raised.value)
    assert found.startswith(f"{tmp_path}: cannot be written: {os.strerror(errno.ENOSPC)}")
    assert "Free some space" in found
