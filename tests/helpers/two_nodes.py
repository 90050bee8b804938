"""Two nodes on one machine: each has a network, processes, mounts and a host name of its own, and runs an sshd.

They are joined by a cable (a veth pair) and share the file system. A node lives as long as the pipe to its first
process is open: when this process ends, however it ends, the kernel ends all processes of the node, and removes its
network, mounts and cable with them; nothing is left behind, and no name outside is taken.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.commands import alive, descendants, environment

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
PROGRAMS = {
    "ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "hostname": "hostname",
    "unshare": "util-linux", "nsenter": "util-linux",
}  # fmt: skip
UNSHARE = ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "--kill-child"]
CABLE = "eth0"  # the link's name in both nodes
RANK = "-m ki_ds.cli worker"  # on the command line of ranks, and of nothing else

# The first process of a node. sshd and ssh read /etc/ssh, names are looked up in /etc/hosts: the node's own.
BOOT = """
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh" /etc/ssh
[ ! -d ~/.ssh ] || mount -t tmpfs tmpfs ~/.ssh
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
hostname "$1"
ip link set lo up
"$3" -E "$2/$1.log"
echo up
cat  # until the pipe is closed; the shell meanwhile reaps the node's orphans
exit 0
"""
SSHD = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/user_key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
"""
SSH = """
Host *
  IdentityFile /etc/ssh/user_key
  BatchMode yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


@functools.cache
def missing() -> str:
    """Why there can be no two nodes here, and what to install; empty where there can be."""
    packages = {package for name, package in PROGRAMS.items() if not shutil.which(name, path=PATH)}
    if packages:
        return f"two nodes need: apt-get install {' '.join(sorted(packages))}"
    probe = "mount -t tmpfs tmpfs /run && ip link add name one type veth peer name other"
    done = subprocess.run([*UNSHARE, "sh", "-c", probe], env=_environment(), capture_output=True, text=True)
    said = " ".join(done.stderr.split())
    return f"two nodes need namespaces and veth pairs, as root: {said or done.returncode}" if done.returncode else ""


@dataclass(frozen=True)
class Node:
    name: str
    address: str
    first: int  # its first process, as this machine counts them: the end of it is the end of the node
    network: str  # its network namespace, as /proc shows it


class Cluster:
    """Two nodes, `node-a` and `node-b`, one slot each; commands and ranks start in `folder`, which both see."""

    def __init__(self, folder: Path, a: Node, b: Node):
        self.folder = folder
        self.a, self.b = a, b
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text(f"{a.name} slots=1\n{b.name} slots=1\n")
        # what DeepSpeed's launcher is to export to all nodes, read from the folder where it is started
        (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")

    def start(self, node: Node, command: list[str]) -> subprocess.Popen[str]:
        """Start a command on a node, in a process group of its own: signal it with `os.killpg(process.pid, …)`.

        Its standard output and error come together in `stdout`.
        """
        enter = ["nsenter", "--target", str(node.first), "--net", "--pid", "--mount", "--uts"]
        there = ["sh", "-c", 'cd "$0" && exec "$@"', str(self.folder), *command]
        return subprocess.Popen(
            [*enter, "--", *there], env=_environment(), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, node: Node, command: list[str], code: int = 0, timeout_s: float = 120) -> str:
        """Run a command on a node to its end; what it printed. Fails the test on another exit code, or too late."""
        before = self._processes()
        process = self.start(node, command)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            for pid in self._processes() - before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            output = f"not done after {timeout_s} s\n{process.communicate()[0]}"
        assert process.returncode == code, f"exit code {process.returncode}, expected {code}\n{output}"
        return output

    def processes(self, node: Node, words: str = "") -> list[int]:
        """Ids, as this machine counts them, of a node's processes whose command line has these words.

        A process is a node's when its network is: so this says what really runs where.
        """
        found = []
        for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]:
            with contextlib.suppress(OSError):  # ended meanwhile
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if os.readlink(f"/proc/{pid}/ns/net") == node.network and words in line and alive(pid):
                    found.append(pid)
        return sorted(found)

    def _processes(self) -> set[int]:
        return {pid for node in (self.a, self.b) for pid in self.processes(node)}

    def link(self, up: bool) -> None:
        """Plug node-b's end of the cable in, or pull it: no packet gets through, and no one is told."""
        _in_network(self.b.first, "ip", "link", "set", CABLE, "up" if up else "down")


@contextlib.contextmanager
def two_nodes(folder: Path):
    """A running `Cluster` whose files are in `folder`; when this ends, so does everything that runs on it.

    Skips the test where there can be no such nodes.
    """
    if missing():
        pytest.skip(missing())
    _write_configuration(folder)
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(_node(folder, f"node-{x}", f"10.77.0.{n}")) for n, x in ((1, "a"), (2, "b")))
        _in_network(
            a.first, "ip", "link", "add", "name", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(b.first)
        )
        for node in (a, b):
            _in_network(node.first, "ip", "address", "add", f"{node.address}/24", "dev", CABLE)
            _in_network(node.first, "ip", "link", "set", CABLE, "up")
        yield Cluster(folder, a, b)


def _write_configuration(folder: Path) -> None:
    ssh = folder / "ssh"
    ssh.mkdir()
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / name)], check=True)
    (ssh / "sshd_config").write_text(SSHD)
    (ssh / "ssh_config").write_text(SSH)
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n")


@contextlib.contextmanager
def _node(folder: Path, name: str, address: str):
    sshd = shutil.which("sshd", path=PATH)  # it starts itself anew for each connection: by its whole path
    process = subprocess.Popen(
        [*UNSHARE, "sh", "-euc", BOOT, "sh", name, str(folder), str(sshd)], env=_environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    first = 0
    try:
        assert process.stdout.readline() == "up\n", f"{name} does not start"
        first = min(descendants(process.pid))
        yield Node(name, address, first, os.readlink(f"/proc/{first}/ns/net"))
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()  # the first process dies with it (--kill-child), and with that one all others
        process.wait()
        process.stdout.close()
        limit = time.monotonic() + 10
        while first and alive(first) and time.monotonic() < limit:
            time.sleep(0.05)


def _in_network(pid: int, *command: str) -> None:
    subprocess.run(["nsenter", "--target", str(pid), "--net", "--", *command], env=_environment(), check=True)


def _environment() -> dict[str, str]:
    return environment() | {"PATH": PATH}
