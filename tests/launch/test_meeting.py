"""Where the ranks of one machine meet: where no other machine can come."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import environment
from helpers.ranks import run_ranks

pytestmark = pytest.mark.launch


def listening():
    """The addresses, in the kernel's hexadecimal, at which this process waits for others."""
    import torch

    torch.distributed.barrier()
    mine = {str(Path(fd).readlink()) for fd in Path("/proc/self/fd").iterdir() if Path(fd).is_symlink()}
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()
    ]
    found = [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]
    torch.distributed.barrier()
    return found


def test_ranks_of_one_machine_listen_on_its_loopback_alone():
    found = run_ranks(listening, 1)
    assert found[0] and {address for one in found for address in one} == {f"{socket.htonl(0x7F000001):08X}"}


JOIN = """
import torch
from ki_ds.launch import distributed
distributed.init_distributed()
print("joined", int(distributed.all_reduce(torch.ones(1))), distributed.free_port() > 0)
"""


@pytest.mark.root
@pytest.mark.slow
def test_machine_whose_loopback_is_of_ipv6_alone():
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs: apt-get install iproute2 util-linux")
    inside = 'ip link set lo up && ip address del 127.0.0.1/8 dev lo && exec "$0" "$@"'
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", inside, sys.executable, "-c", JOIN], env=environment(), capture_output=True,
        text=True,
    )  # fmt: skip
    if "unshare" in done.stderr:
        pytest.skip(f"no network namespace here: {done.stderr.strip()}")
    assert done.stdout.splitlines()[-1:] == ["joined 1 True"], done.stderr
