"""Whole pipelines, under the real launcher, on the documentation of a few installed packages."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import alive, environment, folder_digest, ki_ds, killed, metrics, write
from helpers.documents import documentation
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.errors import UserError
from ki_ds.experiment.graph import load_experiment, trained_models
from ki_ds.launch.distributed import free_port
from ki_ds.stages import models, pipeline, student_data
from ki_ds.stages.teach import Teach
from ki_ds.workspace import Workspace

TRAIN = {"steps": 10, "batch_size": 8, "learning_rate": 5e-3, "dropout": 0.0}


def train(on, **changes):
    return {"on": on, **TRAIN, **changes}


def inherit(teachers, **changes):
    return {"from": teachers, "alpha_T": 2.0, "targets": {"k": 24}, **changes}


def gpt(**keys):
    return {"architecture": "gpt-tiny", **keys}


GRAPH = {
    "name": "graph",
    "objective": "clm",
    "sequence_length": 32,
    "tokenizer": {"train": {"vocabulary_size": 500, "on": ["a", "b"]}},
    "corpora": {
        "a": {"sources": [documentation("asyncio", "email")], "validation": 0.1},
        "b": {"sources": [documentation("unittest", "logging")], "validation": 0.1},
    },
    "models": {
        "g1": gpt(train=train({"a": 1.0})),
        "on-b": gpt(train=train({"b": 1.0})),
        "g2": gpt(train=train({"a": 1.0}), inherit=inherit({"a": "g1"})),
        "g3": gpt(
            train=train({"a": 1.0}), inherit=inherit({"a": "g2"}, schedule="heaviside", teacher_steps=4, alpha_T=None)
        ),
        "mixed": gpt(train=train({"a": 1.0, "b": 1.0}), inherit=inherit({"a": "g1", "b": "on-b"})),
        "half": gpt(train=train({"a": 1.0, "b": 1.0}), inherit=inherit({"a": "g1"})),
        "adapted": {
            "start_from": "g2",
            "train": train({"b": 1.0}),
            "inherit": inherit({"b": "on-b"}, schedule="constant", alpha=0.25, alpha_T=None, teacher_steps=6),
        },
        "small-batch": gpt(
            train=train({"a": 1.0}, batch_size=4, steps=14), inherit=inherit({"a": "g1"}, targets={"k": 8})
        ),
    },
    "compare": [{"student": "g2", "baseline": "g1"}],
    "samples_per_shard": 16,
}
for model in GRAPH["models"].values():  # RFC 7396 does not apply to a whole file: leave out what is None
    if "inherit" in model:
        model["inherit"] = {key: value for key, value in model["inherit"].items() if value is not None}

MASKED = {
    "name": "masked",
    "objective": "mlm",
    "sequence_length": 32,
    "masking": {"views": 2},
    "tokenizer": {"train": {"vocabulary_size": 500, "on": ["a"]}},
    "corpora": {"a": {"sources": [documentation("asyncio")], "validation": 0.1}},
    "models": {
        "teacher": {"architecture": "roberta-tiny", "train": train({"a": 1.0}, dropout=0.1)},
        "student": {
            "architecture": "roberta-tiny",
            "train": train(
                {"a": 1.0}, steps=40, micro_batch_size=2, dropout=0.1, evaluate_every=10, checkpoint_every=4
            ),
            "inherit": inherit({"a": "teacher"}),
        },
    },
    "samples_per_shard": 16,
}


TEXT = "\n\n".join(
    f"Entry {n}: the square of {n} is {n * n}, its cube is {n**3}, and a few more words follow." for n in range(700)
)


def student(**keys):
    return gpt(train=train({"a": 1.0}, steps=5), inherit={"from": {"a": "t"}, "teacher_steps": 3, **keys})


SELECTIONS = {
    "name": "selections",
    "objective": "clm",
    "sequence_length": 32,
    "tokenizer": {"train": {"vocabulary_size": 300, "on": ["a"]}},
    "corpora": {"a": {"sources": [{"text": "a.txt"}], "validation": 0.1}},
    "models": {
        "t": gpt(train=train({"a": 1.0})),
        "plain": student(temperature=1.0, targets={"k": 16}),
        "tail": student(temperature=2.0, targets={"select": "top_k_tail", "k": 12}),
        "nucleus": student(targets={"select": "top_p", "p": 0.3, "k": 40}),
        "drawn": student(targets={"select": "sampled", "draws": 20}),
    },
    "samples_per_shard": 8,
}
STORED = {
    **SELECTIONS,
    "name": "stored",
    "models": {
        "t": {"targets": {"a": "work/targets/t@a"}},
        "s": student(temperature=2.0, targets={"select": "top_k_tail", "k": 8}),
        "alone": gpt(train=train({"a": 1.0}, steps=5)),
    },
    "compare": [{"student": "s", "baseline": "alone"}],
}


@pytest.fixture(scope="session")
def selections(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selections")
    (folder / "a.txt").write_text(TEXT)
    file = write(folder / "e.json", SELECTIONS)
    ki_ds("run", file, "--workdir", folder / "work")
    return file, folder / "work"


@pytest.fixture
def stored(selections):
    """The file of an experiment that reads the predictions of another one."""
    file, _ = selections
    return write(file.parent / "stored.json", STORED)


def opened(file, work, *settings):
    """The work directory as the experiment's commands see it, without a process."""
    return Workspace(load_experiment(file, None, settings), file, work)


