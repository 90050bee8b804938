"""Shared fixtures. Tests run beside each other on few cores: one thread each, and no third-party noise."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from ki_ds.launch import distributed

torch.set_num_threads(1)
distributed.quiet()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """(experiment file, work directory) of a whole run by two ranks, for tests that disturb one like it."""
    from helpers.commands import ki_ds, write
    from helpers.faulty import EXPERIMENT
    from helpers.tiny_experiment import TEXT

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "a.txt").write_text(TEXT)
    file = write(folder / "e.json", EXPERIMENT)
    ki_ds("run", file, "--workdir", folder / "work", "--processes", 2)
    return file, folder / "work"
