"""The nodes of a run: DeepSpeed's host file, and whether ssh reaches them."""

from __future__ import annotations

import ipaddress
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ki_ds.errors import UserError

CONNECT_S = 10
LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
NAME = re.compile(rf"{LABEL}(\.{LABEL})*\.?")


def hosts(hostfile: Path) -> dict[str, int]:
    """The nodes of a DeepSpeed host file, and how many ranks each takes: lines `host slots=N`.

    Raises:
        UserError: it cannot be read, names no host, or has a name that no host can have.
    """
    found: dict[str, int] = {}
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{hostfile}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        if len(fields) != 2 or not fields[1].removeprefix("slots=").isdecimal():
            raise UserError(f"{hostfile}:{number}: found {line.strip()!r}; expected `hostname slots=N`")
        if not _possible(fields[0]):  # a dash in front would make it an option of ssh; a shell reads it on the way
            raise UserError(
                f"{hostfile}:{number}: found the host {fields[0]!r}; expected a name of letters, digits, dots, - and "
                "_, or an address. Users, ports and the like belong in ~/.ssh/config"
            )
        found[fields[0]] = int(fields[1].removeprefix("slots="))
    if not sum(found.values()):
        raise UserError(f"{hostfile}: names no host; expected lines `hostname slots=N`")
    return found


def _possible(name: str) -> bool:
    """Whether a host can be called so: RFC 1123, with underscores, which many networks have; or an address."""
    if NAME.fullmatch(name):
        return len(name) <= 253
    try:
        return ":" in name and "%" not in name and bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def unreachable(names: Sequence[str]) -> list[str]:
    """Hosts on which ssh cannot run a command; all are tried at the same time."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    tries = [(name, subprocess.Popen([*command, name, "true"], **quiet)) for name in names]  # type: ignore[call-overload]
    return [name for name, process in tries if process.wait()]
