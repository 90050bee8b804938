"""metrics.jsonl: what is refused in it, with place and remedy, what a resumed run needs of it, and its end."""

import json
import re

import pytest

from ki_ds.errors import UserError
from ki_ds.metrics import Metrics, last_step, read_metrics
from ki_ds.training.records import making_again


def line(step, **more):
    return json.dumps({"step": step, "ce": 2.0, "validation": {}, **more}) + "\n"


def written(folder, *lines):
    path = folder / "metrics.jsonl"
    path.write_bytes(b"".join(one if isinstance(one, bytes) else one.encode() for one in lines))
    return path


def remedy(done):
    return f"whole to {done}."


DAMAGE = {
    "not UTF-8": b'{"step": 3, "\xff": 1}\n',
    "nested too deep": b'{"step": 3, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "not JSON": b'{"step": 3, \n',
    "not a JSON object": b"[3]\n",
    "step: missing": b'{"ce": 1.0}\n',
    "step: found a string, expected an integer": b'{"step": "3"}\n',
    "step: found true or false, expected an integer": b'{"step": true}\n',
    "ce: found an array, expected an integer or a number or null": b'{"step": 3, "ce": [1]}\n',
    "validation.a: found a string": b'{"step": 3, "validation": {"a": "1"}}\n',
    "corpora.a: found a number, expected an object": b'{"step": 3, "corpora": {"a": 1.5}}\n',
    "validation: found null, expected an object": b'{"step": 3, "validation": null}\n',
    "found step 2, expected 3": line(2).encode(),
    "found step 4, expected 3": line(4).encode(),
    "cut off": b'{"step": 3}',
}


@pytest.mark.parametrize("said", DAMAGE)
@pytest.mark.parametrize("begins", [0, 1])
def test_damaged_line_is_named_with_what_is_whole_before_it(tmp_path, said, begins):
    good = [line(step) for step in range(begins, 3)]
    path = written(tmp_path, *good, DAMAGE[said], *([] if said == "cut off" else [line(4)]))
    place = re.escape(f"{path}:{len(good) + 1}: {said}")
    with pytest.raises(UserError, match=rf"^{place}.*whole to 2\.$"):
        list(read_metrics(path, 4, remedy))
    with pytest.raises(UserError, match=rf"^{place}.*whole to 2\.$"):
        Metrics(tmp_path, 3, remedy)


@pytest.mark.parametrize("said", DAMAGE)
def test_what_lies_behind_the_checkpoint_stops_no_resume(tmp_path, said):
    good = [line(0), line(1), line(2)]
    path = written(tmp_path, *good, DAMAGE[said])
    metrics = Metrics(tmp_path, 2, remedy)
    metrics.write({"step": 3})
    metrics.close()
    assert path.read_text() == "".join([*good, '{"step": 3}\n'])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", line(0).encode(), line(1).encode() * 5])
def test_run_without_a_checkpoint_begins_its_metrics_anew(tmp_path, content):
    path = written(tmp_path, content)
    Metrics(tmp_path, 0, remedy).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([1, 2, 3], r"ends after line 3 with step 3; expected every step from 1 to 4\. whole to 3\."),
        ([], r"ends after line 0 with step 0; .*whole to 0\."),
        ([0, 1, 2, 3, 4, 5], r":6: found step 5 behind the last, 4\. whole to 4\."),
        ([0, 1, 2, 3, 4, 4], r":6: found step 4 behind the last, 4\."),
        ([0, 0, 1, 2, 3, 4], r":2: found step 0, expected 1\."),
        ([2, 3, 4], r":1: found step 2, expected 0"),
    ],
)
def test_every_step_once_and_in_order(tmp_path, steps, said):
    path = written(tmp_path, *(line(step) for step in steps))
    with pytest.raises(UserError, match=said):
        list(read_metrics(path, 4, remedy))


def test_missing_file_is_refused_where_steps_are_expected(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: ends after line 0"):
        list(read_metrics(tmp_path / "metrics.jsonl", 1, remedy))


def test_first_validation_is_found_again(tmp_path):
    lines = [line(1), line(2, validation={"a": 9.0}), line(3, validation={"a": 8.0, "b": 7.0})]
    written(tmp_path, *lines)
    metrics = Metrics(tmp_path, 3, remedy)
    metrics.write({"step": 4, "validation": {"a": 1.0, "b": 1.0, "c": float("inf")}})
    metrics.close()
    assert metrics.first_perplexity == {"a": 9.0, "b": 7.0, "c": None}


# --------------------------------------------------------------------------------------------------------- the remedy


def test_remedy_names_the_checkpoints_that_are_too_late(tmp_path):
    for step in (4, 8, 12, 123456789):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    said = making_again(tmp_path, 9)
    assert "step-00000012 and" in said and "step-123456789, and run" in said and "step-00000008" not in said
    assert "goes on from step 8" in said
    assert f"Remove {tmp_path}/checkpoints, and run" in making_again(tmp_path, 3)


# ------------------------------------------------------------------------------------------------------- the last step


def test_last_step_of_a_long_file_reads_its_end_only(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.writelines(line(step, padding="x" * 1000) for step in range(1, 20_001))
        file.write('{"step": 20001, "ce"')
    read = []
    parsed = json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(text) or parsed(text))
    assert last_step(path) == 20_000
    assert len(read) == 1


@pytest.mark.parametrize("content", [b"", b"\xff\n", b"[[\n", b'{"step": 1}', None])
def test_last_step_where_there_is_none(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert last_step(path) == 0
