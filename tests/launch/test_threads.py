"""How idle OpenMP threads wait in a process of ki-ds, as the runtime itself tells it."""

import subprocess

import pytest
from helpers.commands import command, environment


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "0"),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000", marks=pytest.mark.slow),
        pytest.param({"GOMP_SPINCOUNT": "500"}, "500", marks=pytest.mark.slow),
    ],
    ids=["by default they sleep", "a policy that was set stays", "a count that was set stays"],
)
def test_idle_threads_sleep_unless_the_user_says_otherwise(given, spins):
    clean = {name: value for name, value in environment().items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    told = subprocess.run(
        command("--version"), env=clean | given | {"OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True
    )
    if "GOMP" not in told.stderr:
        pytest.skip("this torch brings another OpenMP runtime than GNU's")
    assert f"GOMP_SPINCOUNT = '{spins}'" in told.stderr
