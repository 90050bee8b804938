"""Results are seconds of work: where they are of something else they are made again, and nobody has to remove them."""

import json

import pytest
from helpers.commands import here
from helpers.engines import world  # noqa: F401
from helpers.experiments import written
from helpers.pipelines import opened, put_model

from ki_ds.errors import UserError
from ki_ds.sealed import read_manifest
from ki_ds.stages.evaluate import Evaluate
from ki_ds.stages.teach import Teach
from ki_ds.targets.manifest import open_folder


def nats(space):
    return json.loads((space.root / "results" / "t" / "perplexity.json").read_text())["corpora"]["a"]["nats"]


@pytest.mark.parametrize("left", ["sealed", "begun"])
def test_results_of_another_model_are_made_again(space, left):
    stage, folder = Evaluate("t"), space.root / "results" / "t"
    put_model(space, 1)
    stage.run(space)
    first, before = nats(space), {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    stage.run(space)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before  # done before
    if left == "begun":
        (folder / "manifest.json").rename(folder / "unsealed.json")
    put_model(space, 2)
    assert stage.state(space) == "other"
    with pytest.raises(
        UserError, match=r"results/t: made from something else\. Run `ki-ds evaluate`: it is made again"
    ):
        stage.check_identity(space)  # as the report does: it does not show them
    stage.run(space)
    assert stage.state(space) == "sealed" and nats(space) != first
    assert [path.name for path in folder.parent.iterdir()] == ["t"]


def test_old_results_stay_until_the_new_are_sealed(space, monkeypatch):
    stage, folder = Evaluate("t"), space.root / "results" / "t"
    put_model(space, 1)
    stage.run(space)
    first = (folder / "perplexity.json").read_bytes()
    put_model(space, 2)
    with monkeypatch.context() as patch:
        patch.setattr("ki_ds.stages.evaluate.validate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.run(space)
    assert stage.state(space) == "unsealed"
    assert (folder.parent / ".t.old" / "perplexity.json").read_bytes() == first
    stage.run(space)
    assert [path.name for path in folder.parent.iterdir()] == ["t"]


def test_targets_that_are_made_again_are_as_wanted_now(tmp_path):
    """Those before held more entries a row: they would have served, but for their teacher."""
    file, work = written(tmp_path, entries=100), tmp_path / "work"
    here("corpus", file, "--workdir", work)
    more, space = opened(file, work, "models.s.inherit.targets.k=32"), opened(file, work)
    put_model(more, 1)
    Teach("t@a").run(more)
    put_model(space, 2)
    space.redo = True
    Teach("t@a").run(space)
    folder = work / "targets" / "t@a"
    assert read_manifest(folder)["config"]["selection"]["k"] == open_folder(folder).codec.k == 16
