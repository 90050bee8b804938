"""A work directory of three models, of which one is a student."""

import pytest
from helpers.reports import CURVES, write_model, write_result


@pytest.fixture
def workdir(tmp_path):
    for name, last in CURVES.items():
        write_model(tmp_path, name, last, teacher_steps=8 if name == "student-v1.0" else 0)
        write_result(tmp_path, name, last)
    return tmp_path
