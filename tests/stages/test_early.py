"""What is refused before anything runs: text that cannot be read, a machine that lacks what an engine JSON needs."""

import pytest
from helpers.commands import here
from helpers.experiments import written

from ki_ds.engine import ops


def said_of(tmp_path, *settings, command="plan", code=2):
    work = tmp_path / "work"
    said = here(command, tmp_path / "e.json", "--workdir", work, *(part for one in settings for part in ("--set", one)),
                code=code)  # fmt: skip
    assert code == 0 or not any(path.is_dir() for path in work.glob("[!.]*"))  # nothing ran
    return said


@pytest.mark.parametrize("command", ["plan", "run", "corpus"])
def test_the_first_document_of_every_source_is_read(tmp_path, command):
    written(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n\n")
    (tmp_path / "b.jsonl").write_text('{"body": "some words"}\n')
    (tmp_path / "c.jsonl.gz").write_bytes(b"not compressed")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 au lait".encode("latin-1"))
    said = said_of(
        tmp_path,
        'corpora.a.sources=[{"text": "a.txt"}, {"text": "empty.txt"}, {"jsonl": "b.jsonl"}, {"jsonl": "c.jsonl.gz"}]',
        'corpora.b={"sources": [{"text": "latin.txt"}, {"text": "nowhere.txt"}], "invalid_utf8": "refuse"}',
        command=command,
    )
    assert "sources.0" not in said.replace("corpora.b.sources.0", "")
    for words in (
        "corpora.a.sources.1: there is no text in it",
        f"corpora.a.sources.2: {tmp_path}/b.jsonl:1: there is no \"text\", only 'body'",
        f"corpora.a.sources.3: {tmp_path}/c.jsonl.gz: cannot be read",
        f"corpora.b.sources.0: {tmp_path}/latin.txt: byte 3: not UTF-8",
        "corpora.b.sources.1.text: no file matches nowhere.txt",
    ):
        assert words in said
    assert 'by corpora.b.invalid_utf8: "replace"' in said


def test_sources_of_a_finished_corpus_are_not_looked_at(tmp_path):
    written(tmp_path, models={"s": None})
    here("corpus", tmp_path / "e.json", "--workdir", tmp_path / "work")
    (tmp_path / "a.txt").unlink()
    said_of(tmp_path, code=0)


def test_sources_of_a_corpus_that_is_to_be_made_again_are_read(tmp_path):
    file, work = written(tmp_path, models={"s": None}), tmp_path / "work"
    here("corpus", file, "--workdir", work)
    (tmp_path / "a.txt").write_text("")
    said = here("run", file, "--workdir", work, "--redo", "--yes", code=2)
    assert "corpora.a.sources.0: there is no text in it" in said
    assert (work / "corpora" / "a" / "manifest.json").exists()


OFFLOAD = 'engine={"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_compiler_that_is_missing_is_told_before_anything_runs(tmp_path, monkeypatch, command):
    written(tmp_path, models={"s": None})
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = said_of(tmp_path, OFFLOAD, command=command)
    assert "zero_optimization.offload_optimizer: DeepSpeed's cpu_adam cannot be compiled" in said
    assert "there is no compiler no-such-compiler" in said and "needs g++" in said
    said_of(tmp_path, OFFLOAD, 'engine.zero_optimization={"offload_optimizer": null}', code=0)


def test_what_nvme_needs_is_told_before_anything_runs(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder.async_io import AsyncIOBuilder

    written(tmp_path, models={"s": None})
    monkeypatch.setattr(AsyncIOBuilder, "has_function", lambda *_, **__: False)
    swap = f'{{"device": "nvme", "nvme_path": "{tmp_path}/absent"}}'
    said = said_of(tmp_path, f'engine={{"zero_optimization": {{"stage": 3, "offload_optimizer": {swap}}}}}')
    assert f"zero_optimization.offload_optimizer.nvme_path: {tmp_path}/absent is not a folder" in said
    assert 'offload_optimizer: "nvme": DeepSpeed\'s async_io cannot be compiled' in said and "libaio-dev" in said


@pytest.mark.parametrize(
    "setting",
    ['{"optimizer": {"type": "ApexAdam"}, "zero_optimization": {"stage": 1}}', '{"ki_ds": {"layer_norm": "apex"}}'],
)
def test_apex_that_is_missing_is_told_before_anything_runs(tmp_path, setting):
    written(tmp_path, models={"s": None})
    assert "needs NVIDIA apex, which is not installed" in said_of(tmp_path, f"engine={setting}")


def test_the_machine_of_other_nodes_is_not_asked(tmp_path, monkeypatch):
    written(tmp_path, models={"s": None})
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    monkeypatch.setenv("CXX", "no-such-compiler")
    here(
        "plan", tmp_path / "e.json", "--workdir", tmp_path / "work", "--hostfile", tmp_path / "hosts", "--set", OFFLOAD
    )


def test_operators_that_came_compiled_need_no_compiler(monkeypatch):
    import deepspeed.git_version_info

    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(deepspeed.git_version_info.installed_ops, "cpu_adam", True)
    ops.check("CPUAdamBuilder", "zero_optimization.offload_optimizer")


@pytest.mark.parametrize("command", ["status", "plan", "run"])
def test_a_file_where_a_folder_is_to_be(tmp_path, command):
    file, work = written(tmp_path, models={"s": None}), tmp_path / "work"
    work.write_text("")
    assert f"--workdir {work}: {work} is a file" in here(command, file, "--workdir", work, code=2)
    assert f"{work} is a file" in here(command, file, "--workdir", work / "below", code=2)
    work.unlink()
    work.mkdir()
    (work / "corpora").write_text("")
    if command != "status":
        assert f"{work}/corpora: is a file, where corpus a is to" in here(command, file, "--workdir", work, code=2)


def test_a_timeout_without_end_is_refused(tmp_path):
    file = written(tmp_path, models={"s": None})
    assert "--timeout" in here("run", file, "--workdir", tmp_path / "work", "--timeout", "inf", code=2)


def test_a_zero_stage_is_a_number(tmp_path):
    written(tmp_path, models={"s": None})
    said = said_of(tmp_path, 'engine={"zero_optimization": {"stage": true}}')
    assert "zero_optimization.stage: found true; allowed: 0, 1, 2, 3" in said


def test_an_architecture_without_a_type_is_not_likened_to_one(tmp_path):
    written(tmp_path, models={"s": None})
    said = said_of(tmp_path, "models.t.architecture={}")
    assert "model_type: found None; expected" in said and "did you mean" not in said


def test_fewer_layers_than_none(tmp_path):
    """transformers makes a model without layers of them."""
    written(tmp_path, models={"s": None})
    said = said_of(tmp_path, 'models.t.architecture={"model_type": "gpt2", "n_layer": -2}')
    assert "models.t.architecture: found -2 layers" in said
