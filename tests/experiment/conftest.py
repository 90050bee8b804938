"""Loads the example as a user would have written it."""

import json

import pytest
from helpers.experiment_file import DESIGN

from ki_ds.errors import UserError
from ki_ds.experiment.graph import load_experiment
from ki_ds.experiment.strict import merge_patch


@pytest.fixture
def load(tmp_path):
    """Load the design's example under a merge patch; what a user would have written in the file."""

    def loaded(patch=None, scale=None, settings=()):
        path = tmp_path / "e.json"
        path.write_text(json.dumps(merge_patch(json.loads(DESIGN), patch or {})), encoding="utf-8")
        return load_experiment(path, scale, tuple(settings))

    return loaded


@pytest.fixture
def failure(load, tmp_path):
    """The lines of the UserError, each of which opens with the file; that prefix is checked and taken off."""

    def failed(patch=None, scale=None, settings=()):
        with pytest.raises(UserError) as raised:
            load(patch, scale, settings)
        lines = str(raised.value).split("\n")
        prefix = f"{tmp_path / 'e.json'}: "
        assert all(line.startswith(prefix) for line in lines)
        return [line.removeprefix(prefix) for line in lines]

    return failed
