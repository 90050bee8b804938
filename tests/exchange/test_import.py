"""`ki-ds targets ask` and `import`: answers are packed, or refused with the place."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.commands import folder_digest
from helpers.exchange import SAMPLES, answer, damage, imported, run
from helpers.folders import forge

from ki_ds.errors import UserError
from ki_ds.experiment.graph import load_experiment
from ki_ds.sealed import read_manifest
from ki_ds.targets.manifest import open_folder


def test_some_samples_have_no_row(world):
    """Otherwise the tests below would not see them."""
    rows = open_folder(world[0] / "big@a").read(np.arange(SAMPLES)).rows
    assert 0 in rows and max(rows) > 1


def test_questions_are_the_corpus_s_own_inputs(world):
    """The questions are what the viewer of the experiment gives, masked."""
    from ki_ds.workspace import Workspace

    root, file, _ = world
    space = Workspace(load_experiment(file), file, root / "work")
    questions = pq.read_table(root / "questions.parquet").to_pylist()
    sequences, views = space.stream("a").pairs(np.arange(SAMPLES))
    view = space.viewer("a")(space.tokens("a").train[sequences], sequences, views)
    for place, one in enumerate(questions):
        assert one["sample"] == place
        assert one["input_ids"] == view.inputs_BS[place].tolist()
        assert one["index"] == np.flatnonzero(view.loss_mask_BS[place]).tolist()
        assert one["token"] == view.labels_BS[place][view.loss_mask_BS[place]].tolist()


def test_imported_again_is_done_before(world):
    root, file, _ = world
    before = folder_digest(root / "big@a")
    arguments = ("--corpus", "a", "--workdir", root / "work", "--name", "big")
    run("import", file, root / "answers.parquet", root / "big@a", *arguments)
    assert folder_digest(root / "big@a") == before


def test_imported_before_samples_had_their_name_is_done_before(world, tmp_path):
    """Folders of former versions say positions; what they are made of is the same."""
    root, file, _ = world
    shutil.copytree(root / "big@a", tmp_path / "old@a")
    manifest = read_manifest(tmp_path / "old@a")
    assert manifest["config"]["positions_per_shard"] == 16
    facts = manifest["facts"]
    facts |= {"positions": facts.pop("samples"), "positions_per_shard": facts.pop("samples_per_shard")}
    forge(tmp_path / "old@a", facts=facts)
    arguments = ("--corpus", "a", "--workdir", root / "work", "--name", "big")
    assert f"{SAMPLES} samples" in run("import", file, root / "answers.parquet", tmp_path / "old@a", *arguments)


def test_answers_without_truth(world, tmp_path):
    rows = answer(world[0] / "questions.parquet", truth=False)
    imported(world, rows, tmp_path, code=0)
    assert open_folder(tmp_path / "made@a").codec.scalars == ("first", 1.0)
    assert "no fault" in run("verify", tmp_path / "made@a", "--deep")


def other_token(rows):
    rows[3]["token"] = (rows[3]["token"] + 1) % 400


def shifted(rows):
    for row in rows:
        row["index"] += 1


def lost_row(rows):
    del rows[5]


def gap(rows):
    rows[:] = [row for row in rows if row["sample"] != rows[8]["sample"]]


def backwards(rows):
    rows.reverse()


def twice(rows):
    rows[4]["ids"], rows[4]["logprobs"] = [7, 7], [-2.0, -2.5]


def beyond(rows):
    rows[4]["ids"], rows[4]["logprobs"] = [400], [-2.0]


def negative(rows):
    rows[4]["ids"], rows[4]["logprobs"] = [-1], [-2.0]


def unequal(rows):
    rows[4]["ids"], rows[4]["logprobs"] = [1, 2], [-2.0]


def linear(rows):
    rows[4]["ids"], rows[4]["logprobs"] = [1, 2], [0.6, 0.3]


def not_a_number(rows):
    rows[4]["logprobs"] = [float("nan")] * len(rows[4]["ids"])


def fraction(rows):
    rows[4]["ids"] = [0.7 + one for one in rows[4]["ids"]]


def text(rows):
    for row in rows:
        row["sample"] = str(row["sample"])


def too_true(rows):
    rows[4]["truth"] = 5.0


def too_far(rows):
    rows.append({**rows[-1], "sample": 10**9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_token, "true token is said to be"), (shifted, "rows at"), (lost_row, "expected"),
        (gap, "expected sample"),
        (backwards, "expected sample"), (twice, "stands twice"), (beyond, "an id of 400"), (negative, "an id of"),
        (unequal, "differ in length"), (linear, "natural log-probabilities"), (not_a_number, "log-probabilities"),
        (too_far, "expected sample"), (fraction, "expected lists of ints"), (text, "expected ints"),
        (too_true, "truth is above"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_refused(world, tmp_path, change, message):
    rows = json.loads(json.dumps(world[2]))
    change(rows)
    assert message in imported(world, rows, tmp_path)


def test_answers_of_other_shapes_are_refused(world, tmp_path):
    root, file, rows = world
    without = [{name: value for name, value in row.items() if name != "token"} for row in rows]
    assert "missing: token" in imported(world, without, tmp_path)
    scalars = [{**row, "ids": row["ids"][0]} for row in rows]
    assert "expected lists" in imported(world, scalars, tmp_path)
    (tmp_path / "text.parquet").write_text("no table")
    arguments = (tmp_path / "made@a", "--corpus", "a", "--workdir", root / "work")
    for name, message in (("text.parquet", "not a Parquet file"), ("absent.parquet", "no such file")):
        assert message in run("import", file, tmp_path / name, *arguments, code=2)
    said = run("ask", file, tmp_path / "q.parquet", "--corpus", "b", "--samples", 1, code=2)
    assert "--corpus b" in said


def test_corrected_answers_can_be_imported_after_a_failure(world, tmp_path):
    rows = json.loads(json.dumps(world[2]))
    rows[-1]["token"] = (rows[-1]["token"] + 1) % 400  # behind two shards that were written
    imported(world, rows, tmp_path)
    assert "48 samples" in imported(world, world[2], tmp_path, code=0)


def test_row_without_ids_is_no_fault(world, tmp_path):
    rows = json.loads(json.dumps(world[2]))
    rows[2]["ids"], rows[2]["logprobs"] = [], []
    imported(world, rows, tmp_path, code=0)
    assert "no fault" in run("verify", tmp_path / "made@a", "--deep")


def test_damaged_import_is_mended_by_importing_again(world, tmp_path):
    imported(world, world[2], tmp_path, code=0)
    before = folder_digest(tmp_path / "made@a")
    damage(tmp_path / "made@a", 1)
    run("repair", tmp_path / "made@a")
    shutil.rmtree(tmp_path / "made@a" / "aside")
    imported(world, world[2], tmp_path, code=0)
    assert folder_digest(tmp_path / "made@a") == before


def test_column_position_is_refused_with_its_new_name(world, tmp_path):
    rows = [{("position" if name == "sample" else name): value for name, value in row.items()} for row in world[2]]
    assert "a column position, which is now called sample" in imported(world, rows, tmp_path)


def test_student_refuses_targets_of_longer_sequences(world, copy):
    """Before it reads any: how much they take is bounded by its own sequence length."""
    from ki_ds.experiment.graph import trained_models
    from ki_ds.stages import student_data
    from ki_ds.workspace import Workspace

    root, file, _ = world
    space = Workspace(load_experiment(file, None, (f'models.big.targets={{"a": "{copy}"}}',)), file, root / "work")
    student = trained_models(space.experiment)["student"]
    assert student_data.targets(space, student, "a").samples == SAMPLES
    facts = read_manifest(copy)["facts"]
    facts["header"]["sequence_length"] = 1 << 20
    forge(copy, facts=facts)
    with pytest.raises(UserError, match="of sequences of 1048576 tokens; expected sequence_length 24"):
        student_data.targets(space, student, "a")
