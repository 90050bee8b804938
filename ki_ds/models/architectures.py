"""Architectures by name, and any Hugging Face configuration given inline."""

from __future__ import annotations

from typing import Any

from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.errors import UserError, nearest, reason
from ki_ds.models.flops import outline

# layers, hidden size, heads, feed-forward size (Qin et al. 2022, table 5)

# layers, hidden size, heads, feed-forward size (Qin et al. 2022, table 5)
SIZES = {
    "tiny": (2, 32, 2, 64),
    "medium": (9, 576, 12, 3072),
    "base": (12, 768, 12, 3072),
    "base-plus": (18, 864, 12, 3600),
    "large": (24, 1024, 16, 4096),
    **{f"d{d}": (12, d, 12, 3072) for d in (384, 480, 576, 672)},
    **{f"h{h}": (h, 768, 12, 3072) for h in (4, 6, 8, 10)},
}


GPT_SIZES = ("tiny", "medium", "base", "base-plus")


ARCHITECTURES = {f"roberta-{size}": ("mlm", *SIZES[size]) for size in SIZES} | {
    f"gpt-{size}": ("clm", *SIZES[size]) for size in GPT_SIZES
}


# positions begin behind the padding id
OFFSET_POSITIONS = (
    "roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text", "ibert",
    "longformer", "mpnet", "xmod",
)  # fmt: skip


def configuration(
    architecture: str | dict[str, Any], objective: str, tokenizer: TextTokenizer, length: int, place: str
) -> Any:
    """The Hugging Face configuration of an architecture; vocabulary, positions and special ids are filled in.

    Raises:
        UserError: an unknown name or key, another objective, or a number that the experiment gives with another value.
    """
    from transformers import GPT2Config, RobertaConfig

    if isinstance(architecture, dict):
        return _inline(architecture, objective, tokenizer, length, place)
    if architecture not in ARCHITECTURES:
        listed = ", ".join(ARCHITECTURES)
        raise UserError(f'{place}: found "{architecture}"; allowed: {listed}{nearest(architecture, ARCHITECTURES)}')
    needed, layers, hidden, heads, inner = ARCHITECTURES[architecture]
    if needed != objective:
        raise UserError(
            f'{place}: {architecture} is trained with the objective "{needed}", this experiment has "{objective}"'
        )
    if needed == "clm":
        return GPT2Config(
            vocab_size=tokenizer.size, n_positions=length, n_embd=hidden, n_layer=layers, n_head=heads, n_inner=inner,
            bos_token_id=tokenizer.separator, eos_token_id=tokenizer.separator,
        )  # fmt: skip
    pad = _pad(tokenizer, place)
    return RobertaConfig(
        vocab_size=tokenizer.size, max_position_embeddings=length + pad + 1, hidden_size=hidden,
        num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner, type_vocab_size=1,
        pad_token_id=pad, bos_token_id=tokenizer.begin, eos_token_id=tokenizer.separator,
    )  # fmt: skip


def _pad(tokenizer: TextTokenizer, place: str) -> int:
    pad = tokenizer.hugging_face.pad_token_id
    if pad is None:
        raise UserError(
            f"{place}: this architecture counts positions from the padding id, but the tokenizer has none; "
            "expected another architecture, or a tokenizer with a padding token"
        )
    return int(pad)


def _inline(given: dict[str, Any], objective: str, tokenizer: TextTokenizer, length: int, place: str) -> Any:
    from transformers import CONFIG_MAPPING

    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(
            f"{place}.model_type: found {kind!r}; expected a model type of transformers such as gpt2, "
            "roberta, llama" + (nearest(kind, CONFIG_MAPPING.keys()) if isinstance(kind, str) else "")
        )
    try:
        first = {key: given[key] for key in ("is_decoder",) if key in given}
        check_objective(CONFIG_MAPPING[kind](**first), objective, place)
        config = CONFIG_MAPPING[kind](**_filled(given, CONFIG_MAPPING[kind](), tokenizer, length, place))
        check_objective(config, objective, place)
        if (getattr(config, "num_hidden_layers", None) or 0) < 0:
            raise UserError(f"{place}: found {config.num_hidden_layers} layers; expected none or more")
        outline(config, objective)  # sizes that do not go together show only here
    except UserError:
        raise
    except Exception as error:  # whatever the library raises: the input is at fault
        raise UserError(f"{place}: transformers cannot make such a {kind} model: {reason(error)}") from None
    known = getattr(config, "max_position_embeddings", None)
    if isinstance(known, int) and 0 <= known < length:  # negative: without a limit
        raise UserError(
            f"{place}.max_position_embeddings: found {known}, but sequence_length is {length}; leave the key out"
        )
    return config


def _filled(given: dict[str, Any], default: Any, tokenizer: TextTokenizer, length: int, place: str) -> dict[str, Any]:
    """The given keys and those that the experiment owns: it gives the vocabulary, its length bounds the positions."""
    kind, allowed = default.model_type, set(default.to_dict()) | set(default.attribute_map)
    begin, pad = tokenizer.begin, tokenizer.hugging_face.pad_token_id
    owned = {
        "vocab_size": tokenizer.size,
        "bos_token_id": tokenizer.separator if begin is None else begin,
        "eos_token_id": tokenizer.separator,
        "pad_token_id": None if pad == tokenizer.separator else pad,  # the embedding of the padding id never learns
    }
    positions = default.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if kind in OFFSET_POSITIONS:
        pad = _pad(tokenizer, place)
        owned |= {"pad_token_id": pad, "max_position_embeddings": length + pad + 1}
    filled = {key: value for key, value in owned.items() if key in allowed}
    if positions in allowed and not given.keys() & {positions, "max_position_embeddings"}:
        filled.setdefault(positions, length)
    for key, value in given.items():
        if key not in allowed:
            raise UserError(f"{place}.{key}: unknown key of a {kind} configuration{nearest(key, allowed)}")
        if key in owned and value != owned[key]:
            raise UserError(f"{place}.{key}: found {value}, but this experiment makes it {owned[key]}; leave it out")
    return {**given, **filled}


def positions(config: Any) -> int | None:
    """How many tokens a model can see at once; None: there is no limit."""
    known = getattr(config, "max_position_embeddings", None)
    if not isinstance(known, int) or known < 0:
        return None
    return known - (config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0)


def check_objective(config: Any, objective: str, place: str) -> None:
    """Check that a kind of model can be trained with an objective.

    Raises:
        UserError: it cannot, or it would see the tokens that it must predict.
    """
    from transformers.models.auto import modeling_auto

    kind, own = config.model_type, getattr(config, "auto_map", {})  # own: classes that come with a trusted model
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or "AutoModelForMaskedLM" in own
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own
    if not (masked if objective == "mlm" else causal):
        raise UserError(f'{place}: transformers has no {kind} model for the objective "{objective}"')
    if objective == "clm" and masked and not getattr(config, "is_decoder", getattr(config, "causal", True)):
        raise UserError(
            f'{place}: this {kind} model would see the tokens that it must predict; for the objective "clm" its '
            'configuration needs "is_decoder": true'
        )


def set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout probability that the configuration has."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float):
            setattr(config, name, dropout)
