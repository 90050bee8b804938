"""The inputs that the fuzzer kept, read again: each is refused in one line or keeps the format's promises."""

import json

import pytest
import zstandard
from fuzz.fuzz_shard import CORPUS, FIELDS, build, check, parse, recipe, seeds

from ki_ds.targets.codec import Codec

KEPT = sorted(CORPUS.iterdir())


def test_corpus_is_there_and_small():
    assert 20 < len(KEPT) < 200 and sum(file.stat().st_size for file in KEPT) < 300_000


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.name[:8])
def test_kept_input_is_read_or_refused(file, tmp_path):
    check(file.read_bytes(), tmp_path / "x.kit")


def test_corpus_reaches_success_and_most_refusals(tmp_path):
    """Else the fuzzer's checksums were wrong, and it would test nothing behind them."""
    found = {check(file.read_bytes(), tmp_path / "x.kit").partition(". `ki-ds")[0] for file in KEPT}
    assert "" in found and len(found) > 15, sorted(found)
    for words in ("codec", "checksum", "index", "rise", "vocabulary", "counts", "decompressed", "JSON", "version"):
        assert any(words in message for message in found), f"no kept input is refused for its {words}: {sorted(found)}"


def test_seeds_are_read_without_a_word(tmp_path):
    for data in seeds():
        assert check(data, tmp_path / "x.kit") == ""
        if data[:1] == b"S":
            assert recipe(*parse(data)) == data and build(*parse(data))


@pytest.mark.parametrize("data", [b"", b"S", b"S\x03", b"S\x03\xff", b"S\x03\x02\x00{}\x01", b"P", b"\x00" * 100])
def test_inputs_cut_short(data, tmp_path):
    assert check(data, tmp_path / "x.kit")


def test_few_bytes_that_ask_for_gigabytes_of_planes(tmp_path):
    """Rows without entries compress to nothing, but a plane has K places for each."""
    said = {"codec": Codec(2000, 1024, 0.0, ()).record, "sequence_length": 1 << 20, "start": 0, "end": 1}
    said |= {"rows": 1 << 19, "entries": 0}
    data = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    rows = FIELDS.pack(0, 3, 3, 1 << 19)
    message = check(recipe(0, json.dumps(said).encode(), [(rows, data)]), tmp_path / "x.kit")
    assert "does not fit the header" in message and (tmp_path / "x.kit").stat().st_size < 500


@pytest.mark.parametrize("junk", ["[]", '{"":{}}', "[[]]", "1e9", '"é"'])
def test_largest_headers_take_little_memory(junk, tmp_path):
    """The bound of the fuzzer, at a size that it does not reach."""
    said = {"codec": Codec(300, 3, 1 / 16).record, "sequence_length": 8, "start": 0, "end": 0, "rows": 0, "entries": 0}
    many = ",".join([junk] * (1_000_000 // (len(junk.encode()) + 1)))
    text = (json.dumps(said)[:-1] + f',"more":[{many}]}}').encode()
    assert 500_000 < len(text) < 1 << 20
    assert check(b"P" + build(0, text, []), tmp_path / "x.kit") == ""
