"""The demo's text: docstrings of installed Python packages, parsed from their files; nothing is imported."""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import json
import multiprocessing
import os
import signal
import sysconfig
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ki_ds.errors import UserError, unreadable
from ki_ds.files import write_atomically

DEMO_PACKAGES = ("torch", "numpy", "sympy", "networkx", "stdlib")  # the first four come with torch and deepspeed
MIN_DOCSTRING_CHARACTERS = 200
PARSERS = 2  # processes
PARALLEL_FILES = 400  # fewer Python files are parsed sooner than the processes start

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def write_documentation(path: Path, names: Sequence[str] = DEMO_PACKAGES) -> None:
    """Write the documentation of the named packages to a JSON Lines file, a document a line under "text".

    Raises:
        UserError: a package is not installed, or has no Python files that can be read; the file cannot be written.
    """
    write_atomically(path, (json.dumps({"text": text}).encode() + b"\n" for text in documentation(names)))


def documentation(names: Sequence[str]) -> Iterator[str]:
    """The long docstrings of the named packages, package by package, by path, in source order.

    "stdlib" is the standard library with the topics of `help()`.

    Raises:
        UserError: a package is not installed, or has no Python files.
    """
    return _parsed([path for name in names for path in _python_files(name)])


def _parsed(paths: list[str]) -> Iterator[str]:
    if len(paths) < PARALLEL_FILES:
        yield from (text for path in paths for text in _docstrings(path))
        return
    # Spawned, since a fork of a process with threads can hang. Syntax trees have no cycles for the collector to find.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PARSERS, mp_context=context, initializer=_begin) as pool:
        for texts in pool.map(_docstrings, paths, chunksize=16):
            yield from texts


def _begin() -> None:
    """In each of the processes: they wait for work for ever where their parent was killed, unless they watch it. A
    terminal's Ctrl-C is the parent's to answer; they end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _python_files(name: str) -> list[str]:
    if name == "stdlib":
        roots, pruned = [sysconfig.get_path("stdlib")], _NOT_LIBRARY
    else:
        if not name.isidentifier():
            raise UserError(f'"{name}" is not the name of a package; expected one like "torch", without dots')
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # what find_spec raises for modules loaded in unusual ways
            spec = None
        if spec is None:
            raise UserError(f'the package "{name}" is not installed here; run `pip install {name}`')
        roots, pruned = list(spec.submodule_search_locations or [spec.origin or ""]), {"__pycache__"}
    paths = [root for root in roots if os.path.isfile(root) and root.endswith(".py")]
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = [child for child in folders if child not in pruned]
            paths += [os.path.join(folder, file) for file in names if file.endswith(".py")]
    if not paths:
        raise UserError(f'"{name}" has no Python files here; leave it out, or take "stdlib"')
    return sorted(paths)


def _docstrings(path: str) -> list[str]:
    """The long docstrings of a Python file in source order, or the help topics; none of a file that does not parse."""
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    if Path(path).parts[-2:] == ("pydoc_data", "topics.py"):
        return _topics(tree)
    found: list[str] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= MIN_DOCSTRING_CHARACTERS:
                found.append(text)
        bodies = (getattr(node, part, None) for part in ("body", "handlers", "orelse", "finalbody", "cases"))
        pending += reversed([child for body in bodies if isinstance(body, list) for child in body])
    return found


def _topics(tree: ast.Module) -> list[str]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            return [topics[key] for key in sorted(topics)]
    return []
