"""JSON: merge patches, settings, and what is refused in reading."""

import json
import re
import time

import pytest
from helpers.experiment_file import json_values
from hypothesis import given

from ki_ds.errors import UserError
from ki_ds.experiment.graph import load_experiment
from ki_ds.experiment.strict import assignment, merge_patch, read_json

# -------------------------------------------------------------------------------------------------- merge patch

RFC_7396_APPENDIX_A = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "expected"), RFC_7396_APPENDIX_A)
def test_merge_patch_follows_the_rfc(target, patch, expected):
    assert merge_patch(target, patch) == expected


@given(json_values, json_values)
def test_merge_patch_leaves_both_arguments_alone_and_is_idempotent(target, patch):
    before = json.dumps([target, patch])
    merged = merge_patch(target, patch)
    assert merge_patch(merged, patch) == merged
    assert json.dumps([target, patch]) == before


# --------------------------------------------------------------------------------------------------- assignment


@pytest.mark.parametrize(
    ("text", "patch"),
    [
        ("seed=3", {"seed": 3}),
        ("models.a.train.steps=100", {"models": {"a": {"train": {"steps": 100}}}}),
        ("a.b=null", {"a": {"b": None}}),
        ('a={"b": [1, "x"]}', {"a": {"b": [1, "x"]}}),
        ("engine=ds/zero1.json", {"engine": "ds/zero1.json"}),
        ('name="3"', {"name": "3"}),
        ("a=b=c", {"a": "b=c"}),
        ("a=", {"a": ""}),
    ],
)
def test_assignment(text, patch):
    assert assignment(text) == patch


@pytest.mark.parametrize("text", ["", "seed", "=3", "a..b=3", ".a=3", "a.=3"])
def test_assignment_without_key_or_equals_sign(text):
    with pytest.raises(UserError, match=re.escape(f"--set {text}: expected key=value, for instance")):
        assignment(text)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "[1", "1 2"])
def test_assignment_of_what_json_is_not_stays_a_string(value):
    assert assignment(f"a={value}") == {"a": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=1e999", "--set a=1e999: the number 1e999 is too large"),
        (f"a={'1' * 10_000}", "is too large; expected at most 9223372036854775807"),
        ("a=-9223372036854775808", "the number -9223372036854775808 is too large"),
        ('a={"b": 1, "b": 2}', 'the key "b" stands twice in one object'),
        (f"a={'[' * 5000}{']' * 5000}", "arrays and objects are nested more than 64 deep"),
        (f"a={'[' * 65}{']' * 65}", "arrays and objects are nested more than 64 deep"),
        ("a." * 5000 + "a=1", "arrays and objects are nested more than 64 deep"),
    ],
)
def test_assignment_of_a_number_too_large_or_nested_too_deep(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        assignment(text)
    assert len(str(raised.value)) < 300


def test_depth_is_counted_in_arrays_and_objects():
    assert assignment(f"a={'[' * 63}1{']' * 63}")
    with pytest.raises(UserError, match="64 deep"):
        assignment(f"a={'[' * 64}1{']' * 64}")


def test_minus_zero_is_zero():
    """Else the same number would give two identities."""
    assert str(assignment("a=-0.0")["a"]) == "0.0" and str(assignment("a=-0")["a"]) == "0"


def test_settings_come_after_the_scale(load):
    assert load(scale="small", settings=["sequence_length=32"]).sequence_length == 32


def test_mistake_in_a_setting_is_named(failure):
    (line,) = failure(settings=["models.base.train.stesp=3"])
    assert line.startswith("models.base.train.stesp: unknown key; allowed: on, steps, ")
    assert line.endswith('; did you mean "steps"?')


# ------------------------------------------------------------------------------------------------------- reading


def read_text(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as raised:
        read_json(path)
    assert str(raised.value).startswith(str(path))
    return str(raised.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', ":2:7: not JSON: "),
        ("", ":1:1: not JSON: "),
        ('{"a": 1} x', ":1:10: not JSON: "),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', ': the key "b" stands twice'),
        ('{"a": NaN}', ": NaN is not JSON"),
        ('{"a": -Infinity}', ": -Infinity is not JSON"),
        ('{"a": 1e999}', ": the number 1e999 is too large"),
        ("1" * 10_000, ": the number 111111"),
        ('{"a": 18446744073709551616}', ": the number 18446744073709551616 is too large; expected at most"),
        ("[" * 100_000, ": arrays and objects are nested more than 64 deep"),
        ("[" * 700 + "]" * 700, ": arrays and objects are nested more than 64 deep"),
        (b'{"a": "\xff"}', ": cannot be read: "),
        ("\ufeff{}", ":1:1: not JSON: "),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path, text, message):
    assert read_text(tmp_path, text).startswith(message)


def test_a_key_that_stands_twice_among_many_is_found_at_once(tmp_path):
    began = time.process_time()
    read_text(tmp_path, "{" + ", ".join(f'"k{n}": 1' for n in range(40_000)) + ', "k0": 1}')
    assert time.process_time() - began < 2.5


def test_missing_file_and_folder_in_its_place(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'none.json'}: no such file")):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: cannot be read: ")):
        read_json(tmp_path)


def test_json_values_are_read_as_they_are(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2.5, "é", null, true], "b": {"a": 5e-4}}', encoding="utf-8")
    assert read_json(path) == {"a": [1, 2.5, "é", None, True], "b": {"a": 5e-4}}


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_an_experiment_that_is_no_object(tmp_path, text):
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(UserError, match="expected a JSON object, found"):
        load_experiment(path)
