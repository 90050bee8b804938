"""DeepSpeed's own names that this package leans on are there in the DeepSpeed that is installed."""

import configparser
import importlib
import inspect
import re
from functools import reduce

import pytest

from ki_ds.engine.deepspeed_names import NAMES


@pytest.mark.parametrize("private", NAMES, ids=lambda one: f"{one.module}:{one.name}")
def test_name_is_there(private):
    """What only instances have is looked for in the source of their class: a value that is assigned to it."""
    module = importlib.import_module(f"deepspeed.{private.module}")
    assert private.purpose
    if private.kind == "attribute":
        assert reduce(getattr, private.name.split("."), module) is not None
    elif private.kind == "instance":
        name, _, attribute = private.name.partition(".")
        source = "".join(inspect.getsource(one) for one in getattr(module, name).__mro__[:-1])
        assert re.search(rf"self\.{attribute}\b[^=\n]* = ", source)
    else:
        assert private.name in inspect.getsource(module)


def test_version_of_deepspeed_is_bounded_and_within():
    import deepspeed
    from packaging.requirements import Requirement

    setup = configparser.ConfigParser()
    setup.read("setup.cfg")
    wanted = [Requirement(line) for line in setup["options"]["install_requires"].split()]
    found = next(one for one in wanted if one.name == "deepspeed")
    assert {one.operator for one in found.specifier} == {">=", "<"}
    assert deepspeed.__version__ in found.specifier
