"""Any Hugging Face model taken apart without a change to what it computes."""

import copy

import pytest
import torch
from helpers.models import KINDS, TINY, VOCABULARY, batch, kind_of, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from ki_ds.errors import UserError
from ki_ds.kernels import LogitTransform
from ki_ds.models import hugging_face, language_model
from ki_ds.models.language_model import LanguageModel


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_of_the_hugging_face_model(name):
    """In float64, against plain autograd through the model's own logits."""
    model = kind_of(name).double()
    plain = copy.deepcopy(model)
    ids, rows, labels = batch()
    logits = plain(input_ids=ids).logits.flatten(0, 1)[rows]
    expected_loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    expected_loss.backward()

    taken = LanguageModel(model, VOCABULARY)
    result = taken(ids, rows, labels)
    torch.testing.assert_close(result.loss, expected_loss)
    torch.testing.assert_close(result.ce, expected_loss.detach())
    result.loss.backward()
    whole = dict(taken.whole().named_parameters())
    wanted = dict(plain.named_parameters())
    assert whole.keys() == wanted.keys()
    for key, parameter in wanted.items():
        if parameter.grad is None:
            assert whole[key].grad is None or not whole[key].grad.any(), key
        else:
            torch.testing.assert_close(whole[key].grad, parameter.grad, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", KINDS)
def test_optimiser_sees_every_parameter_once(name):
    model = kind_of(name)
    before = {id(p) for p in model.parameters()}
    taken = LanguageModel(model, VOCABULARY)
    assert {id(p) for p in taken.parameters()} == before
    assert len(list(taken.parameters())) == len(before)


@pytest.mark.parametrize("name", KINDS)
def test_hidden_states_and_head_give_the_logits(name):
    model = kind_of(name).eval()
    ids, rows, _ = batch()
    with torch.no_grad():
        logits = model(input_ids=ids).logits.flatten(0, 1)[rows]
        taken = LanguageModel(model, VOCABULARY)
        weight, bias = taken.head.parameters_VD()
        torch.testing.assert_close(nn.functional.linear(taken.hidden(ids, rows), weight, bias), logits)


@pytest.mark.parametrize("name", KINDS)
def test_whole_model_is_as_before_and_survives_a_save(name, tmp_path):
    model = kind_of(name).eval()
    objective = TINY[name.rpartition(" ")[2]][0]
    ids, _, _ = batch()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        whole = LanguageModel(model, VOCABULARY).whole()
        assert whole is model
        assert torch.equal(whole(input_ids=ids).logits, before)
        whole.save_pretrained(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        assert "model.safetensors" in names
        assert not {x for x in names if x.endswith((".bin", ".pt", ".pkl"))}
        auto = AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM
        assert torch.equal(auto.from_pretrained(tmp_path).eval()(input_ids=ids).logits, before)
        assert torch.equal(hugging_face.load_model(tmp_path, objective, "x").eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", ["gpt2", "untied gpt2", "roberta", "llama"])
def test_whole_model_has_what_training_made_of_the_head(name):
    model = kind_of(name)
    taken = LanguageModel(model, VOCABULARY)
    ids, rows, labels = batch()
    optimiser = torch.optim.SGD(taken.parameters(), lr=0.1)
    before = taken.head.weight.detach().clone()
    taken(ids, rows, labels).loss.backward()
    optimiser.step()
    assert not torch.equal(taken.head.weight, before)
    with torch.no_grad():
        hidden = taken.hidden(ids, rows)
        logits = nn.functional.linear(hidden, *taken.head.parameters_VD())
        torch.testing.assert_close(taken.whole()(input_ids=ids).logits.flatten(0, 1)[rows], logits)


def test_head_s_parameters_that_were_replaced_come_back_whole():
    """An engine may put other Parameter objects into the module tree."""
    taken = LanguageModel(kind_of("llama"), VOCABULARY)
    taken.head.weight = nn.Parameter(taken.head.weight.detach() * 2)
    expected_weight = taken.head.weight
    assert taken.whole().lm_head.weight is expected_weight


@pytest.mark.parametrize("training", [True, False])
def test_taking_apart_keeps_the_mode(training):
    model = kind_of("roberta").train(training)
    taken = LanguageModel(model, VOCABULARY)
    assert taken.backbone.training == training
    assert all(module.training == training for module in model.modules())


def test_no_row():
    taken = LanguageModel(kind_of("gpt2"), VOCABULARY)
    ids, _, _ = batch()
    none = torch.zeros(0, dtype=torch.int64)
    result = taken(ids, none, none)
    assert result.loss.item() == 0
    result.loss.backward()  # the graph must live on a rank without targets
    assert all(p.grad is None or not p.grad.any() for p in taken.parameters())
    assert taken.head.weight.grad is not None


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
def test_padded_rows_get_no_probability_and_no_gradient(name):
    """A head of 64 rows for a tokenizer of 50: the softmax runs over the 50."""
    model = kind_of(name).double()
    with torch.no_grad():
        model.get_output_embeddings().weight[50:] += 100  # they would take all probability
    plain = copy.deepcopy(model)
    ids, rows, labels = batch(vocabulary=50)
    logits = plain(input_ids=ids).logits.flatten(0, 1)[rows][:, :50]
    wanted = nn.functional.cross_entropy(logits, labels, reduction="sum")
    wanted.backward()
    taken = LanguageModel(model, 50)
    result = taken(ids, rows, labels)
    torch.testing.assert_close(result.loss, wanted)
    result.loss.backward()
    gradient = taken.head.weight.grad
    assert gradient.shape[0] == VOCABULARY
    assert not gradient[50:].any()
    assert gradient[:50].any()
    torch.testing.assert_close(gradient, plain.get_output_embeddings().weight.grad)
    if taken.head.bias is not None:
        assert not taken.head.bias.grad[50:].any()


def test_head_that_is_too_small():
    with pytest.raises(UserError, match=r"models\.x: the head knows 64 tokens, the tokenizer has 65"):
        LanguageModel(kind_of("gpt2"), 65, "models.x")


CHANGED = {
    "gemma2": ({"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 5.0}, LogitTransform(cap=5.0)),
    "cohere": ({"num_key_value_heads": 1, "logit_scale": 0.5}, LogitTransform(0.5)),
    "granite": ({"num_key_value_heads": 1, "logits_scaling": 8.0}, LogitTransform(1 / 8)),
}


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 50])
@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_logits_that_are_scaled_or_capped_after_the_head(kind, vocabulary):
    """Loss and gradients are those of the model's own logits, and the model comes back whole."""
    more, form = CHANGED[kind]
    model = hugging_face.new_model(tiny_config(kind, "clm", **more), "clm", 0).double()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 100  # into the cap's reach
    plain = copy.deepcopy(model)
    ids, rows, labels = batch(vocabulary=vocabulary)
    before = plain(input_ids=ids).logits
    wanted = nn.functional.cross_entropy(before.flatten(0, 1)[rows][:, :vocabulary], labels, reduction="sum")
    wanted.backward()
    taken = LanguageModel(model, vocabulary)
    assert taken.head.logit_transform == form
    result = taken(ids, rows, labels)
    torch.testing.assert_close(result.loss, wanted, rtol=1e-6, atol=0)  # a model may cap in fp32
    result.loss.backward()
    whole = taken.whole()
    for (name, found), true in zip(whole.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, true.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert torch.equal(whole(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_a_change_after_the_head_is_found_in_half_precision(kind):
    more, form = CHANGED[kind]
    model = hugging_face.new_model(tiny_config(kind, "clm", **more), "clm", 0).to(torch.bfloat16)
    assert LanguageModel(model, VOCABULARY).head.logit_transform == form


def test_hidden_states_are_not_held_between_steps():
    more, _ = CHANGED["gemma2"]
    taken = LanguageModel(hugging_face.new_model(tiny_config("gemma2", "clm", **more), "clm", 0), VOCABULARY)
    assert taken.hidden(*batch()[:2]).shape == (13, 16)
    assert [name for name, x in vars(taken._catch).items() if isinstance(x, torch.Tensor)] == []


@pytest.mark.parametrize(
    ("kind", "more"), [("gemma2", {"final_logit_softcapping": 1e5}), ("granite", {"logits_scaling": 1.000001})]
)
def test_a_change_of_the_logits_that_is_hardly_one(kind, more):
    model = hugging_face.new_model(tiny_config(kind, "clm", **(CHANGED[kind][0] | more)), "clm", 0)
    ids, rows, labels = batch()
    wanted = nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1)[rows], labels, reduction="sum")
    torch.testing.assert_close(LanguageModel(model, VOCABULARY)(ids, rows, labels).loss, wanted)


def test_another_change_of_the_logits_after_the_head_is_refused(monkeypatch):
    more, _ = CHANGED["cohere"]
    model = hugging_face.new_model(tiny_config("cohere", "clm", **more), "clm", 0)
    ids, _, _ = batch()
    before = model(input_ids=ids).logits
    monkeypatch.setattr(model.config, "logit_scale", 0.25)  # while the model itself goes by 0.5
    with pytest.raises(UserError, match=r"models\.x: \w+ changes its logits after the head"):
        LanguageModel(model, VOCABULARY, "models.x")
    assert torch.equal(model(input_ids=ids).logits, before)  # left whole


def test_soft_capping_that_is_off_is_accepted():
    config = tiny_config("gemma2", "clm", num_key_value_heads=1, head_dim=8, final_logit_softcapping=None)
    LanguageModel(hugging_face.new_model(config, "clm", 0), VOCABULARY)


def test_bias_of_the_model_s_own_is_refused():
    config = AutoConfig.for_model(
        "bart", vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    )  # fmt: skip
    with pytest.raises(UserError, match="changes its logits"):
        LanguageModel(hugging_face.new_model(config, "mlm", 0), VOCABULARY)


def test_autocast_reaches_the_head(monkeypatch):
    """Its products run in autocast's type, its parameters and their gradients stay in theirs."""
    seen = []
    original = language_model.ki_loss

    def watched(hidden, *given, **more):
        seen.append(hidden)
        return original(hidden, *given, **more)

    monkeypatch.setattr(language_model, "ki_loss", watched)
    taken = LanguageModel(kind_of("untied gpt2"), VOCABULARY)
    plain = taken(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = taken(*batch())
    assert [x.dtype for x in seen] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(found.loss, plain.loss, rtol=2e-2, atol=0)
    found.loss.backward()
    assert taken.head.weight.grad.dtype == torch.float32 and taken.head.weight.grad.any()
