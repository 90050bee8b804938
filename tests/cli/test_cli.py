"""The command line under bad input: exit code 2, a message with place and remedy, no traceback, nothing half-made."""

import gzip
import json
import os
import shutil
import subprocess

import pytest
from helpers.commands import here, ki_ds, no_rank, write
from helpers.folders import forge

from ki_ds.cli import run
from ki_ds.cli.main import main
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.errors import UserError
from ki_ds.experiment.graph import load_experiment, trained_models
from ki_ds.sealed import check_identity, prepare, read_manifest
from ki_ds.stages import Train, student_data
from ki_ds.workspace import Workspace

TRAIN = {"on": {"a": 1.0}, "steps": 4, "batch_size": 4, "learning_rate": 1e-3, "dropout": 0.0}
TEXT = "\n\n".join(
    f"Document {n} says that {n * n} is the square of {n}, and then some more words follow." for n in range(900)
)


def experiment(text="a.txt", **changes):
    return {
        "name": "bad",
        "objective": "clm",
        "sequence_length": 32,
        "tokenizer": {"train": {"vocabulary_size": 300, "on": ["a"]}},
        "corpora": {"a": {"sources": [{"text": text}], "validation": 0.1}},
        "models": {
            "t": {"architecture": "gpt-tiny", "train": TRAIN},
            "s": {
                "architecture": "gpt-tiny",
                "train": TRAIN,
                "inherit": {"from": {"a": "t"}, "alpha_T": 1.0, "targets": {"k": 8}},
            },
        },
        "samples_per_shard": 8,
        **changes,
    }  # fmt: skip


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs ki-ds in this process on an experiment; what it says on stderr, after checking that it exits with 2."""

    def run(given, *arguments, command="run"):
        (tmp_path / "a.txt").exists() or (tmp_path / "a.txt").write_text(TEXT)
        file = write(tmp_path / "e.json", given)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([command, str(file), "--workdir", str(tmp_path / "work"), *map(str, arguments)])
        said = capsys.readouterr().err
        assert ended.value.code == 2, said
        assert "Traceback" not in said
        assert all(line.startswith("error: ") for line in said.splitlines())
        return said

    return run


def sealed(folder):
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("manifest.json"))


@pytest.mark.parametrize("name", ["run", "plan", "status"])
def test_missing_experiment(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "absent.json"])
    assert ended.value.code == 2
    assert "absent.json: no such file" in capsys.readouterr().err


def test_every_problem_is_named_before_anything_runs(refused, tmp_path):
    given = experiment()
    given["engine"] = {"train_batch_size": 8}
    given["models"]["s"]["architecture"] = "gpt-tinny"
    given["corpora"]["b"] = {"sources": [{"text": "nothing*.txt"}]}
    said = refused(given, "--processes", 3)
    assert "engine: train_batch_size: the experiment owns this number" in said
    assert 'models.s.architecture: found "gpt-tinny"' in said
    assert 'did you mean "gpt-tiny"' in said
    assert "corpora.b.sources.0" in said
    assert "nothing*.txt" in said
    assert "models.t.train.batch_size: 4 cannot be divided among 3 processes" in said
    assert not (tmp_path / "work").exists()


def test_empty_corpus(refused, tmp_path):
    (tmp_path / "a.txt").write_text("\n \n\n")
    assert "corpora.a.sources.0: there is no text in it" in refused(experiment())
    assert sealed(tmp_path / "work") == []


def test_corpus_too_small_for_a_sequence(refused, tmp_path):
    (tmp_path / "a.txt").write_text("One short document.")
    said = refused(experiment())
    assert "corpora.a: 1 documents, 19 characters, give no" in said
    assert "smaller sequence_length" in said
    assert sealed(tmp_path / "work") == ["tokenizer"]
    (tmp_path / "a.txt").write_text(TEXT)  # put right, the same command continues
    said = refused(experiment())
    assert "tokenizer: made from another experiment, corpus or configuration" in said
    assert "config.text: found" in said
    shutil.rmtree(tmp_path / "work")
    main_ok(["corpus", str(tmp_path / "e.json"), "--workdir", str(tmp_path / "work")])
    assert sealed(tmp_path / "work") == ["corpora/a", "tokenizer"]


def main_ok(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code


def test_invalid_utf8_refused_or_counted(refused, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode() + b"\n\nbroken \xff\xfe bytes\n")
    given = experiment()
    given["corpora"]["a"]["invalid_utf8"] = "refuse"
    said = refused(given)
    assert "a.txt" in said
    assert 'invalid_utf8: "replace"' in said or "corpora.a.invalid_utf8" in said
    given["corpora"]["a"]["invalid_utf8"] = "replace"
    shutil.rmtree(tmp_path / "work", ignore_errors=True)
    main_ok(["corpus", str(write(tmp_path / "e.json", given)), "--workdir", str(tmp_path / "work")])
    facts = json.loads((tmp_path / "work" / "corpora" / "a" / "manifest.json").read_text())["facts"]
    assert facts["invalid_utf8"] == 1


def test_truncated_archive(refused, tmp_path):
    whole = gzip.compress(TEXT.encode())
    (tmp_path / "b.txt.gz").write_bytes(whole[: len(whole) // 2])
    said = refused(experiment("b.txt.gz"))
    assert "b.txt.gz: cannot be read" in said
    assert "fetch it again" in said


def test_one_document_longer_than_any_chunk(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 700_000 + "\n\n" + TEXT)
    file = write(tmp_path / "e.json", experiment())
    main_ok(["corpus", str(file), "--workdir", str(tmp_path / "work")])
    facts = json.loads((tmp_path / "work" / "corpora" / "a" / "manifest.json").read_text())["facts"]
    assert facts["characters"] > 3_500_000


def test_folder_of_another_experiment(refused, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    main_ok(["corpus", str(write(tmp_path / "e.json", experiment())), "--workdir", str(tmp_path / "work")])
    said = refused(experiment(sequence_length=64))
    assert "corpora/a: made from another experiment" in said
    assert "sequence_length: found 32, expected 64" in said
    assert "--workdir" in said


def test_more_steps_of_a_trained_model_say_why_not_and_what_to_do(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    file = write(tmp_path / "e.json", experiment())
    main_ok(["corpus", str(file), "--workdir", str(tmp_path / "work")])

    def identity(*settings):
        return Train("t").identity(Workspace(load_experiment(file, None, settings), file, tmp_path / "work"))

    prepare(tmp_path / "t", identity())
    with pytest.raises(UserError, match=r'steps: found 4, expected 8\. .* The learning rate .* "start_from": "t"'):
        check_identity(tmp_path / "t", identity("models.t.train.steps=8"))
    with pytest.raises(UserError, match=r"dropout: found 0\.0, expected 0\.5\. Choose .* remove the folder \S+\.$"):
        check_identity(tmp_path / "t", identity("models.t.train.dropout=0.5"))


def test_half_written_folder_is_continued(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    arguments = ["corpus", str(write(tmp_path / "e.json", experiment())), "--workdir", str(tmp_path / "work")]
    main_ok(arguments)
    folder = tmp_path / "work" / "corpora" / "a"
    whole = (folder / "train.bin").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    record = {key: manifest[key] for key in ("stage", "schema", "config", "inputs")}
    (folder / "unsealed.json").write_text(json.dumps(record))
    (folder / "manifest.json").unlink()
    (folder / "train.bin").write_bytes(whole[:100])
    main_ok(arguments)
    assert (folder / "train.bin").read_bytes() == whole


def test_folder_that_is_not_ours(refused, tmp_path):
    (tmp_path / "work" / "tokenizer").mkdir(parents=True)
    (tmp_path / "work" / "tokenizer" / "thesis.tex").write_text("precious")
    assert "holds files but no manifest" in refused(experiment())
    assert (tmp_path / "work" / "tokenizer" / "thesis.tex").read_text() == "precious"


def test_stage_whose_input_is_missing(refused):
    said = refused(experiment(), command="train")
    assert "is not finished" in said
    assert "ki-ds run" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root only")
@pytest.mark.root
@pytest.mark.slow
def test_full_disk_is_named_and_continued(refused, tmp_path):
    small = tmp_path / "work"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this machine does not permit mounting")
    try:
        (tmp_path / "a.txt").write_text("\n\n".join(f"{n} " + "entropy of noise " * 20 for n in range(30000)))
        said = refused(experiment(), command="corpus")
        assert "No space left on device" in said
        assert "run the same command again: it continues" in said
        assert "corpora/a" not in sealed(small)
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        main_ok(["corpus", str(tmp_path / "e.json"), "--workdir", str(small)])
        assert "corpora/a" in sealed(small)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_missing_teacher(refused):
    given = experiment()
    given["models"]["s"]["inherit"]["from"]["a"] = "tt"
    assert 'models.s.inherit.from.a: there is no model "tt"; the file has t, s' in refused(given)


@pytest.fixture(scope="module")
def given_model(tmp_path_factory):
    """A Hugging Face model folder with a tokenizer, and one whose head has rows that no token belongs to."""
    from ki_ds.corpus import tokenizer as tokenizers
    from ki_ds.models import architectures, hugging_face

    root = tmp_path_factory.mktemp("given")
    tokenizer = tokenizers.describe(tokenizers.train([TEXT], 300, "clm"), "clm", "t")
    for name, size in (("model", tokenizer.size), ("padded", tokenizer.size + 84)):
        config = architectures.configuration("gpt-tiny", "clm", tokenizers.expected(size, "clm"), 32, "m")
        hugging_face.new_model(config, "clm", 1).save_pretrained(root / name)
        tokenizer.hugging_face.save_pretrained(root / name)
    other = tokenizers.train(["completely different words " * 50 + TEXT[:3000]], 290, "clm")
    shutil.copytree(root / "model", root / "other")
    other.save_pretrained(root / "other")
    return root


def test_teacher_of_another_tokenizer(refused, given_model):
    given = experiment(tokenizer={"pretrained": str(given_model / "model")})
    given["models"]["t"] = {"pretrained": str(given_model / "other")}
    said = refused(given)
    assert "models.t.pretrained" in said
    assert "another tokenizer" in said


def test_teacher_with_a_larger_vocabulary(refused, given_model, tmp_path):
    given = experiment(tokenizer={"pretrained": str(given_model / "padded")})
    given["models"]["t"] = {"pretrained": str(given_model / "padded")}
    said = refused(given)
    assert "models.t: its vocabulary has 384 ids, the tokenizer 300" in said
    assert '"padded_vocabulary": true' in said


def test_teacher_of_too_few_samples(refused, given_model):
    given = experiment(tokenizer={"pretrained": str(given_model / "model")}, sequence_length=64)
    given["models"]["t"] = {"pretrained": str(given_model / "model")}
    assert "models.t: it knows 32 positions, sequence_length is 64" in refused(given)


def test_pretrained_teacher_beside_a_trained_tokenizer(refused, given_model):
    given = experiment()
    given["models"]["t"] = {"pretrained": str(given_model / "model")}
    assert "this experiment trains a tokenizer of its own" in refused(given)


def test_k_larger_than_the_vocabulary(refused, given_model):
    given = experiment(tokenizer={"pretrained": str(given_model / "model")})
    given["models"]["s"]["inherit"]["targets"]["k"] = 301
    assert "models.s.inherit.targets.k: found 301; expected at most the vocabulary size, 300" in refused(given)


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(600)
def test_given_teacher_and_damaged_or_foreign_targets(given_model, tmp_path, capsys):
    """A given (padded) teacher teaches; then each kind of damage stops the student with a name and a remedy."""
    (tmp_path / "a.txt").write_text(TEXT)
    given = experiment(tokenizer={"pretrained": str(given_model / "padded")})
    given["models"]["t"] = {"pretrained": str(given_model / "padded"), "padded_vocabulary": True}
    file, work = write(tmp_path / "e.json", given), tmp_path / "work"
    main_ok(["corpus", str(file), "--workdir", str(work)])
    ki_ds("teach", file, "--workdir", work)
    folder = work / "targets" / "t@a"
    shard = sorted(folder.glob("*.kit"))[0]
    good = shard.read_bytes()

    def student(code):
        return ki_ds("worker", "train", file, "--workdir", work, code=code)

    middle = len(good) // 2
    shard.write_bytes(good[:middle] + bytes([good[middle] ^ 8]) + good[middle + 1 :])
    said = ki_ds("train", file, "--workdir", work, "--processes", 2, code=2)
    assert shard.name in said
    assert "`ki-ds targets repair` on its folder sets it aside; then `ki-ds teach`" in said
    assert "Traceback" not in said  # nor from the other rank, which loses its peer
    shard.write_bytes(good[:-10])
    assert "bytes, but the manifest says" in student(2)
    shard.unlink()
    assert "is missing" in student(2)
    capsys.readouterr()
    main_ok(["status", str(file), "--workdir", str(work)])
    assert "begun                          teach t@a" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["train", str(file), "--workdir", str(work)])
    assert ended.value.code == 2 and "is not finished" in capsys.readouterr().err
    ki_ds("worker", "teach", file, "--workdir", work)  # just that shard is computed anew
    assert shard.read_bytes() == good
    # targets of another seed, put in this one's place: first their headers differ from what the manifest says, then
    # the manifest is made to agree in everything, and says so
    main_ok(["corpus", str(file), "--workdir", str(tmp_path / "other"), "--set", "seed=2"])
    ki_ds("worker", "teach", file, "--workdir", tmp_path / "other", "--set", "seed=2")
    for one in (tmp_path / "other" / "targets" / "t@a").glob("*.kit"):
        shutil.copy(one, folder / one.name)
    forge(folder, files={path.name: path.stat().st_size for path in folder.glob("*.kit")})
    space = Workspace(load_experiment(file), file, work)
    loader = student_data.loader(space, trained_models(space.experiment)["s"], BatchLayout(4, 4, 0, 1))
    with pytest.raises(UserError, match="its header gives stream"):
        loader.load(0, 1.0)
    forge(folder, facts=read_manifest(tmp_path / "other" / "targets" / "t@a")["facts"])
    said = student(2)
    assert "its teacher saw another order or view of corpora.a: stream.seed: found 2, expected 1" in said
    assert not (work / "models" / "s" / "manifest.json").exists()


def test_wrong_options_exit_with_two(tmp_path, capsys):
    for arguments in (
        ["run"],
        ["nonsense"],
        ["run", "x.json", "--processes", "0"],
        ["run", "x.json", "--only", "tech"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert 'found "tech"; allowed: corpus, teach' in capsys.readouterr().err


def test_host_files(tmp_path, refused):
    (tmp_path / "hosts").write_bytes(b"\xff\xfe")
    assert "hosts: cannot be read" in refused(experiment(), "--hostfile", tmp_path / "hosts")
    (tmp_path / "hosts").write_text("node1 slots=4\nnode2 slots=four\n")
    said = refused(experiment(), "--hostfile", tmp_path / "hosts")
    assert "hosts:2: found 'node2 slots=four'; expected `hostname slots=N`" in said


def test_schema_doctor_and_version(capsys):
    for command, expected in (
        (["schema"], '"inherit"'),
        (["doctor"], "deepspeed accelerator"),
        (["--version"], "ki-ds 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert not ended.value.code
        said = capsys.readouterr().out
        assert expected in said
        if command == ["schema"]:
            assert json.loads(said)["properties"]["models"]


def test_demo_says_what_is_wrong_before_it_writes_its_text(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file: cannot be made: File exists" in here("demo", "--workdir", tmp_path / "file", code=2)
    said = here("demo", "--workdir", tmp_path / "new", "--set", "models.student.train.stepz=1", code=2)
    assert "stepz: unknown key" in said and not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["run", "train"])
@pytest.mark.parametrize("option", [[], ["--trust-checkpoints"]])
def test_trust_in_checkpoints_reaches_the_ranks_and_the_engine(command, option, tmp_path, monkeypatch):
    given, seen = write(tmp_path / "e.json", experiment()), []
    no_rank(monkeypatch)
    monkeypatch.setattr(run, "run", lambda _space, launch, *_: seen.append(launch.arguments) or [])
    monkeypatch.setattr(run, "_work", lambda space, *_: seen.append(space.trust_checkpoints))
    monkeypatch.setattr(run.heartbeat, "start", lambda *_, **__: None)
    monkeypatch.setattr(run.heartbeat, "end", lambda *_: None)
    with pytest.raises(SystemExit):
        main([command, str(given), "--workdir", str(tmp_path / "w"), *option])
    with pytest.raises(SystemExit):
        main(["worker", "train", *seen.pop()])
    assert seen == [bool(option)]
