"""What an image is given, and its scripts, run. Images are not built here: that needs a container engine."""

import subprocess
from pathlib import Path

import docker.utils
import pytest

ROOT = Path(__file__).parent.parent


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


def test_what_the_build_and_the_tests_read_reaches_an_image():
    needed = {
        "setup.cfg", "pyproject.toml", "constraints.txt", "ki_ds/__init__.py", "README.md", "LICENSE",
        "docker/system.sh", "docker/sshd_config", "docker/ssh_config", "docker/entrypoint.sh", "docker/session.sh",
        "docker/healthcheck.sh", ".dockerignore", "ds_configs/experiments/demo.json",
        "ds_configs/engine/zero1_fp32.json",
    }  # fmt: skip
    assert needed <= context(ROOT)


@pytest.fixture
def script(tmp_path):
    """Runs a script of docker/ with made-up programs first on its path: (exit code, what it said)."""

    def run(name, *arguments, home=None, programs=None, **environment):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "home").mkdir(exist_ok=True)
        for program, body in (programs or {}).items():
            (tmp_path / "bin" / program).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / "bin" / program).chmod(0o755)
        for file, text in (home or {}).items():
            (tmp_path / "home" / file).write_text(text)
        given = {"HOME": str(tmp_path / "home"), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **environment}
        done = subprocess.run(
            [ROOT / "docker" / name, *arguments], env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [(["sh", "-c", "echo ran; exit 7"], 7, "ran\n"), (["node"], 2, "authorized_keys cannot be read by user")],
)
def test_entrypoint(script, command, code, words):
    found, said = script("entrypoint.sh", *command)
    assert found == code and words in said


def test_a_session_over_ssh_has_the_environment_of_the_container(script):
    home = {".node-environment": "export NCCL_SOCKET_IFNAME='eth 0'\n"}
    said = script("session.sh", home=home, SSH_ORIGINAL_COMMAND='echo "$NCCL_SOCKET_IFNAME"; exit 3')
    assert said == (3, "eth 0\n")


@pytest.mark.parametrize(
    ("python", "keyscan", "node", "healthy"),
    [
        ("exit 0", "exit 1", False, True),
        ("exit 1", "exit 1", False, False),
        ("exit 0", "echo host ssh-ed25519 AAAA", True, True),
        ("exit 0", "exit 1", True, False),
    ],
    ids=["image", "no package", "node", "node without sshd"],
)
def test_health(script, python, keyscan, node, healthy):
    programs = {"python": python, "nvidia-smi": "exit 0", "ssh-keyscan": keyscan}
    code, _ = script("healthcheck.sh", programs=programs, home={".node-environment": ""} if node else {})
    assert (code == 0) == healthy
