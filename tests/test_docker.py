"""The container files agree with the rest of the project. They are not built here: that needs a container engine."""

import configparser
import re
import subprocess
from pathlib import Path

import docker.utils
import pytest
import torch

import ki_ds
from ki_ds import doctor

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MANUAL = (ROOT / "docs" / "docker.md").read_text()
INSTRUCTIONS = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M)).splitlines()
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=?(.*)$", DOCKERFILE, flags=re.M)[::-1])  # the first of a name counts
STAGES = {line.split(" AS ")[1] for line in INSTRUCTIONS if line.startswith("FROM")}
CUDA_OF_TORCH = {"2.13.0": "13.0"}  # what `pip install torch==…` requires on Linux: cuda-toolkit
PYTHON_OF_SYSTEM = {"ubuntu24.04": "3.12", "bookworm-slim": "3.11"}


def setup_cfg():
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def context(root):
    """The files below root that a build is given."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return {name for name in docker.utils.exclude_paths(str(root), patterns) if (root / name).is_file()}


def test_nothing_but_the_project_reaches_an_image(tmp_path):
    inside = {"ki_ds/cli.py", "ki_ds/targets/FORMAT.md", "tests/kernels/test_loss.py", "runners/test.sh", "setup.cfg"}
    outside = {
        "work/demo/model.bin", ".venv/bin/python", ".git/HEAD", "keys/id_ed25519", "data.txt", ".env",
        "ki_ds/__pycache__/cli.pyc", "ki_ds.egg-info/PKG-INFO", ".mypy_cache/a.json",
    }  # fmt: skip
    for name in inside | outside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert context(tmp_path) == inside


def test_what_is_copied_exists_and_is_not_ignored():
    there = context(ROOT)
    copied = [word for line in INSTRUCTIONS if line.startswith("COPY") for word in line.split()[1:-1]]
    names = {word for word in copied if not word.startswith("--")} - {"."}
    names |= {f"docker/{name}" for name in re.findall(r"/(?:usr/local/lib/ki_ds|tmp/docker)/(\w+\.sh)", DOCKERFILE)}
    names |= {f"docker/{name}" for name in re.findall(r'"\$here/(\w[\w.]*)"', (ROOT / "docker/system.sh").read_text())}
    assert {"constraints.txt", "docker/system.sh", "docker/sshd_config", "docker/healthcheck.sh"} <= names
    assert names <= there


def test_the_tests_find_in_the_image_what_they_read():
    needed = {"Dockerfile", ".dockerignore", "docs/docker.md", "ds_configs/experiments/demo.json"}
    assert needed <= context(ROOT)


def test_versions():
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)[1]
    cuda, system = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-(\S+)", ARGUMENTS["CUDA_IMAGE"]).groups()
    assert CUDA_OF_TORCH.get(pinned) == cuda, "a torch that is new here: find out its CUDA, then set CUDA_IMAGE"
    if torch.version.cuda and torch.__version__.split("+")[0] == pinned:
        assert torch.version.cuda == cuda
    tested = setup_cfg()["metadata"]["classifiers"]
    for one in (system, ARGUMENTS["CPU_IMAGE"].split(":")[1]):
        assert f"Python :: {PYTHON_OF_SYSTEM[one]}\n" in tested
    assert ARGUMENTS["VERSION"] == ki_ds.__version__


def test_extras_exist():
    asked = [extra for one in re.findall(r"/opt/ki_ds\[(\S+)\]", DOCKERFILE) for extra in one.split(",")]
    assert "gpu" in asked and "test" in asked
    assert set(asked) <= set(setup_cfg()["options.extras_require"])


def test_programs_that_doctor_looks_for_are_installed():
    installed = (ROOT / "docker" / "system.sh").read_text().split("apt-get install")[1].split("rm -rf")[0].split()
    wanted = [re.search(r"apt-get install (\S+)", remedy) for remedy in doctor.PROGRAMS.values()]
    assert len(packages := {found[1] for found in wanted if found}) >= 4
    assert packages <= set(installed)


def test_the_manual_names_what_there_is():
    assert set(re.findall(r"--target (\w+)", MANUAL)) == {"gpu", "cpu"} <= STAGES
    assert set(re.findall(r"--build-arg (\w+)", MANUAL)) <= set(ARGUMENTS)


def test_one_ssh_port():
    places = ("docker/sshd_config", "docker/ssh_config", "docker/healthcheck.sh")
    found = [re.findall(r"(?:Port|-p) (\d+)", (ROOT / place).read_text()) for place in places]
    assert found == [["2222"]] * 3


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [(["sh", "-c", "echo ran; exit 7"], 7, "ran\n"), (["node"], 2, "authorized_keys cannot be read by user")],
)
def test_entrypoint(tmp_path, command, code, words):
    done = subprocess.run(
        [ROOT / "docker" / "entrypoint.sh", *command], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == code and words in done.stdout
