"""Architectures by name, and any Hugging Face language model as (backbone, head).

The head (the last linear layer) is taken out of the model, so that the loss can be computed from hidden states without
all logits, and only at the target positions. N rows, D hidden size, V vocabulary, B sequences, S tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.errors import UserError, nearest, reason
from ki_ds.kernels import PLAIN, KILoss, Logits, PackedTargets, ki_loss
from ki_ds.kernels.logits import head

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
            f"{place}.model_type: found {kind!r}; expected a model type of transformers such as gpt2, roberta, llama"
            + nearest(str(kind), CONFIG_MAPPING.keys())
        )
    try:
        first = {key: given[key] for key in ("is_decoder",) if key in given}
        check_objective(CONFIG_MAPPING[kind](**first), objective, place)
        config = CONFIG_MAPPING[kind](**_filled(given, CONFIG_MAPPING[kind](), tokenizer, length, place))
        check_objective(config, objective, place)
        _outline(config, objective)  # sizes that do not go together show only here
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


def check_objective(config: Any, objective: str, place: str) -> None:
    """Check that a kind of model can be trained with an objective.

    Raises:
        UserError: it cannot, or it would see the tokens that it must predict.
    """
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
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


def _auto(objective: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM


def new_model(config: Any, objective: str, seed: int) -> Any:
    """A Hugging Face model with initial weights that depend on the seed alone."""
    torch.manual_seed(seed)
    model = _auto(objective).from_config(config, dtype=torch.float32)
    if objective == "clm":
        check_causal(model, "architecture")
    return model


def pretrained_configuration(source: str | Path, place: str) -> Any:
    """The configuration of a model folder or name.

    Raises:
        UserError: there is no such model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source))
    except Exception as error:  # whatever the library raises: the input is at fault
        raise UserError(f"{place}: no model can be loaded from {source}: {reason(error)}") from None


@torch.no_grad()
def check_causal(model: Any, place: str) -> None:
    """Check that no prediction of a causal model depends on what comes after it.

    Raises:
        UserError: changing the last token changes an earlier prediction.
    """
    training = model.training
    model.eval()
    one = torch.arange(4)[None, :] % model.config.vocab_size
    two = one.clone()
    two[0, -1] = (two[0, -1] + 1) % model.config.vocab_size
    before, after = (model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (one, two))
    model.train(training)
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-4):
        raise UserError(f"{place}: a {type(model).__name__} sees the tokens that it is to predict; it is not causal")


