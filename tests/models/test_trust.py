"""Code that comes with a model: never run unasked, whoever answers transformers' question."""

import json

import pytest
import torch
from helpers.engines import settings
from helpers.models import LENGTH, VOCABULARY, batch, tiny_model

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Experiment, Model
from ki_ds.experiment.strict import parse
from ki_ds.models import flops, hugging_face
from ki_ds.models.language_model import LanguageModel
from ki_ds.stages import models
from ki_ds.stages.train import shaping

CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
Path({ran!r}).write_text("ran")

class OwnConfig(GPT2Config):
    model_type = {kind!r}

class Own(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Makes a folder of a GPT-2 with code of its own, for a model type; whether the code ran: `(folder, ran)`."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")  # as `yes |` does
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    hugging_face._tell.cache_clear()

    def make(kind, *files):
        folder, ran = tmp_path / f"stranger-{kind}", tmp_path / "ran"
        tiny_model("gpt2").save_pretrained(folder)
        (folder / "own.py").write_text(CODE.format(ran=str(ran), kind=kind))
        known = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": [None, "own.Own"]}
        for name in files:
            given = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            (folder / name).write_text(json.dumps({**given, "model_type": kind, "auto_map": known}))
        return folder, ran

    return make


def test_a_model_of_a_stranger_s_kind_is_refused_without_a_question(stranger):
    folder, ran = stranger("own-gpt", "config.json")
    for load in (hugging_face.pretrained_configuration, lambda *a: hugging_face.load_model(a[0], "clm", a[1])):
        with pytest.raises(UserError, match=r'models\.x: .*code of its own.*"trust_remote_code": true'):
            load(folder, "models.x")
    assert not ran.exists()


def test_a_known_kind_is_transformers_own_class_whatever_the_folder_brings(stranger):
    folder, ran = stranger("gpt2", "config.json")
    model = hugging_face.load_model(folder, "clm", "models.x")
    flops.count_parameters(model.config, "clm")
    assert type(model).__module__.startswith("transformers.models") and not ran.exists()


def test_a_tokenizer_s_code_never_runs(stranger):
    folder, ran = stranger("own-gpt", "config.json", "tokenizer_config.json")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        tokenizers.load(folder, "clm", "tokenizer.pretrained")
    assert not ran.exists()


def test_a_trusted_model_is_said_counted_trained_saved_and_loaded(stranger, tmp_path, capsys):
    folder, ran = stranger("own-gpt", "config.json")
    config = hugging_face.pretrained_configuration(folder, "models.x", trusted=True)
    assert f"models.x: runs the Python code that comes with {folder}" in capsys.readouterr().out
    assert flops.count_parameters(config, "clm") == flops.count_parameters(tiny_model("gpt2").config, "clm")
    model = hugging_face.load_model(folder, "clm", "models.x", trusted=True)
    assert type(model).__name__ == "Own" and ran.exists()
    ids, rows, labels = batch()
    taken = LanguageModel(model, VOCABULARY)
    taken(ids, rows, labels).loss.backward()
    taken.whole().save_pretrained(tmp_path / "exported")
    ran.unlink()
    with pytest.raises(UserError, match="code of its own"):
        hugging_face.load_model(tmp_path / "exported", "clm", "models.x")
    again = hugging_face.load_model(tmp_path / "exported", "clm", "models.x", trusted=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_the_word_is_given_for_one_model_and_its_descendants():
    train = {"on": {"a": 1.0}, "steps": 1, "batch_size": 1, "learning_rate": 1.0}
    data = {
        "name": "e", "objective": "clm", "tokenizer": {"pretrained": "x"}, "sequence_length": LENGTH,
        "corpora": {"a": {"sources": [{"text": "a.txt"}]}},
        "models": {
            "own": {"pretrained": "x", "trust_remote_code": True},
            "child": {"start_from": "own", "train": train},
            "other": {"pretrained": "y"},
        },
    }  # fmt: skip
    e = parse(Experiment, data, "e.json")
    assert [models.trusted(e, name) for name in e.models] == [True, True, False]
    del data["models"]["own"]["pretrained"]
    data["models"]["own"] |= {"architecture": "gpt-tiny", "train": train}
    with pytest.raises(UserError, match='"trust_remote_code" belongs to "pretrained"'):
        parse(Experiment, data, "e.json")


def test_trust_is_in_the_identity(stranger):
    plain = Model(pretrained="x", train=settings())
    trusted = plain.model_copy(update={"trust_remote_code": True})
    assert shaping(plain)["trust_remote_code"] is False
    assert shaping(trusted) == {**shaping(plain), "trust_remote_code": True}
    folder, _ = stranger("own-gpt", "config.json")
    before = [models.pretrained_digest(str(folder), trust) for trust in (False, True)]
    (folder / "own.py").write_text("# other code")
    models.pretrained_digest.cache_clear()
    after = [models.pretrained_digest(str(folder), trust) for trust in (False, True)]
    assert before[0] == after[0] and before[1] not in (before[0], after[1])