@pytest.fixture(scope="session")
def graph(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    file = write(folder / "graph.json", GRAPH)
    output = ki_ds("run", file, "--workdir", folder / "work")
    return file, folder / "work", output


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    file = write(folder / "masked.json", MASKED)
    ki_ds("run", file, "--workdir", folder / "work")
    return file, folder / "work"


def copy_without(work, to, *models):
    """A work directory as it is just before the given models are trained."""
    for name in ("tokenizer", "corpora", "targets", "models"):
        shutil.copytree(work / name, to / name)
    for name in models:
        shutil.rmtree(to / "models" / name)
    return to


# -------------------------------------------------------------------------------------------------- the graph


def test_every_model_is_finished_and_evaluated(graph):
    _, work, _ = graph
    for name, model in GRAPH["models"].items():
        lines = metrics(work / "models" / name)
        assert [line["step"] for line in lines] == list(range(1, model["train"]["steps"] + 1))
        assert lines[-1]["validation"].keys() == model["train"]["on"].keys()
        found = json.loads((work / "results" / name / "perplexity.json").read_text())["corpora"]
        assert found.keys() == {"a", "b"}
        for corpus, perplexity in lines[-1]["validation"].items():
            assert found[corpus]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_training_lowers_the_loss(graph):
    _, work, _ = graph
    lines = metrics(work / "models" / "small-batch")
    assert lines[-1]["ce"] < lines[0]["ce"] - 0.3


def test_alpha_and_kl_follow_the_schedules(graph):
    _, work, _ = graph

    def column(name, key):
        return [line[key] for line in metrics(work / "models" / name)]

    assert column("g2", "alpha") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0])
    assert column("g3", "alpha") == [1.0] * 4 + [0.0] * 6
    assert column("adapted", "alpha") == [0.25] * 6 + [0.0] * 4
    assert column("g1", "alpha") == [0.0] * 10
    for name, taught in (("g1", 0), ("g2", 5), ("g3", 4), ("adapted", 6), ("half", 5)):
        assert [value is not None and value > 0 for value in column(name, "kl")] == [True] * taught + [False] * (
            10 - taught
        )


def test_targets_are_computed_once_for_two_students(graph):
    _, work, _ = graph
    assert sorted(path.name for path in (work / "targets").iterdir()) == ["g1@a", "g2@a", "on-b@b"]
    # g2 and mixed and half and small-batch read g1@a: 5 · 8 = 40 samples, 20 of a mix, 7 · 4 = 28; K is the largest
    facts = json.loads((work / "targets" / "g1@a" / "manifest.json").read_text())["facts"]
    assert (facts["samples"], facts["header"]["selection"]["k"]) == (40, 24)
    assert len(list((work / "targets" / "g1@a").glob("*.kit"))) == 3


def test_adaptation_begins_where_its_origin_ended(graph):
    """The perplexity on b of g2 is what the first step of `adapted` has: far below that of a new model."""
    _, work, _ = graph
    first = metrics(work / "models" / "adapted")[0]["ce"]
    origin = json.loads((work / "results" / "g2" / "perplexity.json").read_text())["corpora"]["b"]["nats"]
    assert first == pytest.approx(origin, abs=0.35)
    assert metrics(work / "models" / "on-b")[0]["ce"] > first + 0.3