def load_model(source: str | Path, objective: str, place: str, dropout: float = 0.0) -> Any:
    """A Hugging Face language model from a folder or name, in fp32, from safetensors only.

    Raises:
        UserError: it cannot be loaded, or lacks weights that its class needs.
    """
    config = pretrained_configuration(source, place)
    check_objective(config, objective, place)
    set_dropout(config, dropout)
    try:
        model, report = _auto(objective).from_pretrained(
            str(source), config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # as above
        raise UserError(f"{place}: no model can be loaded from {source}: {reason(error)}") from None
    if report["missing_keys"]:
        raise UserError(
            f"{place}: {source} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])} of a "
            f"{type(model).__name__}, which would be random; expected a model saved with its language-model head"
        )
    if objective == "clm":
        check_causal(model, place)
    return model


class Head(nn.Module):
    """The loss on the language-model head; it holds the (often tied) parameters, so that ZeRO-3 gathers them for it."""

    def __init__(self, linear: nn.Linear, vocabulary: int, logits: Logits = PLAIN):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.vocabulary = vocabulary  # rows beyond it are padding that no token belongs to
        self.logits = logits

    def parameters_VD(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias without padding rows."""
        return head(self.weight, self.bias, self.vocabulary)

    def forward(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        targets: PackedTargets | None,
        alpha_N: Tensor | None,
        temperature: float,
    ) -> KILoss:
        """The loss sums over the rows; its products in autocast's type, as those of the model's other layers."""
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        return ki_loss(
            hidden_ND.to(dtype), weight, bias, labels_N, targets, alpha_N, temperature,
            vocabulary=self.vocabulary, logits=self.logits,
        )  # fmt: skip


class LanguageModel(nn.Module):
    """A Hugging Face language model, taken apart into backbone and head."""

    def __init__(self, model: Any, vocabulary: int, place: str = "model"):
        """Take the head out of a model.

        Raises:
            UserError: the model's logits are not a linear map of hidden states, scaled and capped at most, or the head
                has too few rows.
        """
        super().__init__()
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{place}: {type(model).__name__} has no linear language-model head")
        if linear.weight.shape[0] < vocabulary:
            raise UserError(
                f"{place}: the head knows {linear.weight.shape[0]} tokens, the tokenizer has {vocabulary}; "
                "expected a model made for this tokenizer"
            )
        self._parent, self._name = _holder(model, linear)
        training = model.training
        self._catch = _Catch()
        logits = None
        try:
            logits = self._logits(model.eval(), linear)
        finally:
            model.train(training)
            if logits is None:
                setattr(self._parent[0], self._name, linear)
        if logits is None:
            raise UserError(
                f"{place}: {type(model).__name__} changes its logits after the head by more than a scale and a "
                "soft cap (a bias of its own, say), which is not supported"
            )
        self.backbone = model
        self.head = Head(linear, vocabulary, logits)
        self._linear = (linear,)  # a tuple hides it from the module tree: its parameters belong to the head

    @torch.no_grad()
    def _logits(self, model: Any, linear: nn.Linear) -> Logits | None:
        """What the model makes of its head's product, found by trial; None: something else. The head is taken out."""
        probe = torch.arange(2, device=linear.weight.device)[None, :]
        standin = _StandIn(linear.weight.shape[0])
        setattr(self._parent[0], self._name, standin)
        found = model(input_ids=probe, use_cache=False).logits
        if standin.given is None:
            return None
        product = standin.logits(standin.given)
        if not torch.equal(found, product):
            fitting = [form for form in _forms(model.config) if torch.allclose(found, form.of(product), rtol=1e-5)]
            setattr(self._parent[0], self._name, self._catch)
            return fitting[0] if fitting else None
        setattr(self._parent[0], self._name, nn.Identity())
        try:
            hidden = model(input_ids=probe, use_cache=False).logits
        except RuntimeError:  # sizes that do not fit: something as large as the vocabulary comes after the head
            return None
        return PLAIN if hidden.shape == standin.given.shape and torch.allclose(hidden, standin.given) else None

    def hidden(self, input_ids_BS: Tensor, rows: Tensor) -> Tensor:
        """[N, D]: what the head is applied to, at the given indices of the flattened [B · S]."""
        hidden_BSD = self.backbone(input_ids=input_ids_BS, use_cache=False).logits
        if self.head.logits != PLAIN:  # what the model scaled and capped is not the hidden states
            hidden_BSD, self._catch.given = self._catch.given, None
        return hidden_BSD.flatten(0, 1)[rows]

    def forward(
        self,
        input_ids_BS: Tensor,
        rows_N: Tensor,
        labels_N: Tensor,
        targets: PackedTargets | None = None,
        alpha_N: Tensor | None = None,
        temperature: float = 1.0,
    ) -> KILoss:
        """The loss sums over the target positions."""
        return self.head(self.hidden(input_ids_BS, rows_N), labels_N, targets, alpha_N, temperature)

    def whole(self) -> Any:
        """The Hugging Face model with its head back in place; this object must not be used afterwards."""
        (linear,) = self._linear
        linear.weight, linear.bias = self.head.weight, self.head.bias  # an engine may have put others in their place
        setattr(self._parent[0], self._name, linear)
        return self.backbone


class _Catch(nn.Module):
    """In a head's place: keeps the hidden states, and returns next to nothing for the model to scale and cap."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.given = hidden
        return hidden[..., :1]


def _forms(config: Any) -> list[Logits]:
    """What a model may make of its head's product, by the names that transformers' configurations have for it."""

    def numbers(*names: str) -> list[float]:
        found = (getattr(config, name, None) for name in names)
        return [float(x) for x in found if isinstance(x, (int, float)) and x > 0]

    scales = numbers("logit_scale", "logits_scaling", "lm_head_multiplier")
    caps = numbers("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return [Logits(scale, cap) for cap in (0.0, *caps) for scale in (1.0, *scales, *(1 / x for x in scales))]


class _StandIn(nn.Module):
    """Stands in for a head: keeps what it is given, and returns logits far apart, which soft-capping would change."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self.given: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., rows] from -100 to 100."""
        ramp = torch.linspace(-100, 100, self.rows, dtype=hidden.dtype, device=hidden.device)
        return ramp.expand(*hidden.shape[:-1], self.rows)

    def forward(self, hidden: Tensor) -> Tensor:
        self.given = hidden
        return self.logits(hidden)


def _holder(model: nn.Module, child: nn.Module) -> tuple[tuple[nn.Module], str]:
    """The module that holds a child, inside a tuple, and the child's name there."""
    path = next(name for name, module in model.named_modules() if module is child)
    parent, _, name = path.rpartition(".")
    return (model.get_submodule(parent),), name


def _outline(config: Any, objective: str) -> Any:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return _auto(objective).from_config(config)


def count_parameters(config: Any, objective: str) -> int:
    """Parameters, tied ones once, without allocating them."""
    return sum(p.numel() for p in _outline(config, objective).parameters())


def forward_flops(config: Any, objective: str, length: int, targets: float) -> float:
    """FLOPs of a forward pass over one sequence with so many target positions: the matrix products (2 a weight and
    token), attention scores and mixing (4 · S² · D a layer) and the head at the target positions."""
    model = _outline(config, objective)
    head = model.get_output_embeddings()
    weights = sum(
        module.weight.numel()
        for module in model.modules()
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    )
    attention = 4 * length**2 * config.hidden_size * config.num_hidden_layers
    return 2.0 * weights * length + attention + 2.0 * head.weight.numel() * targets
