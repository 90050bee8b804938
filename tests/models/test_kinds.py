"""Current kinds of models, tiny ones: planned, trained a step, asked as a teacher, exported and read; or refused."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from helpers.models import LENGTH, SMALL, VOCABULARY, batch, tiny_config

import ki_ds
from ki_ds.errors import UserError
from ki_ds.kernels.select.eager import select_targets
from ki_ds.models import architectures, flops, hugging_face
from ki_ds.models.language_model import LanguageModel
from ki_ds.planning import memory
from ki_ds.planning.activations import Pass, kept
from ki_ds.targets.selection import Selection
from ki_ds.targets.spec import TargetSpec

WORKS = "works"
UNTRACED = "works; activations not estimated"
KV = {"num_key_value_heads": 1}
HEAD = {**KV, "head_dim": 8}
GPT = {"hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None, "intermediate_size": None,
       "n_embd": 16, "n_layer": 2, "n_head": 2}  # fmt: skip
MIXED = {**KV, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {**KV, "num_local_experts": 4, "num_experts_per_tok": 2}
PLAIN = {"intermediate_size": None}
STATES = {"num_attention_heads": None, "intermediate_size": None, "state_size": 4}
# (objective, kind): keys beside the small ones, and what it does or why it is refused
KINDS = {
    ("clm", "bloom"): ({**GPT, "n_embd": None, "hidden_size": 16}, WORKS),
    ("clm", "cohere2"): (KV, WORKS),
    ("clm", "deepseek_v3"): ({
        "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 24, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "first_k_dense_replace": 1,
    }, WORKS),
    ("clm", "falcon"): (PLAIN, WORKS),
    ("clm", "gemma"): (HEAD, WORKS),
    ("clm", "gemma2"): (HEAD, WORKS),
    ("clm", "gemma3_text"): (HEAD, WORKS),
    ("clm", "glm4"): (HEAD, WORKS),
    ("clm", "gpt2"): (GPT, WORKS),
    ("clm", "gpt_neox"): ({}, WORKS),
    ("clm", "gpt_oss"): ({**LOCAL, "head_dim": 8}, WORKS),
    ("clm", "gptj"): ({**GPT, "rotary_dim": 4}, WORKS),
    ("clm", "granite"): (KV, WORKS),
    ("clm", "jamba"): ({**KV, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
                       WORKS),
    ("clm", "lfm2"): (KV, WORKS),
    ("clm", "llama"): (KV, WORKS),
    ("clm", "llama4_text"): (KV, WORKS),
    ("clm", "mamba"): (STATES, WORKS),
    ("clm", "mamba2"): ({**STATES, "num_heads": 4, "head_dim": 8, "n_groups": 1}, WORKS),
    ("clm", "mistral"): (KV, WORKS),
    ("clm", "mixtral"): (LOCAL, WORKS),
    ("clm", "nemotron"): (KV, WORKS),
    ("clm", "olmo2"): (KV, WORKS),
    ("clm", "opt"): ({**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": 16}, WORKS),
    ("clm", "phi"): (KV, WORKS),
    ("clm", "phi3"): (KV, WORKS),
    ("clm", "qwen2"): (KV, WORKS),
    ("clm", "qwen3"): (HEAD, WORKS),
    ("clm", "qwen3_moe"): (MIXED, WORKS),
    ("clm", "qwen3_next"): ({
        **MIXED, "head_dim": 8, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }, WORKS),
    ("clm", "recurrent_gemma"): ({**KV, "num_hidden_layers": 3, "lru_width": 16}, WORKS),
    ("clm", "rwkv"): ({"num_attention_heads": None, "attention_hidden_size": 16}, WORKS),
    ("clm", "smollm3"): (KV, WORKS),
    ("clm", "stablelm"): (KV, WORKS),
    ("clm", "starcoder2"): (KV, WORKS),
    ("clm", "bert"): ({}, 'refused: would see the tokens that it must predict'),
    ("clm", "modernbert-decoder"): ({}, "refused: transformers cannot make such a modernbert-decoder model"),
    ("clm", "roberta"): ({"is_decoder": True}, "refused: counts positions from the padding id"),
    ("clm", "t5"): ({}, "refused: transformers has no t5 model for the objective"),
    ("mlm", "albert"): ({"embedding_size": 8}, WORKS),
    ("mlm", "bert"): ({}, WORKS),
    ("mlm", "convbert"): ({"embedding_size": 8, "head_ratio": 1}, WORKS),
    ("mlm", "deberta-v2"): ({}, WORKS),
    ("mlm", "distilbert"): ({**GPT, "n_embd": None, "n_layer": None, "n_head": None, "dim": 16, "n_layers": 2,
                             "n_heads": 2, "hidden_dim": 24}, WORKS),
    ("mlm", "electra"): ({"embedding_size": 8}, WORKS),
    ("mlm", "esm"): ({}, "refused: changes its logits after the head"),
    ("mlm", "eurobert"): ({}, WORKS),
    ("mlm", "longformer"): ({"attention_window": 4}, UNTRACED),
    ("mlm", "modernbert"): ({}, UNTRACED),
    ("mlm", "mpnet"): ({}, WORKS),
    ("mlm", "roberta"): ({}, WORKS),
    ("mlm", "xlm-roberta"): ({}, WORKS),
    ("mlm", "xmod"): ({}, "refused: cannot be run on input ids alone"),
}  # fmt: skip
DOCUMENTED = Path(ki_ds.__file__).parent.parent / "docs" / "models.md"


def config_of(objective, kind, more):
    given = {key: value for key, value in {**SMALL, **more}.items() if value is not None}
    return tiny_config(kind, objective, only=given)


def planned(config, objective):
    """Whether activations were traced; costs and memory are numbers in any case."""
    assert flops.count_parameters(config, objective) > 0 < flops.forward_flops(config, objective, LENGTH, 3.0)
    found = [
        kept(config, objective, Pass(n, LENGTH, torch.float32, None, gpu)) for n in (1, 2) for gpu in (True, False)
    ]
    taken, traced = memory.inference(config, objective, 2, LENGTH, False)
    assert taken > 0 and {one.traced for one in found} == {traced}
    assert all(one.everything > 0 for one in found) == traced
    return traced


def used(config, objective, folder):
    """One step of training, predictions kept as a teacher's are, and the same loss after an export."""
    model = LanguageModel(hugging_face.new_model(config, objective, 0), VOCABULARY)
    ids, rows, labels = batch()
    loss = model(ids, rows, labels).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    selection = Selection("top_k", 8)
    codec = TargetSpec(selection, (1.0, 2.0), 2e-4, 1).codec(VOCABULARY)
    with torch.no_grad():
        hidden = model.eval().hidden(ids, rows)
        select_targets(
            hidden, model.head.weight, model.head.bias, labels, selection, codec.quantum, codec.temperatures, None,
            vocabulary=VOCABULARY, logit_transform=model.head.logit_transform,
        )  # fmt: skip
        after = model(ids, rows, labels).loss
        model.whole().save_pretrained(folder)
        again = LanguageModel(hugging_face.load_model(folder, objective, "models.x").eval(), VOCABULARY)
        torch.testing.assert_close(again(ids, rows, labels).loss, after)
    assert torch.isfinite(after) and after != loss


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "kind"), KINDS)
def test_each_kind_works_or_says_why_not(objective, kind, tmp_path):
    more, outcome = KINDS[objective, kind]
    refusal = re.escape(outcome.removeprefix("refused: "))
    with contextlib.nullcontext() if outcome in (WORKS, UNTRACED) else pytest.raises(UserError, match=refusal):
        config = config_of(objective, kind, more)
        traced = planned(config, objective)
        architectures.set_dropout(config, 0.0)
        used(config, objective, tmp_path)
        assert traced == (outcome == WORKS)