def test_corpus_without_teacher_learns_by_cross_entropy_alone(graph):
    """In `half`, at α = 1, the loss is τ² KL on rows of a and CE on rows of b."""
    _, work, _ = graph
    first = metrics(work / "models" / "half")[0]
    only_a = metrics(work / "models" / "g2")[0]
    assert first["loss"] > 0.25 * first["ce"]
    assert first["loss"] != pytest.approx(only_a["loss"], rel=0.05)


def test_model_folders_are_hugging_face_folders(graph):
    _, work, _ = graph
    folder = work / "models" / "g2" / "model"
    assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    tokens = np.fromfile(work / "corpora" / "a" / "validation.bin", "<u2").reshape(-1, 32).astype(np.int64)
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    found = json.loads((work / "results" / "g2" / "perplexity.json").read_text())["corpora"]["a"]["nats"]
    assert loss == pytest.approx(found, rel=1e-5)  # perplexity as Hugging Face's own loss gives it
    assert tokenizer.decode(tokenizer("import asyncio")["input_ids"]) == "import asyncio"


def test_report_is_written_and_told(graph):
    _, work, output = graph
    assert (work / "report" / "report.html").exists()
    summary = json.loads((work / "report" / "summary.json").read_text())
    assert json.dumps(summary).count('"g2"')
    assert str(work / "report" / "report.html") in output.splitlines()[-1]
    assert "g2" in output.split("all done")[1]


def test_nothing_is_done_twice(graph):
    file, work, _ = graph
    before = {
        path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and "report" not in path.parts
    }
    output = ki_ds("run", file, "--workdir", work)
    assert output.count("done before") == len(GRAPH["models"]) * 2 + 3 + 3
    after = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and "report" not in path.parts}
    assert before == after


def test_no_pickle_travels(graph):
    """Only DeepSpeed's own checkpoints are pickles."""
    _, work, _ = graph
    allowed = {".json", ".jsonl", ".bin", ".kit", ".safetensors", ".png", ".html", ".jinja", ".txt"}
    for path in work.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts and "tensorboard" not in path.parts:
            assert path.suffix in allowed, path


def test_report_of_another_experiment_is_refused(graph):
    file, work, _ = graph
    said = ki_ds("report", file, "--workdir", work, "--set", "models.g2.train.learning_rate=0.5", code=2)
    assert "models/g2: made from another experiment" in said
    assert "learning_rate: found 0.005, expected 0.5" in said


def test_finished_models_do_without_their_checkpoints(graph, tmp_path):
    file, work, _ = graph
    shutil.copytree(work, tmp_path / "work")
    for folder in (tmp_path / "work" / "models").iterdir():
        shutil.rmtree(folder / "checkpoints")
        shutil.rmtree(folder / "tensorboard")
    assert "done before" in ki_ds("run", file, "--workdir", tmp_path / "work")


def test_status_and_plan(graph):
    file, work, _ = graph
    output = ki_ds("status", file, "--workdir", work)
    assert all(line.startswith("sealed") for line in output.splitlines())
    assert "train mixed (10 of 10 steps)" in output
    output = ki_ds("plan", file, "--workdir", work)
    assert "teach g1@a" in output
    line = next(line for line in output.splitlines() if "train g1 " in line)
    assert "2.56k" in line  # 10 steps · 8 sequences · 32 tokens


# ----------------------------------------------------------------------------------- masked, ranks and resuming


def test_masked_model_loads_and_agrees(masked):
    _, work = masked
    model = AutoModelForMaskedLM.from_pretrained(work / "models" / "student" / "model")
    tokenizer = AutoTokenizer.from_pretrained(work / "models" / "student" / "model")
    assert tokenizer.mask_token_id < model.config.vocab_size == 500
    assert metrics(work / "models" / "student")[-1]["ce"] < 6.0


