"""Architectures of the paper's sizes, inline configurations, and models loaded from folders."""

import copy
import json

import pytest
import torch
from helpers.models import LENGTH, TINY, VOCABULARY, kind_of, tiny_config, tiny_model
from torch import nn

from ki_ds.corpus.tokenizer import expected
from ki_ds.errors import UserError
from ki_ds.models import architectures, flops, hugging_face

# ------------------------------------------------------------------------------------------------ architectures

PAPER = {
    "roberta-medium": 73.5e6, "roberta-base": 125e6, "roberta-base-plus": 211e6, "roberta-large": 355e6,
    "gpt-medium": 72.8e6, "gpt-base": 124e6, "gpt-base-plus": 209e6,
}  # fmt: skip
VARIANTS = {f"roberta-d{d}": (12, d) for d in (384, 480, 576, 672)} | {f"roberta-h{h}": (h, 768) for h in (4, 6, 8, 10)}


def named(architecture, vocabulary=None, length=512):
    objective = "clm" if architecture.startswith("gpt") else "mlm"
    vocabulary = vocabulary or (50_257 if objective == "clm" else 50_265)
    config = architectures.configuration(architecture, objective, expected(vocabulary, objective), length, "place")
    return config, objective


@pytest.mark.parametrize("architecture", PAPER)
def test_parameters_are_the_paper_s(architecture):
    assert flops.count_parameters(*named(architecture)) == pytest.approx(PAPER[architecture], rel=0.005)


@pytest.mark.parametrize("architecture", VARIANTS)
def test_parameters_of_the_narrow_and_the_shallow(architecture):
    """Counted by hand: embeddings, layers, head; the head's matrix is the embeddings'."""
    layers, d = VARIANTS[architecture]
    embeddings = (50_265 + 514 + 1) * d + 2 * d
    layer = 4 * (d * d + d) + (3072 * d + 3072) + (3072 * d + d) + 4 * d
    head = d * d + d + 2 * d + 50_265
    assert flops.count_parameters(*named(architecture)) == embeddings + layers * layer + head


def test_every_named_architecture_is_counted_here():
    assert set(architectures.ARCHITECTURES) == {*PAPER, *VARIANTS, "roberta-tiny", "gpt-tiny"}


def test_count_is_that_of_the_model_in_memory():
    for name in ("roberta-tiny", "gpt-tiny"):
        config, objective = named(name, 300, 32)
        model = hugging_face.new_model(config, objective, 0)
        assert flops.count_parameters(config, objective) == sum(p.numel() for p in model.parameters())


def test_forward_flops_by_hand():
    """D 32, feed-forward 64, two layers: per token 4 D² + 2 · 64 D weights a layer, RoBERTa's head D² more."""
    layers = 2 * (4 * 32**2 + 2 * 64 * 32)
    attention = 2 * (4 * 48**2 * 32)
    for name, dense in (("gpt-tiny", 0), ("roberta-tiny", 32**2)):
        found = flops.forward_flops(*named(name, 300, 48), 48, 7.2)
        assert found == pytest.approx(2 * 48 * (layers + dense) + attention + 2 * 300 * 32 * 7.2, rel=1e-12)


def test_full_length_fits_every_kind():
    """The last position of the longest sequence has an embedding; RoBERTa's begin behind the padding id."""
    for name in ("roberta-tiny", "gpt-tiny"):
        config, objective = named(name, 300, 20)
        ids = torch.full((1, 20), 7)
        model = hugging_face.new_model(config, objective, 0)
        assert torch.isfinite(model(input_ids=ids).logits).all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 21), 7))


@pytest.mark.parametrize(
    ("name", "hint"), [("roberta-bass", '"roberta-base"'), ("gpt_base", '"gpt-base"'), ("gpt-large", '"gpt-')]
)
def test_unknown_name_names_the_nearest(name, hint):
    with pytest.raises(UserError, match=rf"place: found \"{name}\".*did you mean {hint}"):
        architectures.configuration(name, "mlm", expected(300, "mlm"), 32, "place")


@pytest.mark.parametrize(("name", "objective"), [("roberta-base", "clm"), ("gpt-base", "mlm")])
def test_architecture_of_the_other_objective(name, objective):
    with pytest.raises(UserError, match=f'{name} is trained with .* this experiment has "{objective}"'):
        architectures.configuration(name, objective, expected(300, objective), 32, "place")


