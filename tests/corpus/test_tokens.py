"""Tokens: framed as the docs say, split without leaks, in bounded memory."""

import errno
import io
import json
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.trained_tokenizers import KNOWN, OBJECTIVES, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus import tokens as module
from ki_ds.corpus.tokens import build, held_out, open_tokens
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Corpus
from ki_ds.experiment.sources import JsonLinesSource
from ki_ds.sealed import Identity, seal

calm = settings(deadline=None, max_examples=100)


@pytest.fixture
def corpus(tmp_path):
    """Documents to a folder, the facts and the corpus."""
    made = []

    def make(documents, objective="mlm", length=16, validation=0.2, tokenizer=None):
        folder = tmp_path / f"corpus-{len(made)}"
        folder.mkdir()
        made.append(folder)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / "documents.jsonl").write_text(lines, encoding="utf-8")
        given = Corpus(sources=[JsonLinesSource(jsonl="documents.jsonl")], validation=validation)
        facts = build(folder, "wb", given, [tmp_path], tokenizer or KNOWN[objective], objective, length)
        return folder, facts

    return make


def naive(documents, objective, length, validation, tokenizer):
    """The same in memory: one flow of ids with a separator behind each document, cut and framed."""
    parts = {}
    for part in ("train", "validation"):
        flow = []
        for text in documents:
            if held_out(text, validation) == (part == "validation"):
                flow += [*tokenizer.encode([text])[0], tokenizer.separator]
        width = length if objective == "clm" else length - 2
        cut = [flow[i : i + width] for i in range(0, len(flow) - width + 1, width)]
        parts[part] = cut if objective == "clm" else [[tokenizer.begin, *row, tokenizer.separator] for row in cut]
    return parts


def sealed(folder, facts):
    seal(folder, Identity("corpus", {}, {}), facts)
    return open_tokens(folder)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("length", [8, 33])
def test_tokens_are_those_of_a_naive_construction(corpus, objective, length):
    documents = texts(300, seed=1)
    folder, facts = corpus(documents, objective, length)
    tokens = sealed(folder, facts)
    expected = naive(documents, objective, length, 0.2, KNOWN[objective])
    assert tokens.train.tolist() == expected["train"] and tokens.validation.tolist() == expected["validation"]
    assert tokens.train.dtype == np.uint16 and facts["dtype"] == "<u2" and facts["vocabulary"] == 330
    assert facts["sequences"] == {part: len(rows) for part, rows in expected.items()}
    assert facts["documents"] == 300 and facts["characters"] == sum(map(len, documents))
    assert tokens.digest == facts["content"] and facts["tokenizer"] == KNOWN[objective].digest
    assert not tokens.train.flags.writeable


def test_masked_sequence_without_begin_token(corpus):
    tokenizer = replace(KNOWN["mlm"], begin=None)
    folder, facts = corpus(texts(100), tokenizer=tokenizer)
    tokens = sealed(folder, facts)
    assert (tokens.train[:, -1] == 2).all() and not (tokens.train[:, 0] == 0).any()
    flow = tokens.train[:, :-1].reshape(-1).tolist()
    whole = [i for text in texts(100) if not held_out(text, 0.2) for i in [*tokenizer.encode([text])[0], 2]]
    assert flow == whole[: len(flow)] and len(whole) - len(flow) < 15


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_that_need_more_than_two_bytes_get_four(corpus, size, dtype):
    one = replace(KNOWN["clm"], size=size)
    documents = texts(100)
    folder, facts = corpus(documents, "clm", tokenizer=one)
    assert facts["dtype"] == dtype
    assert sealed(folder, facts).train.tolist() == naive(documents, "clm", 16, 0.2, one)["train"]


def test_large_ids_survive(tmp_path, corpus):
    class Shifted(tokenizers.TextTokenizer):
        def encode(self, texts):
            return [[i + 100_000 for i in ids] for ids in super().encode(texts)]

    fields = {key: getattr(KNOWN["clm"], key) for key in KNOWN["clm"].__dataclass_fields__}
    folder, facts = corpus(texts(100), "clm", tokenizer=Shifted(**{**fields, "size": 200_000}))
    tokens = sealed(folder, facts)
    assert tokens.train[tokens.train != 0].min() >= 100_000 and facts["dtype"] == "<u4"


def test_digest_of_the_content_does_not_depend_on_batches(corpus, monkeypatch):
    documents = texts(400, seed=2)
    found = []
    for characters in (1, 100, 1 << 20):
        monkeypatch.setattr(module, "BATCH_CHARACTERS", characters)
        folder, facts = corpus(documents)
        found.append((facts, {path.name: path.read_bytes() for path in folder.iterdir()}))
    assert found[0] == found[1] == found[2]


def test_digest_of_the_content_changes_with_what_shapes_it(corpus):
    documents = texts(300)
    found = [
        corpus(documents)[1],
        corpus([*documents, "one more document, long enough to fill another sequence or two: " + "x y z " * 40])[1],
        corpus(documents[::-1])[1],
        corpus(documents, length=17)[1],
        corpus(documents, validation=0.5)[1],
        corpus(documents, "clm")[1],
        corpus(documents, tokenizer=replace(KNOWN["mlm"], digest="another"))[1],
        corpus(documents, tokenizer=replace(KNOWN["mlm"], size=65_537))[1],
    ]
    assert len({facts["content"] for facts in found}) == len(found)