def test_the_table_of_kinds_is_what_is_tested():
    rows = re.findall(r"^\| `(.+?)` \| `(clm|mlm)` \| (.+?) \|$", DOCUMENTED.read_text(), re.MULTILINE)
    assert {(objective, kind): said for kind, objective, said in rows} == {
        key: said for key, (_, said) in KINDS.items()
    }


@pytest.mark.parametrize(
    ("kind", "more"),
    [("mixtral", LOCAL), ("qwen3_moe", MIXED), ("gpt_oss", {**LOCAL, "head_dim": 8})],
)
def test_flops_of_experts_are_those_that_a_token_is_sent_to(kind, more):
    """By hand: two layers; attention of 16 x 16 q and o, 16 x 8 k and v; 2 of 4 experts of 3 · 16 · 24."""
    experts = 2 * 2 * 3 * 16 * 24
    attention = 2 * (2 * 16 * 16 + 2 * 16 * 8)
    found = flops.forward_flops(config_of("clm", kind, more), "clm", LENGTH, 3.0)
    assert found == 2 * LENGTH * (experts + attention) + 2 * 4 * LENGTH**2 * 16 + 2 * 3 * VOCABULARY * 16


@pytest.mark.parametrize(("objective", "kind"), [("clm", "mamba"), ("mlm", "modernbert"), ("mlm", "bert")])
def test_a_kind_that_once_ended_in_a_traceback_is_planned(objective, kind):
    more, outcome = KINDS[objective, kind]
    assert planned(config_of(objective, kind, more), objective) == (outcome == WORKS)