# ------------------------------------------------------------------------------------------------ inline


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model_type": "roberto"}, ["model_type", "'roberto'", '"roberta"']),
        ({}, ["model_type", "None"]),
        ({"model_type": ["gpt2"]}, ["model_type", "['gpt2']"]),
        ({"model_type": "gpt2", "n_layers": 2}, [".n_layers", "unknown key of a gpt2", '"n_layer"']),
        ({"model_type": "gpt2", "vocab_size": 99}, [".vocab_size", "99", "64"]),
        ({"model_type": "gpt2", "eos_token_id": 5}, [".eos_token_id", "5", "0"]),
        ({"model_type": "gpt2", "n_positions": 4}, ["max_position_embeddings", "4", "12"]),
        ({"model_type": "llama", "max_position_embeddings": 8}, ["max_position_embeddings", "8", "12"]),
        ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, ["gpt2 model", "divisible"]),
        ({"model_type": "gpt2", "n_embd": "big"}, ["gpt2 model", "n_embd"]),
        ({"model_type": "encoder-decoder"}, ["encoder-decoder"]),
    ],
)
def test_inline_mistakes_are_named(given, words):
    with pytest.raises(UserError) as error:
        architectures.configuration(given, "clm", expected(VOCABULARY, "clm"), LENGTH, "models.x.architecture")
    message = str(error.value)
    assert message.startswith("models.x.architecture")
    assert all(word in message for word in words), message


def test_numbers_that_the_experiment_owns_may_be_repeated():
    config = tiny_config("roberta", vocab_size=VOCABULARY, pad_token_id=1, max_position_embeddings=LENGTH + 2)
    assert (config.vocab_size, config.pad_token_id, config.max_position_embeddings) == (VOCABULARY, 1, LENGTH + 2)
    for key, value in (("pad_token_id", 0), ("max_position_embeddings", LENGTH), ("bos_token_id", 2)):
        with pytest.raises(UserError, match=key):
            tiny_config("roberta", **{key: value})


@pytest.mark.parametrize("kind", TINY)
def test_omitted_keys_are_filled_in(kind):
    config = tiny_config(kind)
    objective = TINY[kind][0]
    assert config.vocab_size == VOCABULARY
    assert config.max_position_embeddings == (LENGTH + 2 if kind == "roberta" else LENGTH)
    if objective == "mlm":
        assert config.pad_token_id == 1
    if kind in ("bert", "roberta"):
        assert (config.bos_token_id, config.eos_token_id) == (0, 2)
    if objective == "clm":
        assert config.pad_token_id is None
        assert config.eos_token_id == 0


def test_positions_that_are_given_stay():
    assert tiny_config("gpt2", n_positions=100).n_positions == 100
    assert tiny_config("gpt2", max_position_embeddings=100).n_positions == 100
    assert tiny_config("llama", max_position_embeddings=100).max_position_embeddings == 100


@pytest.mark.parametrize("kind", TINY)
def test_every_ordinary_token_s_embedding_learns(kind):
    """A library's default padding id is an ordinary token of our tokenizer; its embedding must not be frozen."""
    model = tiny_model(kind)
    padding = [module.padding_idx for module in model.modules() if isinstance(module, nn.Embedding)]
    allowed = {None, 1} if TINY[kind][0] == "mlm" else {None}
    assert set(padding) <= allowed


@pytest.mark.parametrize("kind", TINY)
def test_full_length_fits_inline_models(kind):
    model = tiny_model(kind)
    assert torch.isfinite(model(input_ids=torch.full((1, LENGTH), 7)).logits).all()


@pytest.mark.parametrize("kind", ["roberta", "bert", "electra"])
def test_encoder_as_causal_model_would_see_the_answer(kind):
    with pytest.raises(UserError, match=r'would see the tokens.*"is_decoder": true'):
        tiny_config(kind, "clm")
    if kind == "roberta":  # its positions begin behind a padding id, which a causal tokenizer of ours does not have
        with pytest.raises(UserError, match="the tokenizer has none; expected another architecture"):
            tiny_config(kind, "clm", is_decoder=True)
        return
    config = tiny_config(kind, "clm", is_decoder=True)
    model = hugging_face.new_model(config, "clm", 0).eval()
    ids = torch.full((2, LENGTH), 7)
    ids[1, -1] = 9
    logits = model(input_ids=ids).logits
    assert torch.equal(logits[0, :-1], logits[1, :-1])


@pytest.mark.parametrize(("kind", "objective"), [("gpt2", "mlm"), ("llama", "mlm"), ("distilbert", "clm")])
def test_inline_model_of_the_other_objective(kind, objective):
    with pytest.raises(UserError, match=f'no {kind} model for the objective "{objective}"'):
        tiny_config(kind, objective)


