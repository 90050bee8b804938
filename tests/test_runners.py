"""The entry scripts: what is installed, and what is run. pip, pytest and ki-ds are made up: they say what they get."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(tmp_path):
    """Runs a script of a copy of runners/ that has its .venv already; the lines that its programs said."""
    shutil.copytree(ROOT / "runners", tmp_path / "runners")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("as it was\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}/.venv/bin:$PATH\n")
    programs = {name: f'echo {name} "$@"' for name in ("ruff", "mypy", "pytest", "ki-ds")}
    programs["python"] = 'if [ "$3" = install ]; then echo pip "$@"; fi'
    for name, body in programs.items():
        (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)

    def run(name, *arguments):
        done = subprocess.run([tmp_path / "runners" / name, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], "-m not slow"),
        (["--all"], ""),
        (["-k", "loss"], "-m not slow -k loss"),
        (["-m", "not launch and not slow"], "-m not slow -m not launch and not slow"),  # pytest takes the last -m
        (["--all", "-x"], "-x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_all_but_the_slow_tests_are_run_unless_all_are_asked_for(script, given, passed):
    lines = script("test.sh", *given)
    assert lines[-4:] == [
        "ruff check .", "ruff format --check .", "mypy ki_ds", f"pytest -n 2 --dist loadfile {passed}".rstrip()
    ]  # fmt: skip


def test_the_demo_gets_the_arguments_and_the_package_without_extras(script, tmp_path):
    first = script("demo.sh", "--set", "seed=2")
    assert first[-1] == "ki-ds demo --set seed=2"
    assert first[-2].startswith("pip -m pip install ") and first[-2].endswith(f"--editable {tmp_path}")


def test_a_gpus_torch_is_left_as_it_is(script, tmp_path, monkeypatch):
    """What is installed from a folder of wheels, and what the benchmark is given."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in (
        "torch-2",
        "triton-3",
        "nvidia_nccl_cu13-2",
        "cuda_bindings-13",
        "ki_ds-0",
        "nvidia_ml_py-13",
        "hjson-3",
    ):
        (wheels / f"{name}-py3-none-any.whl").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *version_info*) echo 3.12 ;; -c*) ;; *) echo "$@" ;; esac\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    given, itself, benchmark = script("gpu.sh", "--wheels", str(wheels), "--minutes", "38")
    assert [Path(word).name for word in given.split() if word.endswith(".whl")] == [
        "hjson-3-py3-none-any.whl", "nvidia_ml_py-13-py3-none-any.whl"
    ]  # fmt: skip
    assert "--no-index --no-deps" in given and f"--target {tmp_path}/.gpu-site/3.12" in given
    assert "--no-index --no-deps" in itself and itself.endswith(str(tmp_path))
    assert benchmark == "benchmarks/gpu.py --minutes 38"


@pytest.mark.parametrize(("wheels", "said"), [(True, "holds no wheels"), (False, "has no torch")])
def test_a_gpu_run_that_cannot_begin_says_why(script, tmp_path, monkeypatch, wheels, said):
    (tmp_path / "empty").mkdir()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + ("echo 3.12" if wheels else "exit 1"))
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    with pytest.raises(subprocess.CalledProcessError) as refused:
        script("gpu.sh", "--wheels", str(tmp_path / "empty"))
    assert refused.value.returncode == 2 and said in refused.value.stderr


def test_it_is_installed_again_only_when_pins_or_extras_have_changed(script, tmp_path):
    def installed(name):
        return any(line.startswith("pip ") for line in script(name))

    assert [installed("demo.sh"), installed("demo.sh"), installed("test.sh")] == [True, False, True]
    (tmp_path / "constraints.txt").write_text("changed\n")
    assert [installed("demo.sh"), installed("test.sh"), installed("test.sh")] == [True, True, False]
