"""What is said, and handed on, whatever letters are in it: on terminals, to shells, to ranks."""

import os
import pty
import re
import subprocess
import sys

import pytest
from helpers.commands import environment, here
from helpers.experiments import written

from ki_ds.errors import UserError
from ki_ds.launch import command
from ki_ds.launch.call import read_call, write_call
from ki_ds.launch.command import Launch, check, command_line
from ki_ds.launch.hosts import hosts

NASTY = "a b $(touch pwned) `touch pwned` 'x' \"y\" %n é"


def test_arguments_of_ranks_pass_no_shell(tmp_path):
    """Neither they, nor the folder they lie in: the launchers' command lines hold plain words."""
    control = tmp_path / NASTY
    control.mkdir()
    arguments = [str(tmp_path / NASTY / "e.json"), "--set", f"name={NASTY}"]
    (tmp_path / "hosts").write_text("node-a slots=1\n")
    launch = Launch(arguments, 1, control, tmp_path / "hosts")
    words = command_line(launch, ["train:s"], control)
    handed_on = words[words.index("--module") :]
    assert all(re.fullmatch(r"[\w.-]+", word) for word in handed_on)
    assert read_call(handed_on[-1])[:5] == ["worker", "train", *arguments]


def test_a_call_that_a_node_does_not_see_says_what_is_shared(tmp_path):
    call = write_call(tmp_path, ["worker"])
    (tmp_path / "call.json").unlink()
    with pytest.raises(UserError, match=r"cannot be read on .*No such file.*a file system that all nodes see"):
        read_call(call)


@pytest.mark.parametrize("name", ["node-1", "a.b.example.org", "Node_2", "10.0.0.1", "fe80::1", "x" * 63, "7"])
def test_names_that_hosts_have(tmp_path, name):
    (tmp_path / "hosts").write_text(f"{name} slots=2\n")
    assert hosts(tmp_path / "hosts") == {name: 2}


@pytest.mark.parametrize(
    "name",
    [
        "-oProxyCommand=x", "a;b", "$(x)", "a,b", "user@a", "a..b", "-", "a-.b", "x" * 64, ".".join(["abc"] * 70), "é",
        "fe80::1%$(x)", ":", "a'b",
    ],
)  # fmt: skip
def test_names_that_no_host_has_are_refused(tmp_path, name):
    """ssh takes a dash in front for an option, and a shell reads the others."""
    (tmp_path / "hosts").write_text(f"ok slots=2\n{name} slots=2\n")
    with pytest.raises(UserError, match=r"hosts:2: found the host .*; expected a name"):
        hosts(tmp_path / "hosts")


@pytest.fixture
def on_nodes(tmp_path, monkeypatch):
    """Checks a launch on a node, by a launcher; ssh is not tried."""
    (tmp_path / "hosts").write_text("node-a slots=1\n")
    monkeypatch.setattr(command.shutil, "which", lambda name: name)
    monkeypatch.setattr(command, "unreachable", lambda names: [])
    # read from HOME when it is first imported, which another test may have done
    monkeypatch.setattr("deepspeed.launcher.runner.DEEPSPEED_ENVIRONMENT_PATHS", [str(tmp_path), "."])
    return lambda **how: check(Launch([], 1, tmp_path, tmp_path / "hosts", **how))


def test_what_shells_on_nodes_would_read_is_refused(on_nodes, tmp_path, monkeypatch):
    on_nodes()
    monkeypatch.setenv("PYTHONX", "$(touch pwned)")
    with pytest.raises(UserError, match=r"the variable PYTHONX, '\$\(touch pwned\)': pdsh takes it to the nodes"):
        on_nodes()
    on_nodes(launcher="mpich")
    monkeypatch.delenv("PYTHONX")
    (tmp_path / ".deepspeed_env").write_text('A=1\nB="$HOME"\n')
    with pytest.raises(UserError, match=r"the variable B in .*deepspeed_env"):
        on_nodes()
    (tmp_path / ".deepspeed_env").unlink()
    (tmp_path / "a $b").mkdir()
    monkeypatch.chdir(tmp_path / "a $b")
    with pytest.raises(UserError, match=r"the current folder, .*: pdsh takes it through a shell"):
        on_nodes()


def test_launcher_args_are_words(on_nodes):
    on_nodes(launcher="mpich", launcher_args="-x 'a b'")
    with pytest.raises(UserError, match="--launcher-args 'a: No closing quotation"):
        on_nodes(launcher="mpich", launcher_args="'a")


@pytest.mark.parametrize("option", ["--workdir", "--hostfile"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, "and 255 between two slashes"),
        ("é" * 130, "and 255 between two slashes"),
        ("x/" * 2000, "a path has at most 3000 bytes"),
        ("a\0b", "embedded null byte"),
    ],
    ids=["name", "name in bytes", "path", "zero"],
)
def test_names_that_no_file_has_are_refused(tmp_path, option, name, words):
    said = here("run", written(tmp_path), option, tmp_path / name, code=2)
    assert words in said and "Traceback" not in said


def run(code, **variables):
    return subprocess.run([sys.executable, "-c", code], env=environment() | variables, capture_output=True, text=True)


def test_terminals_without_our_letters(tmp_path):
    done = run(
        "import sys\nfrom ki_ds.progress import *\noutlast_terminal()\nsay('train s …')\nprint('τ', file=sys.stderr)",
        PYTHONIOENCODING="ascii",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "train s ?\n", "\\u03c4\n")


def test_terminal_that_goes_away_stops_nobody():
    code = """
import sys, time
from ki_ds.progress import *
outlast_terminal()
with Progress("train s", 10, "steps") as shown:
    shown.advance()
    say("begun")
    sys.stdin.read()
    for _ in range(5):
        say("goes on")
        shown.advance()
        print("error", file=sys.stderr, flush=True)
        time.sleep(0.12)
sys.exit(75)
"""
    terminal, other = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=other, stderr=other)
    os.close(other)
    said = b""
    while b"begun" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    process.stdin.close()
    assert process.wait(20) == 75


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x"}, "RANK=x in the environment; expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE=-1 in the environment; expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 in the environment; expected one of 0 … 1"),
    ],
)
def test_numbers_of_ranks_that_are_none(monkeypatch, variables, words):
    monkeypatch.setattr("ki_ds.cli.main.time.sleep", lambda _: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert words in here("--version", code=2)