# ------------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("kind", [*TINY, "gpt_neo", "phi", "albert", "electra"])
def test_dropout_reaches_every_module(kind):
    """Every dropout of a model in training has the probability asked for; two passes agree only where it is 0."""
    if kind == "gpt_neo":
        more = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
        given = {"model_type": kind, **more}
        config = architectures.configuration(given, "clm", expected(VOCABULARY, "clm"), LENGTH, "place")
        objective = "clm"
    else:
        objective = TINY[kind][0] if kind in TINY else "clm" if kind == "phi" else "mlm"
        config = tiny_config(kind, objective)
    for dropout in (0.37, 0.0):
        architectures.set_dropout(config, dropout)
        model = hugging_face.new_model(config, objective, 0).train()
        found = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
        found += [
            value
            for module in model.modules()
            for name, value in vars(module).items()
            if "dropout" in name and isinstance(value, float)
        ]
        assert set(found) == {dropout}
        torch.manual_seed(1)
        one, two = (model(input_ids=torch.full((1, LENGTH), 7)).logits for _ in range(2))
        assert torch.equal(one, two) == (dropout == 0)


def test_dropout_leaves_everything_else_alone():
    config = tiny_config("gpt2")
    before = config.to_dict()
    architectures.set_dropout(config, 0.25)
    changed = {key for key, value in config.to_dict().items() if value != before[key]}
    assert changed == {"resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"}


def test_initial_weights_depend_on_the_seed_alone():
    config = tiny_config("roberta")
    torch.manual_seed(77)
    one = hugging_face.new_model(config, "mlm", 5).state_dict()
    torch.rand(100)
    two = hugging_face.new_model(copy.deepcopy(config), "mlm", 5).state_dict()
    other = hugging_face.new_model(config, "mlm", 6).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["lm_head.dense.weight"], other["lm_head.dense.weight"])
    assert {value.dtype for value in one.values() if value.is_floating_point()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    kind_of("llama").save_pretrained(folder)
    return folder


def refused(folder, objective="clm"):
    with pytest.raises(UserError) as error:
        hugging_face.load_model(folder, objective, "models.x.pretrained")
    message = str(error.value)
    assert message.startswith("models.x.pretrained: ")
    assert str(folder) in message
    return message


def test_missing_folder(tmp_path):
    refused(tmp_path / "absent")


def test_empty_folder(tmp_path):
    refused(tmp_path)


def test_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("no model")
    refused(tmp_path / "file")


def test_broken_config(saved):
    (saved / "config.json").write_text("{")
    refused(saved)


def test_weights_cut_short(saved):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(saved)


def test_weights_of_noise(saved):
    (saved / "model.safetensors").write_bytes(b"\xff" * 1000)
    refused(saved)


def test_weights_missing(saved):
    (saved / "model.safetensors").unlink()
    refused(saved)


def test_pickle_is_never_read(saved):
    """A pickle can run code: a folder that has nothing else is refused, and nothing in it runs."""
    (saved / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (open, (str(saved / "ran"), "w"))

    torch.save({"lm_head.weight": Bomb()}, saved / "pytorch_model.bin")
    refused(saved)
    assert not (saved / "ran").exists()


def test_model_saved_without_its_head(tmp_path):
    kind_of("llama").model.save_pretrained(tmp_path / "llama")
    message = refused(tmp_path / "llama")
    assert "lm_head.weight" in message and "language-model head" in message
    kind_of("roberta").roberta.save_pretrained(tmp_path / "roberta")
    assert "lm_head" in refused(tmp_path / "roberta", "mlm")


def test_weights_of_another_size(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    refused(saved)


def test_layer_missing_from_the_weights(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "lacks the weights model.layers.2" in refused(saved)


def test_folder_of_the_other_objective(saved, tmp_path):
    with pytest.raises(UserError, match='no llama model for the objective "mlm"'):
        hugging_face.load_model(saved, "mlm", "models.x.pretrained")
    kind_of("roberta").save_pretrained(tmp_path / "roberta")
    with pytest.raises(UserError, match="would see the tokens"):
        hugging_face.load_model(tmp_path / "roberta", "clm", "models.x.pretrained")


def test_half_precision_folder_is_loaded_in_full(saved):
    kind_of("llama").half().save_pretrained(saved)
    model = hugging_face.load_model(saved, "clm", "x", dropout=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.attention_dropout == 0.1
