"""`pytest -m gpu`: what else of the tests only a GPU shows."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gpu_parts.part import ROOT, Figures, NotHere, Row, seconds_left

NEEDED = ("pytest", "pytest_timeout", "hypothesis")


def rows(device: str, tiny: bool) -> Iterator[Row]:
    """The tests of kernels that run on the device; then those that need one. Tiny: the latter, which then skip."""
    if not tiny:
        yield "pytest -m gpu, kernels", partial(tested, "tests/kernels")
    yield "pytest -m gpu, the rest", partial(tested, "tests", "--ignore=tests/kernels", "--ignore=tests/benchmarks")


def tested(*words: str) -> Figures:
    """How many passed and were skipped.

    Raises:
        NotHere: pytest or one of its plugins is not installed.
        AssertionError: some failed, with their names and what was said.
    """
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise NotHere(f"{', '.join(lacking)} not installed")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "gpu", f"--junitxml={report}", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *words, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds_left(), 1))
        assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
        suite = next(iter(ElementTree.parse(report).getroot()))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        f"{case.attrib['classname']}::{case.attrib['name']}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    assert not bad, f"{len(bad)} of {counts['tests']} failed: {', '.join(bad)}\n{done.stdout[-6000:]}"
    return counts
