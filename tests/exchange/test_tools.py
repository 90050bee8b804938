"""`ki-ds targets`, from the command line: verify, inspect, repair, bench, export, ask, import."""

import contextlib
import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import folder_digest, ki_ds, write
from helpers.documents import documentation
from safetensors.numpy import load_file

from ki_ds.cli import main as cli
from ki_ds.experiment.graph import load_experiment
from ki_ds.targets.folder import open_folder

GPT = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
TRAIN = {"on": {"a": 1.0}, "steps": 4, "batch_size": 8, "learning_rate": 1e-2, "dropout": 0.0}
EXPERIMENT = {
    "name": "tools",
    "objective": "mlm",
    "sequence_length": 24,
    "masking": {"views": 2, "probability": 0.08},  # some sequences have no row at all
    "tokenizer": {"train": {"vocabulary_size": 400, "on": ["a"]}},
    "corpora": {"a": {"sources": [documentation("logging")], "validation": 0.1}},
    "models": {
        "big": {"targets": {"a": "big@a"}},
        "student": {
            "architecture": {
                "model_type": "roberta", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
                "intermediate_size": 16,
            },
            "train": TRAIN,
            "inherit": {"from": {"a": "big"}, "alpha_T": 1.0, "targets": {"k": 20}},
        },
    },
    "samples_per_shard": 16,
}  # fmt: skip
SAMPLES = 48


def answer(questions, k=20, seed=0, truth=True):
    """Rows of a teacher that says something of its own about every question, as a table."""
    rng = np.random.default_rng(seed)
    rows = []
    for one in pq.read_table(questions).to_pylist():
        for index, token in zip(one["index"], one["token"], strict=True):
            logits = rng.normal(0, 3, 400)
            logits[token] += 5
            logp = logits - np.log(np.exp(logits).sum())
            ids = np.argsort(-logp)[: int(rng.integers(1, k + 1))]
            row = {"sample": one["sample"], "index": index, "token": token}
            row |= {"ids": ids.tolist(), "logprobs": logp[ids].tolist()}
            rows.append(row | ({"truth": float(logp[token])} if truth else {}))
    return rows