def test_building_again_over_a_half_written_folder(corpus, tmp_path):
    folder, facts = corpus(texts(100))
    before = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(before[:7])
    given = Corpus(sources=[JsonLinesSource(jsonl="documents.jsonl")], validation=0.2)
    assert build(folder, "wb", given, [tmp_path], KNOWN["mlm"], "mlm", 16) == facts
    assert (folder / "train.bin").read_bytes() == before


# ------------------------------------------------------------------------------------------------- as it lies


def interrupted(monkeypatch, act):
    """Something happens in the middle of the next build's documents, and not in that of a build within."""
    real = module.documents

    def texts(*arguments):
        monkeypatch.setattr(module, "documents", real)
        for number, text in enumerate(real(*arguments)):
            if number == 60:
                act()
            yield text

    monkeypatch.setattr(module, "documents", texts)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1)


@pytest.mark.parametrize("ends", ["whole", "stopped"])
def test_a_second_build_in_the_same_folder_leaves_the_first_as_it_is(corpus, tmp_path, monkeypatch, ends):
    folder, facts = corpus(texts(300, words=400))
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    given = Corpus(sources=[JsonLinesSource(jsonl="documents.jsonl")], validation=0.2)

    def build_again():
        if ends == "stopped":
            (tmp_path / "bad.jsonl").write_text("{")
            stopped = Corpus(sources=[JsonLinesSource(jsonl="bad.jsonl")], validation=0.2)
            with pytest.raises(UserError, match="not JSON"):
                build(folder, "wb", stopped, [tmp_path], KNOWN["mlm"], "mlm", 16)
        else:
            assert build(folder, "wb", given, [tmp_path], KNOWN["mlm"], "mlm", 16) == facts

    interrupted(monkeypatch, build_again)
    assert build(folder, "wb", given, [tmp_path], KNOWN["mlm"], "mlm", 16) == facts
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


@pytest.mark.parametrize("part", ["train", "validation"])
def test_tokens_that_lie_on_disk_otherwise_than_written_get_no_name(corpus, monkeypatch, tmp_path, part):
    folder, _ = corpus(texts(10))
    for file in folder.iterdir():
        file.unlink()
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(300, 0, 400)))

    def cut():
        (file,) = folder.glob(f"{part}.bin*")
        assert file.stat().st_size > 0
        os.truncate(file, 0)  # what is written next leaves zeros before it

    interrupted(monkeypatch, cut)
    given = Corpus(sources=[JsonLinesSource(jsonl="documents.jsonl")], validation=0.4)
    with pytest.raises(UserError, match=rf"/{part}\.bin\.\w+\.tmp: what lies on disk is not what was written: digest "):
        build(folder, "wb", given, [tmp_path], KNOWN["mlm"], "mlm", 16)
    assert [file.name for file in folder.iterdir()] == ["train.bin"] * (part == "validation")


# ------------------------------------------------------------------------------------------------- validation


def test_the_same_document_is_always_on_the_same_side(corpus):
    documents = [text for text in texts(150, seed=3) for _ in range(2)] * 2
    folder, facts = corpus(documents, "clm")
    tokens = sealed(folder, facts)

    def whole_documents(part):
        flow, found = part.reshape(-1).tolist(), set()
        while 0 in flow:
            end = flow.index(0)
            found.add(tuple(flow[:end]))
            flow = flow[end + 1 :]
        return found

    train, validation = whole_documents(tokens.train), whole_documents(tokens.validation)
    assert len(train) > 90 and len(validation) > 15 and not train & validation


@pytest.mark.parametrize("share", [0.005, 0.2, 0.9])
def test_share_of_the_validation_part(share):
    count = 50_000
    held = sum(held_out(f"document {n}", share) for n in range(count))
    assert abs(held - share * count) < 6 * np.sqrt(count * share * (1 - share))


@calm
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_larger_validation_part_holds_the_smaller_one(text, one, two):
    assert held_out(text, min(one, two)) <= held_out(text, max(one, two))


# ----------------------------------------------------------------------------------------------------- errors


def test_an_empty_corpus(corpus):
    with pytest.raises(UserError) as raised:
        corpus([])
    assert str(raised.value) == (
        "corpora.wb: 0 documents, 0 characters, give no train sequence of 16 tokens. "
        "Expected more text or a smaller sequence_length."
    )


def test_a_corpus_without_validation_names_the_share(corpus):
    with pytest.raises(UserError) as raised:
        corpus(texts(50), validation=1e-9)
    assert "give no validation sequence of 16 tokens" in str(raised.value)
    assert "Expected more text, a larger corpora.wb.validation (now 1e-09) or a smaller sequence_length" in str(
        raised.value
    )


