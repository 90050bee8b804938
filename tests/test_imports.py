"""The direction of imports: no circle, not even of types, and none that runs upwards."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ki_ds

ROOT = Path(ki_ds.__file__).parent
# from the top: what stands in a line may import what stands in the same line or below
LAYERS = [
    ["cli"],
    ["stages", "report"],
    ["doctor", "planning"],
    ["workspace"],
    ["training", "teaching"],
    ["engine", "exchange"],
    ["models"],
    ["kernels", "corpus", "experiment"],
    ["launch"],
    ["metrics", "targets"],
    ["digests"],
    ["progress", "sealed"],
    ["files", "pinned"],
    ["errors"],
]
UPWARDS = 3  # so many may be


def name_of(file):
    return ".".join(("ki_ds", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imported(file, modules):
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "ki_ds":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else node.module


def graph():
    modules = {name_of(file): file for file in ROOT.rglob("*.py")}
    return {name: {*imported(file, modules)} - {name} for name, file in modules.items()}


def layer(module):
    part = module.split(".")[1]
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def test_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None


def test_imports_run_downwards():
    edges = [(one, other) for one, others in graph().items() for other in others if "ki_ds" not in (one, other)]
    upwards = [f"{one} imports {other}" for one, other in edges if layer(other) < layer(one)]
    assert len(upwards) <= UPWARDS, upwards


MAY_IMPORT = {
    "deepspeed": ("engine.", "teaching.", "launch.", "models.partitioned", "doctor"),
    "triton": ("kernels.device", "kernels.loss.triton_loss", "kernels.select.triton_select"),
}


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_few_import_what_not_every_machine_has(library):
    found = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == library for name in names):
                found.add(name_of(file).removeprefix("ki_ds."))
    assert found and all(name.startswith(MAY_IMPORT[library]) for name in found)


def test_files_are_short_and_few_lie_loose():
    tests = Path(__file__).parent
    long = [
        str(file) for root in (ROOT, tests) for file in root.rglob("*.py") if len(file.read_text().splitlines()) > 400
    ]
    assert not long
    assert len([*ROOT.glob("*.py")]) <= 12
