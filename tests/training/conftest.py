"""Corpora with targets on disk, for each objective and width of ids."""

import pytest
from helpers.taught_corpora import make_world


@pytest.fixture(scope="module", params=["mlm", "clm", "mlm, three-byte ids"])
def world(request, tmp_path_factory):
    objective, _, wide = request.param.partition(",")
    views = 1 if objective == "clm" else 3
    return make_world(tmp_path_factory.mktemp("targets"), objective, 90_000 if wide else 300, views)