def test_two_ranks_equal_one(masked, tmp_path):
    """The same losses to rounding; dropout differs between ranks by design, so it is off here."""
    file, work = masked
    off = ("--set", "models.student.train.dropout=0", "--set", "models.student.train.steps=12")
    runs = {}
    for processes in (1, 2):
        here = copy_without(work, tmp_path / str(processes), "student")
        ki_ds("train", file, "--workdir", here, "--processes", processes, *off)
        runs[processes] = metrics(here / "models" / "student")
    for one, two in zip(runs[1], runs[2], strict=True):
        for key in ("loss", "ce", "kl", "gradient_norm"):
            expected = None if two[key] is None else pytest.approx(two[key], rel=2e-5, abs=2e-6)
            assert one[key] == expected, (one["step"], key)
    assert runs[1][-1]["validation"]["a"] == pytest.approx(runs[2][-1]["validation"]["a"], rel=1e-5)


def test_killed_training_continues_the_very_same_run(masked, tmp_path):
    file, work = masked
    here = copy_without(work, tmp_path / "work", "student")
    checkpoints = here / "models" / "student" / "checkpoints"

    def reached(tag):
        return (checkpoints / "latest").exists() and (checkpoints / "latest").read_text() >= tag

    arguments = (file, "--workdir", here, "--name", "student")
    started = killed("train", *arguments, when=lambda: reached("step-00000008"), alone=True)
    assert len(started) >= 3  # the launcher's two processes and the rank: none outlives the command
    limit = time.monotonic() + 30
    while any(alive(pid) for pid in started):
        assert time.monotonic() < limit, "ranks go on without the command that started them"
        time.sleep(0.2)
    killed("worker", "train", *arguments, when=lambda: reached("step-00000020"))
    assert not (here / "models" / "student" / "manifest.json").exists()
    # a save that was cut off: the run must go on from the one named by `latest`
    (checkpoints / "step-99999999").mkdir()
    ki_ds("worker", "train", *arguments)
    whole, resumed = metrics(work / "models" / "student"), metrics(here / "models" / "student")
    for one, two in zip(whole, resumed, strict=True):
        for key in ("step", "loss", "ce", "kl", "alpha", "gradient_norm", "validation"):
            assert one.get(key) == two.get(key), (one["step"], key)
    weights = [folder / "models" / "student" / "model" / "model.safetensors" for folder in (work, here)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len(list(checkpoints.glob("step-*"))) == 2


def test_teach_killed_three_times_is_byte_identical(masked, tmp_path):
    file, work = masked
    more = ("--set", "models.student.inherit.alpha_T=1.0")  # 320 samples: 20 shards
    whole, broken = (copy_without(work, tmp_path / name, "student") for name in ("whole", "broken"))
    for folder in (whole, broken):
        shutil.rmtree(folder / "targets")
    ki_ds("worker", "teach", file, "--workdir", whole, *more)
    targets = broken / "targets" / "teacher@a"
    for count in (1, 6, 12):
        killed(
            "worker",
            "teach",
            file,
            "--workdir",
            broken,
            *more,
            when=lambda n=count: len(list(targets.glob("*.kit"))) >= n,
        )
        assert not (targets / "manifest.json").exists()
    ki_ds("teach", file, "--workdir", broken, *more, "--processes", 2)
    assert folder_digest(targets) == folder_digest(whole / "targets" / "teacher@a")
    assert len(list(targets.glob("*.kit"))) == 20


def test_longer_run_appends_to_its_targets(masked, tmp_path):
    file, work = masked
    here = copy_without(work, tmp_path / "work", "student")
    folder = here / "targets" / "teacher@a"
    before = {path.name: path.read_bytes() for path in folder.glob("*.kit")}
    ki_ds("worker", "teach", file, "--workdir", here, "--set", "models.student.train.steps=60")
    after = {path.name: path.read_bytes() for path in folder.glob("*.kit")}
    assert len(before) == 10 < len(after) == 15
    assert before.items() <= after.items()


def test_runner_scripts_work_under_the_launcher_directly(masked, tmp_path):
    file, work = masked
    here = copy_without(work, tmp_path / "work")
    runner = Path(__file__).parents[2] / "runners" / "evaluate.py"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
    done = subprocess.run(
        [*launcher, str(runner), str(file), "--workdir", str(here)],
        env=environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((folder / "results" / "student" / "perplexity.json").read_text()) for folder in (work, here)]
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------- selections and stored teachers

TEACH = ("t@a", "t@a@sampled-20-t2", "t@a@top_p-0.3")


def student_of(space, name):
    return trained_models(space.experiment)[name]


def targets_read(space, name):
    return student_data.targets(space, student_of(space, name), "a")


def first_batch(space, name):
    loader = student_data.loader(space, student_of(space, name), BatchLayout(8, 8, 0, 1))
    try:
        return loader.load(0, 1.0)
    finally:
        loader.close()


def folder_states(space):
    return {name: Teach(name).state(space) for name in TEACH}


def test_every_selection_trains_to_the_end(selections):
    _, work = selections
    assert sorted(path.name for path in (work / "targets").iterdir()) == sorted(TEACH)
    first = {}
    for name in ("plain", "tail", "nucleus", "drawn"):
        lines = metrics(work / "models" / name)
        assert len(lines) == 5 and lines[-1]["validation"].keys() == {"a"}
        assert [line["kl"] is not None and line["kl"] > 0 for line in lines] == [True] * 3 + [False] * 2
        assert lines[-1]["reading_seconds"] >= lines[0]["reading_seconds"] > 0
        first[name] = lines[0]["kl"]
        assert first[name] != pytest.approx(lines[0]["ce"], rel=1e-3)
    assert len({round(value, 4) for value in first.values()}) == 4  # each reads another target
    assert all(line["reading_seconds"] == 0 for line in metrics(work / "models" / "t"))


def test_headers_say_where_targets_come_from(selections):
    file, work = selections
    header = json.loads((work / "targets" / "t@a" / "manifest.json").read_text())["facts"]["header"]
    space = opened(file, work)
    assert header["teacher"] == {"name": "t", "digest": models.content(space, "t")}
    assert header["corpus"] == {"name": "a", "digest": space.tokens("a").digest}
    assert header["stream"] == {"seed": 1, "views": 1, "sequences": len(space.tokens("a").train)}
    assert header["codec"]["scalars"] == ["first", "truth", "tail@1", "tail@2"]  # temperatures of both students


def test_larger_k_serves_a_smaller_one_and_any_temperature_without_the_teacher(selections):
    """Log-probabilities are stored at temperature 1."""
    file, work = selections
    space = opened(file, work, "models.plain.inherit.targets.k=5", "models.plain.inherit.temperature=3.5")
    assert set(folder_states(space).values()) == {"sealed"}
    (batch,), (whole,) = first_batch(space, "plain"), first_batch(opened(file, work), "plain")
    assert set(batch.targets.count_N.tolist()) == {5} and set(whole.targets.count_N.tolist()) == {16}
    kept = [set(row) for row in whole.targets.ids().tolist()]
    assert all(set(row) <= other for row, other in zip(batch.targets.ids().tolist(), kept, strict=True))


@pytest.mark.parametrize(
    ("setting", "name", "difference"),
    [
        ("models.plain.inherit.targets.k=17", "t@a", "config.selection.k: found 16, expected 17"),
        ("models.tail.inherit.temperature=3", "t@a", "config.scalars: found "),
        ("target_distortion.mean=1e-5", "t@a", "config.target_distortion: found 0.0002, expected 1e-05"),
    ],
)
def test_folder_that_lacks_what_is_asked_is_refused_with_the_key_and_the_remedy(selections, setting, name, difference):
    file, work = selections
    space = opened(file, work, setting)
    assert folder_states(space)[name] == "other"
    with pytest.raises(UserError) as refused:
        pipeline.run(space, pipeline.Launch([], 1, None), "train")
    said = str(refused.value)
    assert f"targets/{name}: made from another experiment" in said and difference in said
    assert f"or remove {work / 'targets' / name} to make it again" in said


def test_tail_at_another_temperature_is_never_read_as_this_one(selections):
    """The last line of defence, should a folder be put in place by hand."""
    file, work = selections
    with pytest.raises(UserError, match=r"at the temperatures 1, 2; expected 3 \(models.tail.inherit.temperature\)"):
        targets_read(opened(file, work, "models.tail.inherit.temperature=3"), "tail")


def test_counts_are_exact_whatever_the_bound(selections):
    file, work = selections
    tight = folder_states(opened(file, work, "target_distortion.mean=1e-5"))
    assert tight["t@a@sampled-20-t2"] == "sealed" and tight["t@a"] == "other"


def test_two_ranks_store_the_same_bytes(selections, tmp_path):
    """Top-k, top-p and draws."""
    file, work = selections
    here = copy_without(work, tmp_path / "work")
    shutil.rmtree(here / "targets")
    ki_ds("teach", file, "--workdir", here, "--processes", 2)
    for name in TEACH:
        assert len(list((here / "targets" / name).glob("*.kit"))) == 3
        assert folder_digest(here / "targets" / name) == folder_digest(work / "targets" / name), name


def test_bound_that_cannot_be_met_ends_with_one_line(selections, tmp_path):
    file, work = selections
    here = copy_without(work, tmp_path / "work")
    shutil.rmtree(here / "targets")
    sets = ("--set", "target_distortion.mean=1e-6", "--set", "models.plain.inherit.targets.k=300")
    said = ki_ds("worker", "teach", file, "--workdir", here, "--name", "t@a", *sets, code=2)
    errors = [line for line in said.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert "target_distortion." in errors[0] and "models.t" in errors[0]
    assert "Traceback" not in said
    assert not (here / "targets" / "t@a" / "manifest.json").exists()


def test_stored_teacher_teaches_in_another_experiment(stored, tmp_path):
    """Its folder is named relative to the experiment file; nobody here runs or evaluates it."""
    work = tmp_path / "work"
    said = ki_ds("run", stored, "--workdir", work)
    assert "all done" in said and "teach" not in said.split("all done")[0]
    assert not (work / "targets").exists() and not (work / "results" / "t").exists()
    assert [line["kl"] is not None for line in metrics(work / "models" / "s")] == [True] * 3 + [False] * 2
    facts = json.loads((work / "models" / "s" / "manifest.json").read_text())["facts"]
    assert facts["teachers"]["a"]["flops_per_sequence"] == 0
    assert (facts["skipped_steps"], facts["skipped_tries"], facts["loss_scale"]) == (0, 0, None)
    space = opened(stored, work)
    assert {stage.state(space) for stage in pipeline.stages(space.experiment)} == {"sealed"}
    summary = json.loads((work / "report" / "summary.json").read_text())
    assert summary["models"]["s"]["teachers"] == {"a": "t"}


def test_stored_teacher_of_another_seed_or_corpus_is_refused_at_the_first_record(stored, selections, tmp_path):
    _, made = selections
    assert first_batch(opened(stored, made), "s")[0].taught == 8 * 31
    (stored.parent / "b.txt").write_text(TEXT.replace("square", "second power"))
    other = opened(stored, tmp_path, 'corpora.a.sources=[{"text": "b.txt"}]')
    pipeline.run(other, pipeline.Launch([], 1, None), "corpus")
    for space in (opened(stored, made, "seed=2"), other):
        with pytest.raises(UserError, match="t@a: sample 0: the teacher saw another input than the student"):
            first_batch(space, "s")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["models.s.inherit.targets.k=17"], r"'k': 16.*expected models.s.inherit.targets .*'k': 17"),
        (["models.s.inherit.targets.select=top_p", "models.s.inherit.targets.p=0.9"], r"expected .*'kind': 'top_p'"),
        (["models.s.inherit.targets.select=sampled", "models.s.inherit.targets.k=null"], r"expected .*'sampled'"),
        (["models.s.inherit.temperature=3"], r"at the temperatures 1, 2; expected 3"),
        (["models.s.inherit.teacher_steps=4"], r"holds 24 samples; expected the 32 that models.s reads of corpora.a"),
    ],
)
def test_stored_teacher_that_lacks_what_is_asked_is_refused_before_training(stored, selections, settings, words):
    _, work = selections
    with pytest.raises(UserError, match=words):
        targets_read(opened(stored, work, *settings), "s")


@pytest.mark.parametrize("name", ["t@a@sampled-20-t2", "t@a@top_p-0.3"])
def test_stored_folder_of_another_selection_is_not_read_as_top_k(stored, selections, name):
    _, work = selections
    with pytest.raises(UserError, match=r"expected models\.s\.inherit\.targets"):
        targets_read(opened(stored, work, f"models.t.targets.a=work/targets/{name}"), "s")


def preflight(space):
    pipeline.preflight(space, pipeline.stages(space.experiment), 1)


def test_missing_stored_folder_is_refused_before_anything_runs(stored, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: there is no manifest\.json: not a finished targets folder"):
        preflight(opened(stored, tmp_path, "models.t.targets.a=nowhere"))
    preflight(opened(stored, tmp_path))
