"""The GPU run: every part runs, tiny, on the CPU; a row that fails, hangs or cannot run costs nothing but itself."""

import fnmatch
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import commands

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu():
    """The program as a module; what it puts in the way of imports is taken out again."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    sys.path[:] = before
    return gpu


@pytest.fixture
def parts(gpu):
    """Modules of the package, by name."""
    return {name: sys.modules[f"gpu_parts.{name}"] for name in ("part", "record", "page", "claim")}


@pytest.fixture
def record(parts, tmp_path):
    return parts["record"].Record.open(tmp_path, tiny=True)


def program(*arguments, environment=None, timeout=600):
    """`benchmarks/gpu.py` as a user runs it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, arguments)]
    given = {**commands.environment(), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=timeout)


PARTS = (
    "environment",
    "right-first",
    "pytest",
    "loss-speed",
    "sweep",
    "teacher-speed",
    "training-speed",
    "precision",
    "claim",
)


def test_every_part_is_tested_here(gpu):
    assert tuple(part.name for part in gpu.PARTS) == PARTS


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the parts run as they are")
@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_tiny(part, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    pangrams = ("the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs")
    lines = "\n\n".join(f"{number} times {pangrams[number % 2]} {number * 7}" for number in range(4000))
    (text / "a.txt").write_text(lines)
    done = program(
        "--tiny", "--only", part, "--output", tmp_path / "results",
        environment={"TMPDIR": str(tmp_path), "KI_DS_TEXT": str(text)},
    )  # fmt: skip
    (file,) = (tmp_path / "results").glob("*.json")
    rows = json.loads(file.read_text())["parts"][part]["rows"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows and {row["state"] for row in rows.values()} <= {"measured", "not here"}, rows
    assert "measured" in {row["state"] for row in rows.values()}


def test_what_fails_is_recorded_and_the_next_row_runs(gpu, parts, record, capsys):
    def fails():
        raise ZeroDivisionError("one\nby nothing")

    def lacks():
        raise parts["part"].NotHere("liger_kernel is not installed")

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def imports():
        import no_such_peer  # noqa: F401

    calls = []
    rows = {"a": fails, "b": lacks, "c": too_large, "e": imports, "d": lambda: calls.append(1) or {"x": 1}}
    part = parts["part"].Part("made-up", "", 60, lambda device, tiny: iter(rows.items()))
    for _ in range(2):
        gpu.work(part, record)
        found = parts["record"].Record.read(record.path).rows("made-up")
        assert [row["state"] for row in found.values()] == ["failed", "not here", "not here", "not here", "measured"]
    assert found["a"]["why"] == "ZeroDivisionError: by nothing" and "in fails" in found["a"]["traceback"]
    assert found["b"]["why"] == "liger_kernel is not installed"
    assert found["d"]["figures"] == {"x": 1}
    assert calls == [1]  # what is measured is not measured again
    assert gpu.told(record, [part])  # something failed


def test_a_process_that_dies_costs_one_row(gpu, parts, record, monkeypatch):
    """The next process goes on with the row behind."""
    names = ["a", "b", "c"]
    real = subprocess.Popen

    def child(command, **how):
        known = parts["record"].Record.read(record.path)
        name = next(name for name in names if name not in known.rows("made-up"))
        known.write("made-up", name, "begun")
        if name == "c":
            known.write("made-up", name, "measured", figures={})
        return real([sys.executable, "-c", f"import sys; sys.exit({0 if name == 'c' else -9})"], **how)

    monkeypatch.setattr(gpu.subprocess, "Popen", child)
    monkeypatch.setattr(gpu, "asked", lambda query: {})
    part = parts["part"].Part("made-up", "", 60, lambda device, tiny: iter(()))
    gpu.run(part, record, gpu.time.time() + 60)
    found = parts["record"].Record.read(record.path).rows("made-up")
    assert [row["state"] for row in found.values()] == ["cut off", "cut off", "measured"]


def test_a_row_that_was_cut_off_is_tried_again_by_the_next_run(gpu, parts, record, monkeypatch):
    """Within a run it is not, else it would take all of the time; nor is it a failure."""
    late = iter([True, False])

    def measure():
        if next(late):
            raise TimeoutError("the part's time is over")
        return {"x": 1}

    part = parts["part"].Part("made-up", "", 60, lambda device, tiny: iter({"a": measure}.items()))
    for _ in range(2):
        gpu.work(part, record)
        assert record.rows("made-up")["a"]["state"] == "cut off"
    assert not gpu.told(record, [part])

    def child(command, **how):
        gpu.work(part, parts["record"].Record.read(record.path))
        return subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)

    monkeypatch.setattr(gpu, "subprocess", types.SimpleNamespace(Popen=child, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(gpu, "asked", lambda query: {})
    gpu.run(part, record, gpu.time.time() + 60)
    assert record.rows("made-up")["a"]["figures"] == {"x": 1}


def test_rows_that_are_not_begun_in_time_stay_open(gpu, parts, record, monkeypatch):
    monkeypatch.setenv(parts["part"].END, "1")
    part = parts["part"].Part("made-up", "", 60, lambda device, tiny: iter({"a": dict}.items()))
    gpu.work(part, record)
    assert record.rows("made-up") == {}


def test_results_of_another_card_or_code_go_to_another_file(parts, tmp_path, monkeypatch):
    module, files = parts["record"], []
    real = module.about
    for changed in ({}, {"gpu": "NVIDIA H100"}, {"sources": "others"}, {"commit": "another"}, {"driver": "1"}):
        monkeypatch.setattr(module, "about", lambda tiny, changed=changed: {**real(tiny), **changed})
        one = module.Record.open(tmp_path, True)
        one.save()
        assert module.Record.open(tmp_path, True).path == one.path
        files.append(one.path.name)
    assert len(set(files)) == len(files)
    assert "NVIDIA-H100" in files[1]


def test_a_file_that_is_none_of_results_is_named_and_passed_over(parts, tmp_path, capsys):
    for number, text in enumerate(("{", "[]", '{"about": 1, "parts": {}}')):
        (tmp_path / f"{number}.json").write_text(text)
    assert parts["record"].Record.all(tmp_path) == []
    assert capsys.readouterr().out.count("passed over: ") == 3


def made_up(parts, rows, part="loss-speed"):
    about = {"gpu": "NVIDIA H100", "driver": "1", "commit": "abc", "versions": {"torch": "2"}, "tiny": False}
    measured = {name: {"state": "measured", "figures": figures} for name, figures in rows.items()}
    return parts["record"].Record(Path("x.json"), {"about": about, "parts": {part: {"rows": measured}}})


def test_the_page_judges_the_worst_row_and_leaves_open_what_nobody_measured(parts):
    page = parts["page"]
    name = "loss, N 8,192, D {}, V 50,265, K 100, bfloat16, τ 2"
    figures = {"head / products": 1.1, "ki / ce": 1.01, "seconds": {"ce": 2.0, "dense ce": 3.0, "liger ce": 1.0}}
    worse = {"head / products": 1.3, "ki / ce": 1.01, "seconds": {"ce": 1.0, "dense ce": 3.0}}
    said = page.page([made_up(parts, {name.format("768"): figures, name.format("1,024"): worse})])
    lines = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("| ")}
    assert (
        "1.3 **not reached**, 2 rows, worst: " + name.format("1,024")
        in lines["the head with its loss, in its three bare products"]
    )
    assert "1.01 reached" in lines["inheriting, in cross-entropy by the same function"]
    assert "2 **not reached**" in lines["cross-entropy, in the fastest peer's time"]
    assert lines["the teach stage, of the bare forward pass"].endswith("| open |")
    assert "## claim: a larger model that inherits, and one that learns alone\n\nOpen." in said


def test_every_goal_is_of_rows_that_a_gpu_run_has(gpu, parts):
    """A goal that no row can meet would stay open for ever; inheritance is judged in both half precisions."""
    named = {part.name: [name for name, _ in part.rows("cuda", False)] for part in gpu.PARTS}
    found = {goal.said: fnmatch.filter(named[goal.part], goal.row) for goal in parts["page"].GOALS}
    assert all(found.values()), found
    large = found["inheriting, roberta-large, in self-learning"]
    assert large == [f"roberta-large, zero{stage}_{half}" for half in ("bf16", "fp16") for stage in (1, 2, 3)]


def test_without_any_result_every_row_is_open(parts):
    said = parts["page"].page([])
    table = [line for line in said.splitlines() if line.startswith("| ")][1:]
    assert "No GPU has been at hand yet" in said
    assert len(table) == len(parts["page"].GOALS) + 1 and all(line.endswith("| open |") for line in table)


def test_the_page_in_the_docs_is_drawn_from_the_files_beside_it(parts, monkeypatch, tmp_path):
    kept = (ROOT / "docs" / "results" / "gpu.md").read_text()
    monkeypatch.setattr(parts["page"], "PAGE", tmp_path / "gpu.md")
    assert parts["page"].write_page().read_text() == kept


def test_tiny_does_not_write_into_the_docs():
    done = program("--tiny")
    assert done.returncode == 2 and "give --output DIR" in done.stderr


def test_without_a_gpu_every_part_says_so(tmp_path):
    done = program(
        "--only", "environment", "--only", "sweep", "--output", tmp_path, environment={"CUDA_VISIBLE_DEVICES": ""}
    )  # fmt: skip
    (file,) = tmp_path.glob("*.json")
    data = json.loads(file.read_text())
    assert done.returncode == 0, done.stderr
    assert data["about"]["gpu"] is None
    for part in ("environment", "sweep"):
        (row,) = data["parts"][part]["rows"].values()
        assert row["state"] == "not here" and row["why"].startswith("no CUDA GPU")


def test_losses_that_ought_to_be_the_same_are(gpu):
    """Peers compute what they are compared for: the dense forms here; the others where there is a GPU."""
    import loss_contenders

    case = loss_contenders.Case(24, 16, 320, 8, "float32")
    x = loss_contenders.inputs(case, "cpu")
    losses = loss_contenders.losses(case, x, compiled=False)
    found = {}
    for name, loss in losses.items():
        loss_contenders.backward(x, loss)()
        found[name] = [loss().detach(), x.hidden_ND.grad, x.weight_VD.grad]
    for one, other in (("ki", "dense ki"), ("ki, again", "ki"), ("ce", "dense ce"), ("deepspeed ce, torch", "ce")):
        torch.testing.assert_close(found[one], found[other], rtol=1e-4, atol=1e-4)


def test_others_losses_are_the_same_too(gpu):
    """Liger's, where it is installed; in Triton's interpreter where there is no GPU."""
    pytest.importorskip("liger_kernel")
    import loss_contenders

    case = loss_contenders.Case(12, 16, 320, 8, "float32")
    x = loss_contenders.inputs(case, "cuda" if torch.cuda.is_available() else "cpu")
    losses = loss_contenders.losses(case, x, compiled=False) | loss_contenders.liger(case, x)
    found = {}
    for name, loss in losses.items():
        loss_contenders.backward(x, loss)()
        found[name] = [loss().detach(), x.hidden_ND.grad, x.weight_VD.grad]
    for one, other in (("liger ce", "ce"), ("liger ce, in fp32", "ce"), ("liger ce and kl", "ki")):
        torch.testing.assert_close(found[one], found[other], rtol=1e-4, atol=1e-4)
