"""The file of results: one card, one commit, one set of versions; written anew after every row."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpu_parts.part import ROOT
from ki_ds.files import write_atomically
from ki_ds.sealed import versions

FOLDER = ROOT / "docs" / "results" / "gpu"
SAME = ("gpu", "driver", "commit", "sources", "versions", "tiny")  # of what one file speaks
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,pcie.link.gen.max"
NOW = "clocks.sm,clocks.memory,power.draw,temperature.gpu,clocks_event_reasons.active"


def asked(query: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = said.stdout.strip().split(", ")
    return dict(zip(query.split(","), values, strict=True)) if said.returncode == 0 and len(values) > 1 else {}


def commit() -> str:
    """Of the checkout, with a word where files differ from it; KI_DS_COMMIT where there is no checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("KI_DS_COMMIT", "unknown")
    changed = git("status", "--porcelain", "--", "ki_ds", "benchmarks", "tests/helpers")
    return head + (" and changes" if changed else "")


def sources() -> str:
    """The digest of all code that is measured, or measures."""
    files = sorted(file for place in ("ki_ds", "benchmarks", "tests/helpers") for file in (ROOT / place).rglob("*.py"))
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def scratch(name: str) -> Path:
    """A folder of the system's temporary one that belongs to this user and this code."""
    return Path(tempfile.gettempdir()) / f"ki_ds-{name}-{os.getuid()}-{sources()}"


def about(tiny: bool) -> dict[str, Any]:
    """The machine and the code."""
    there = torch.cuda.is_available()
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if there else None,
        "driver": asked("name,driver_version").get("driver_version"),
        "card": asked(QUERY),
        "commit": commit(),
        "sources": sources(),
        "versions": {**versions(), "triton": _version("triton"), "liger-kernel": _version("liger-kernel"),
                     "cuda": torch.version.cuda, "python": platform.python_version()},
        "tiny": tiny,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "begun": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip
    if there:
        major, minor = torch.cuda.get_device_capability()
        found["capability"] = f"{major}.{minor}"
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return found


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class Record:
    """The results of a run, or of several that belong together."""

    def __init__(self, path: Path, data: dict[str, Any]):
        self.path, self.data = path, data

    @classmethod
    def open(cls, folder: Path, tiny: bool) -> Record:
        """The file of this card, this code and these versions where there is one, else a new one."""
        here = about(tiny)
        folder.mkdir(parents=True, exist_ok=True)
        for found in cls.all(folder):
            if all(found.data["about"].get(key) == here[key] for key in SAME):
                return found
        card = re.sub(r"[^A-Za-z0-9]+", "-", here["gpu"] or "no-gpu").strip("-")
        stem = ("tiny-" if tiny else "") + f"{card}-{time.strftime('%Y-%m-%d')}"
        names = [f"{stem}.json", *(f"{stem}-{number}.json" for number in range(2, 100))]
        return cls(next(folder / name for name in names if not (folder / name).exists()), {"about": here, "parts": {}})

    @classmethod
    def all(cls, folder: Path) -> list[Record]:
        """The files of results of a folder; another file is named and passed over."""
        found = []
        for file in sorted(folder.glob("*.json")):
            try:
                found.append(cls.read(file))
            except ValueError as error:
                print(f"passed over: {error}")
        return found

    @classmethod
    def read(cls, path: Path) -> Record:
        """Of a file.

        Raises:
            ValueError: it is no file of results.
        """
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not isinstance(data, dict) or not all(isinstance(data.get(key), dict) for key in ("about", "parts")):
            raise ValueError(f"{path}: is no file of results")
        return cls(path, data)

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        """What is known of a part's rows, by name."""
        found: dict[str, dict[str, Any]] = self.data["parts"].setdefault(part, {}).setdefault("rows", {})
        return found

    def settled(self, part: str, row: str) -> bool:
        """Whether a row was measured, or cannot be on this machine."""
        return self.rows(part).get(row, {}).get("state") in ("measured", "not here")

    def write(self, part: str, row: str, state: str, **more: Any) -> None:
        """Set down a row, and the whole file at once."""
        self.rows(part)[row] = {"state": state, **more}
        self.save()

    def note(self, part: str, **facts: Any) -> None:
        """Set down something of a part as a whole."""
        self.data["parts"].setdefault(part, {"rows": {}}).update(facts)
        self.save()

    def save(self) -> None:
        """Write the file anew, whole or not at all."""
        write_atomically(self.path, (json.dumps(self.data, indent=1) + "\n").encode())