def save(rows, path):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def run(*arguments, code=0):
    """What a `ki-ds targets` command says, in this process: each would take seconds to start."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        cli.main(["targets", *map(str, arguments)])
    assert (end.value.code or 0) == code, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An experiment with its corpus, the questions of its first samples, and a teacher's answers, imported."""
    root = tmp_path_factory.mktemp("tools")
    file = write(root / "tools.json", EXPERIMENT)
    ki_ds("corpus", file, "--workdir", root / "work")
    arguments = ("--corpus", "a", "--workdir", root / "work")
    run("ask", file, root / "questions.parquet", *arguments, "--samples", SAMPLES)
    rows = answer(root / "questions.parquet")
    save(rows, root / "answers.parquet")
    said = run("import", file, root / "answers.parquet", root / "big@a", *arguments, "--name", "big")
    assert f"{SAMPLES} samples" in said
    return root, file, rows


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the imported folder, to be damaged."""
    shutil.copytree(world[0] / "big@a", tmp_path / "big@a")
    return tmp_path / "big@a"


def imported(world, rows, tmp_path, code=2):
    """What `import` says of other rows."""
    path = save(rows, tmp_path / "answers.parquet")
    arguments = ("--corpus", "a", "--workdir", world[0] / "work")
    said = run("import", world[1], path, tmp_path / "made@a", *arguments, code=code)
    assert "Traceback" not in said
    if code:
        assert not (tmp_path / "made@a" / "manifest.json").exists()
    return said


# ------------------------------------------------------------------------------------------ import and export


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


def test_export_gives_back_what_was_imported(world, tmp_path):
    root, _, rows = world
    run("export", root / "big@a", tmp_path / "out.parquet", "--workdir", root / "work")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(found) == len(rows)
    for one, row in zip(found, rows, strict=True):
        assert [one[name] for name in ("sample", "index", "token")] == [row[n] for n in ("sample", "index", "token")]
        assert sorted(one["ids"]) == sorted(row["ids"])
        stored = dict(zip(one["ids"], one["logprobs"], strict=True))
        assert one["logprobs"] == sorted(one["logprobs"], reverse=True)
        for token, logp in zip(row["ids"], row["logprobs"], strict=True):
            assert stored[token] == pytest.approx(logp, abs=0.5 * 63 / 1024 + 0.003)
        assert one["truth"] == pytest.approx(row["truth"], abs=0.002 + 1e-6)


def test_arrays_hold_the_same_as_parquet(world, tmp_path):
    root, _, _ = world
    run("export", root / "big@a", tmp_path / "out.parquet", "--workdir", root / "work")
    run("export", root / "big@a", tmp_path / "arrays", "--workdir", root / "work")
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    arrays = [load_file(path) for path in sorted((tmp_path / "arrays").glob("*.safetensors"))]
    for name in ("sample", "index", "token", "truth"):
        assert np.array_equal(np.concatenate([one[name] for one in arrays]), np.array(table[name]))
    lists = [ids.tolist() for one in arrays for ids in np.split(one["ids"], one["ends"][:-1])]
    assert lists == table["ids"]


def test_export_without_the_corpus_says_so_and_leaves_columns_out(copy, tmp_path):
    said = run("export", copy, tmp_path / "out.parquet")
    assert "without the columns index and token" in said
    assert pq.read_schema(tmp_path / "out.parquet").names == ["sample", "truth", "ids", "logprobs"]


def test_imported_again_is_done_before(world):
    root, file, _ = world
    before = folder_digest(root / "big@a")
    arguments = ("--corpus", "a", "--workdir", root / "work", "--name", "big")
    run("import", file, root / "answers.parquet", root / "big@a", *arguments)
    assert folder_digest(root / "big@a") == before


def test_answers_without_truth(world, tmp_path):
    rows = answer(world[0] / "questions.parquet", truth=False)
    imported(world, rows, tmp_path, code=0)
    assert open_folder(tmp_path / "made@a").codec.scalars == ("first", "tail@1")
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


def test_output_that_cannot_be_written_is_refused_at_once(world, tmp_path):
    root, file, _ = world
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.parquet").mkdir()
    more = ("--corpus", "a", "--workdir", root / "work")
    for output, message in (
        (tmp_path / "absent" / "x.parquet", "there is no folder"), (tmp_path / "file", "is a file"),
        (tmp_path / "folder.parquet", "is a folder"), ("s3://bucket/x.parquet", "expected a local path"),
    ):  # fmt: skip
        assert message in run("export", root / "big@a", output, code=2)
    assert "ends in .parquet" in run("ask", file, tmp_path / "q.csv", *more, "--samples", 1, code=2)
    assert "expected a local path" in run("import", file, root / "answers.parquet", "memory://x/y", *more, code=2)


# ------------------------------------------------------------------------------------------ verify and repair


def damage(folder, number):
    """Flip a bit in the middle of the frames of a shard; its path."""
    path = sorted(folder.glob("*.kit"))[number]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))
    return path


def test_whole_folder_has_no_fault(world):
    root = world[0]
    for more in ((), ("--deep",), ("--against-corpus", "--workdir", root / "work"), ("--deep", "--against-corpus", "--workdir", root / "work")):  # fmt: skip  # noqa: E501
        assert "3 shards, 48 samples: no fault" in run("verify", root / "big@a", *more)


def test_every_bad_frame_is_named(copy):
    shards = open_folder(copy)
    index = shards.shard(1).index
    path = copy / shards.name(1)
    data = bytearray(path.read_bytes())
    for frame in (2, 9):
        data[int(index[frame]["offset"]) + int(index[frame]["compressed"]) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    (copy / shards.name(2)).write_bytes((copy / shards.name(2)).read_bytes()[:-50])
    said = run("verify", copy, code=1)
    for named in ("sample 18:", "sample 25:", shards.name(2), "3 faults in 2 of 3 shards"):
        assert named in said
    assert "Traceback" not in said


def test_repair_sets_aside_and_says_what_is_left(copy):
    path = damage(copy, 1)
    kept = path.read_bytes()
    said = run("repair", copy)
    assert "1 of 3 shards to be computed again" in said
    assert not path.exists()
    assert (copy / "aside" / path.name).read_bytes() == kept
    assert "is missing" in run("verify", copy, code=1)
    assert "1 of 3 shards" in run("repair", copy)  # nothing more to set aside


def test_repair_leaves_a_whole_folder_alone(copy):
    before = folder_digest(copy)
    assert "0 of 3 shards" in run("repair", copy)
    assert folder_digest(copy) == before


def test_repair_moves_nothing_where_every_shard_disagrees_with_the_manifest(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["facts"]["header"]["tokenizer"] = "another"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    said = run("repair", copy, code=2)
    assert "all 3 shards seem to be damaged" in said and "tokenizer" in said
    assert len([*copy.glob("*.kit")]) == 3


def test_verify_against_another_corpus(copy, world, tmp_path):
    changed = json.loads(json.dumps(EXPERIMENT))
    changed["corpora"]["a"]["sources"] = [documentation("email")]
    ki_ds("corpus", write(tmp_path / "other.json", changed), "--workdir", tmp_path / "work")
    said = run("verify", copy, "--against-corpus", "--workdir", tmp_path / "work", code=2)
    assert "its digest is" in said


def rewritten(folder, number, change):
    """Write a shard again with right checksums after `change(planes, digests)`."""
    from ki_ds.targets.shard import pack_block, write_shard

    shards = open_folder(folder)
    shard = shards.shard(number)
    start, end = shard.header["start"], shard.header["end"]
    read = shards.read(np.arange(start, end))
    planes, digests = read.planes, np.array(read.digests, np.uint64)
    change(planes, digests)
    block = pack_block(shards.codec, planes, np.cumsum(read.rows), digests, np.zeros(len(planes)))
    header = {name: shard.header[name] for name in shards.header}
    write_shard(folder / shards.name(number), shards.codec, header, start, [block])


def test_another_input_with_right_checksums(copy, world):
    def change(planes, digests):
        digests[3] ^= np.uint64(1)

    rewritten(copy, 1, change)
    assert "no fault" in run("verify", copy)
    said = run("verify", copy, "--against-corpus", "--workdir", world[0] / "work", code=1)
    assert "sample 19: the teacher saw another input" in said


@pytest.mark.parametrize(
    ("scalar", "nats", "message"),
    [("first", 0.5, "above 0"), ("first", -0.001, "sum to more than 1"), ("truth", 0.0, "more probable than"),
     ("tail@1", -30.0, "sum to less than 1")],
)  # fmt: skip
def test_probabilities_that_cannot_be(copy, scalar, nats, message):
    how = open_folder(copy).codec

    def change(planes, digests):
        planes.scalars_Sn[how.scalars.index(scalar)] = round(nats * 256)

    rewritten(copy, 0, change)
    assert "no fault" in run("verify", copy)
    assert message in run("verify", copy, "--deep", code=1)


def test_true_token_with_another_probability(copy, world):
    how = open_folder(copy).codec

    def change(planes, digests):
        planes.scalars_Sn[how.scalars.index("truth")] = -20 * 256

    rewritten(copy, 0, change)
    against = ("--deep", "--against-corpus", "--workdir", world[0] / "work")
    assert "not what its entry says" in run("verify", copy, *against, code=1)


# --------------------------------------------------------------------------------------------- inspect, bench


def test_inspect_shows_figures_and_token_text(world):
    root, _, rows = world
    tables = json.loads(run("inspect", root / "big@a", "--json", "--workdir", root / "work"))
    figures, shown = tables["statistics"], tables["rows"]
    assert figures["rows"] == len(rows)
    assert figures["entries_per_row"] == pytest.approx(np.mean([len(row["ids"]) for row in rows]))
    assert figures["teacher_loss"] == pytest.approx(-np.mean([row["truth"] for row in rows]), abs=0.003)
    mass = np.mean([np.exp(row["logprobs"]).sum() for row in rows])
    assert figures["mass_kept"] == pytest.approx(mass, abs=0.01)
    p = [np.exp(row["logprobs"]) / np.exp(row["logprobs"]).sum() for row in rows]
    assert figures["entropy"] == pytest.approx(np.mean([-(one * np.log(one)).sum() for one in p]), abs=0.01)
    here = [row for row in rows if row["sample"] == 0][: len(shown)]
    for one, row in zip(shown, here, strict=True):
        assert (one["index"], one["token"]) == (row["index"], row["token"])
        assert one["p"] == pytest.approx(np.exp(row["logprobs"])[: len(one["p"])], rel=0.05)
    text = run("inspect", root / "big@a", "--workdir", root / "work")
    assert "sample 0, index" in text and "true '" in text
    assert "bytes_per_entry_of" in text
    assert "holds samples 0 to 48" in run("inspect", root / "big@a", "--sample", 48, code=2)


def test_bench_reads_everything(world):
    assert "rows/s" in run("bench", world[0] / "big@a", "--seconds", "0.2")


@pytest.mark.parametrize("command", ["verify", "repair", "inspect", "bench", "export"])
def test_folder_that_is_none(tmp_path, command):
    more = [tmp_path / "out.parquet"] if command == "export" else []
    said = run(command, tmp_path, *more, code=2)
    assert f"error: {tmp_path}: there is no manifest.json" in said
    assert "Traceback" not in said


# ------------------------------------------------------------------------------------------------ with a teacher


def test_student_of_imported_predictions_trains_and_repair_leads_to_the_same_bytes(world, tmp_path):
    """A student of the imported folder; and a taught folder, damaged and repaired, of which one shard is computed."""
    root, _, _ = world
    experiment = json.loads(json.dumps(EXPERIMENT))
    student = experiment["models"]["student"]
    experiment["models"]["teacher"] = {"architecture": student["architecture"], "train": TRAIN}
    experiment["models"]["pupil"] = {**student, "inherit": {**student["inherit"], "from": {"a": "teacher"}}}
    experiment["models"]["big"]["targets"]["a"] = str(root / "big@a")
    file, work = write(tmp_path / "tools.json", experiment), tmp_path / "work"
    shutil.copytree(root / "work", work)
    names = ("--name", "train:student", "--name", "train:teacher", "--name", "teach:teacher@a")
    ki_ds("worker", "train,teach", file, "--workdir", work, *names)
    taught = work / "targets" / "teacher@a"
    before = folder_digest(taught)
    times = {path.name: path.stat().st_mtime_ns for path in taught.glob("*.kit")}
    path = damage(taught, 1)
    run("verify", taught, code=1)
    run("repair", taught)
    ki_ds("worker", "teach", file, "--workdir", work, "--name", "teach:teacher@a")
    shutil.rmtree(taught / "aside")
    assert folder_digest(taught) == before
    assert {p.name for p in taught.glob("*.kit") if p.stat().st_mtime_ns != times[p.name]} == {path.name}
    assert "no fault" in run("verify", taught, "--deep", "--against-corpus")
    # a shorter run with other shards, just when one is missing, takes nothing away and keeps to the shards there are
    damage(taught, 1)
    run("repair", taught)
    shutil.rmtree(taught / "aside")
    shorter = ("--set", "models.pupil.train.steps=1", "--set", "samples_per_shard=8")
    ki_ds("worker", "teach", file, "--workdir", work, "--name", "teach:teacher@a", *shorter)
    assert folder_digest(taught) == before
    # a longer run appends whole shards of the same length, and touches none that is there
    names = [path.name for path in sorted(taught.glob("*.kit"))]
    times = {name: (taught / name).stat().st_mtime_ns for name in names}
    longer = ("--set", "models.pupil.train.steps=7", "--set", "samples_per_shard=8")
    ki_ds("worker", "teach", file, "--workdir", work, "--name", "teach:teacher@a", *longer)
    assert [path.name for path in sorted(taught.glob("*.kit"))] == [
        *names,
        "targets-000000032-000000048.kit",
        "targets-000000048-000000056.kit",
    ]
    assert {name: (taught / name).stat().st_mtime_ns for name in names} == times
    assert open_folder(taught).samples == 56
