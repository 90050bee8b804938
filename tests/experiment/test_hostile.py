"""Files that nobody would write: refused with words, quickly, and without a traceback."""

import json
import time

import pytest
from helpers.experiment_file import DESIGN, source

from ki_ds.errors import UserError
from ki_ds.stages.pipeline import stages

PATHS = [
    (lambda given: {"engine": given}, "engine"),
    (lambda given: {"tokenizer": {"train": None, "pretrained": given}}, "tokenizer.pretrained"),
    (lambda given: source(text=given), "corpora.wb.sources.1.text"),
    (lambda given: source(jsonl=given), "corpora.wb.sources.1.jsonl"),
    (lambda given: source(parquet=given), "corpora.wb.sources.1.parquet"),
    (lambda given: source(dataset=given), "corpora.wb.sources.1.dataset"),
    (lambda given: {"models": {"x": {"pretrained": given}}}, "models.x.pretrained"),
    (lambda given: {"models": {"x": {"targets": {"wb": given}}}}, "models.x.targets.wb"),
    (lambda given: {"inference": {"engine": given}}, "inference.engine"),
]


@pytest.mark.parametrize(("patch", "place"), PATHS)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "neither empty"),
        ("a\0b", "nor holds the character NUL"),
        ("é" * 128, "at most 3000 bytes, and 255 between two slashes"),
        ("a/" * 2100, "at most 3000 bytes"),
    ],
)
def test_what_no_file_can_be_called_is_refused_wherever_a_path_stands(failure, patch, place, given, said):
    (line,) = failure(patch(given))
    assert line.startswith(f"{place}: a path ") and said in line and len(line) < 250


def test_long_urls_are_paths_too(load):
    assert load(source(text="https://host/" + "a" * 300))


def test_twenty_thousand_unknown_keys_are_cut_short(load):
    patch = {f"key{n}": 1 for n in range(20_000)}
    compared = [{"student": key, "baseline": key} for key in patch]
    for data in (patch, {"models": {"base": {"train": patch}}}, {"compare": compared}):
        began = time.process_time()
        with pytest.raises(UserError) as raised:
            load(data)
        assert time.process_time() - began < 2.5
        lines = str(raised.value).splitlines()
        assert len(lines) == 21 and lines[-1].endswith("e.json: more problems, which are not listed")


def test_many_broken_references_among_many_names_are_cut_short(load):
    corpora = {f"d{n}": {"sources": [{"text": "a.txt"}]} for n in range(3000)}
    began = time.process_time()
    with pytest.raises(UserError) as raised:
        load({"corpora": corpora, "models": {"base": {"train": {"on": {f"c{n}": 1.0 for n in range(3000)}}}}})
    assert time.process_time() - began < 2.5
    assert len(str(raised.value)) < 10_000 and ", …" in str(raised.value)


def test_a_chain_of_models_may_be_long(load):
    base = json.loads(DESIGN)["models"]["base"]
    chain = {f"m{n}": {**base, "architecture": None, "start_from": f"m{n + 1}"} for n in range(1500)}
    e = load({"models": {**chain, "m1500": base}})
    assert stages(e)[-2].name == "m0"
    with pytest.raises(UserError, match=r"models.m0: a cycle: m0 needs m1 needs .* needs … needs .* needs m0;"):
        load({"models": {**chain, "m1500": {**base, "architecture": None, "start_from": "m0"}}})
