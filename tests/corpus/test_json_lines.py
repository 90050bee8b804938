"""JSON Lines: a document a line, and what is said of a line that is none."""

import json

import pytest
from helpers.sources import COMPRESSORS, failure, read

from ki_ds.corpus import sources as module
from ki_ds.experiment.sources import JsonLinesSource


@pytest.mark.parametrize("ending", ["", *COMPRESSORS])
def test_json_lines(tmp_path, ending):
    data = '\ufeff{"body": " one\\n\\ntwo "}\r\n\n  \n{"body": ""}\n{"body": "three", "id": 1}'.encode()
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESSORS.get(ending, bytes)(data))
    found = read(JsonLinesSource(jsonl=f"a.jsonl{ending}", field="body"), bases=[tmp_path])
    assert found == ["one\n\ntwo", "three"]


def test_json_line_longer_than_a_block_and_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "READ_BYTES", 7)
    monkeypatch.setattr(module, "MAX_DOCUMENT_CHARACTERS", 10)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words and unbreakablelongword"}) + "\n")
    found = read(JsonLinesSource(jsonl="a.jsonl"), bases=[tmp_path])
    assert found == ["some words", "and", "unbreakabl", "elongword"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("9" * 5000, "not JSON: "),
        ('["text"]', "found a value of type list; expected one object a line"),
        ("null", "found null; expected one object a line"),
        ('{"text": 3}', '"text" is a value of type int; expected a string'),
        ('{"text": null}', '"text" is null; expected a string'),
        ('{"Text": "", "id": 1}', "there is no \"text\", only 'Text', 'id'; set the source's \"field\"; did you mean"),
        ("{}", 'there is no "text", only nothing;'),
    ],
    ids=["cut", "deep", "digits", "array", "null", "number", "null-field", "other-key", "no-key"],
)
def test_bad_json_line(tmp_path, line, expected):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    message = failure(JsonLinesSource(jsonl="a.jsonl"), bases=[tmp_path])
    assert message.startswith(f"{tmp_path}/a.jsonl:3: {expected}")