def test_a_corpus_too_short_for_the_sequence_length(corpus):
    with pytest.raises(UserError, match=r"^corpora.wb: 3 documents, \d+ characters, give no train sequence of 4096 "):
        corpus(texts(3), length=4096)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_named_with_the_folder(tmp_path, monkeypatch):
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(100)))
    folder = tmp_path / "wb"
    folder.mkdir()
    monkeypatch.setattr(module.secrets, "token_hex", lambda _: "x")
    (folder / "train.bin.x.tmp").symlink_to("/dev/full")
    given = Corpus(sources=[JsonLinesSource(jsonl="documents.jsonl")])
    with pytest.raises(UserError) as raised:
        build(folder, "wb", given, [tmp_path], KNOWN["mlm"], "mlm", 16)
    assert str(raised.value).startswith(f"{folder}: cannot be written: {os.strerror(errno.ENOSPC)}. Free some space")


def test_a_folder_that_is_gone(tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"text": "x"}\n')
    given = Corpus(sources=[JsonLinesSource(jsonl="documents.jsonl")])
    with pytest.raises(UserError, match=f"^{tmp_path / 'none'}: cannot be written: "):
        build(tmp_path / "none", "wb", given, [tmp_path], KNOWN["mlm"], "mlm", 16)


@pytest.mark.parametrize("part", ["train.bin", "validation.bin"])
def test_opening_a_cut_or_lost_file(corpus, part):
    folder, facts = corpus(texts(100))
    sealed(folder, facts)
    size = (folder / part).stat().st_size
    os.truncate(folder / part, size - 32)
    with pytest.raises(UserError, match=f"has {size - 32} bytes, but the manifest says {size}"):
        open_tokens(folder)
    (folder / part).unlink()
    with pytest.raises(UserError, match=f"{part}: is missing"):
        open_tokens(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="is not there"):
        open_tokens(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "O"}, {"dtype": "|O"}, {"dtype": "<u2,O"}, {"dtype": "<f4"}, {"dtype": "<u4"}, {"dtype": ["<u2"]},
        {"dtype": None}, {"sequence_length": 0}, {"sequence_length": -16}, {"sequence_length": True},
        {"sequence_length": "16"}, {"sequence_length": 1 << 40}, {"sequence_length": 8}, {"sequences": None},
        {"sequences": {"train": 1}}, {"sequences": {"train": 1 << 50, "validation": 1}},
        {"sequences": {"train": 0, "validation": 0}}, {"sequences": {"train": 1.0, "validation": "x" * 1000}},
    ],
    ids=lambda change: str(change)[:50],
)  # fmt: skip
def test_a_manifest_that_does_not_describe_its_files(corpus, change):
    """An object dtype reached numpy's memory map, which took the file's bytes for pointers."""
    folder, facts = corpus(texts(100))
    seal(folder, Identity("corpus", {}, {}), {**facts, **change})
    with pytest.raises(UserError) as raised:
        open_tokens(folder)
    assert str(raised.value).startswith(f"{folder}/manifest.json: does not describe token files of ki_ds (")
    assert len(str(raised.value)) < 700


# ----------------------------------------------------------------------------------------------------- memory


def test_memory_is_bounded_by_a_batch_and_not_by_the_corpus(tmp_path, monkeypatch):
    """Fifty million characters pass through in a few megabytes; a stand-in encoder keeps this a test of the flow."""

    class Bytes(tokenizers.TextTokenizer):
        def encode(self, texts):
            return [list(text.encode()[::16]) for text in texts]

    fields = {key: getattr(KNOWN["clm"], key) for key in KNOWN["clm"].__dataclass_fields__}
    line = "z" * 4000

    def many(*_):
        for n in range(12_500):
            yield f"{n} {line}"

    monkeypatch.setattr(module, "documents", many)
    given = Corpus(sources=[JsonLinesSource(jsonl="none")], validation=0.1)
    tracemalloc.start()
    try:
        facts = build(tmp_path, "wb", given, [tmp_path], Bytes(**fields), "clm", 512)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert facts["sequences"]["train"] + facts["sequences"]["validation"] > 6000
    assert peak < 6 << 20


def test_documents_of_one_character_come_in_batches_too(tmp_path, monkeypatch):
    """An encoding takes a kilobyte, however short the text: a million at once would take a gigabyte."""
    sizes = []

    class Counting(tokenizers.TextTokenizer):
        def encode(self, texts):
            sizes.append(len(texts))
            return [[5] for _ in texts]

    fields = {key: getattr(KNOWN["clm"], key) for key in KNOWN["clm"].__dataclass_fields__}
    monkeypatch.setattr(module, "documents", lambda *_: (chr(97 + n % 26) for n in range(20_000)))
    given = Corpus(sources=[JsonLinesSource(jsonl="none")], validation=0.1)
    build(tmp_path, "wb", given, [tmp_path], Counting(**fields), "clm", 16)
    assert sum(sizes) == 20_000 and max(sizes) <= 4096


def test_progress_of_a_long_corpus_is_said(corpus, monkeypatch):
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    corpus(texts(60))
    assert "corpus wb: 60 documents" in out.getvalue()
