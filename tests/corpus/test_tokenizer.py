"""The tokenizer: text is kept to the byte, special tokens in it are text, and another tokenizer has another digest."""

import json
from dataclasses import replace

import pytest
from helpers.trained_tokenizers import KNOWN, OBJECTIVES, TRAINED, texts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ki_ds.corpus import tokenizer as tokenizers
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


@pytest.mark.parametrize("change", [swap_last_merges, swap_two_words, drop_begin, drop_pad, lower_case])
def test_digest_of_another_tokenizer_is_another(change):
    """Whatever moves ids, frames or what may be masked."""
    assert altered(change).digest != KNOWN["mlm"].digest


def test_digest_of_an_unaltered_copy_is_the_same():
    assert altered(lambda *_: None).digest == KNOWN["mlm"].digest


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
