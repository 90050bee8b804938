"""Any Hugging Face language model as (backbone, head).

The head (the last linear layer) is taken out of the model, so that the loss can be computed from hidden states without
all logits, and only at the rows. N rows, D hidden size, V vocabulary, B sequences, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ki_ds.errors import UserError
from ki_ds.kernels import IDENTITY, KILoss, LogitTransform, PackedTargets, ki_loss
from ki_ds.kernels.logit_transform import head
from ki_ds.models.partitioned import gathered, logits, shape


class Head(nn.Module):
    """The loss on the language-model head; it holds the (often tied) parameters, so that ZeRO-3 gathers them for it."""

    def __init__(self, linear: nn.Linear, vocabulary: int, logit_transform: LogitTransform = IDENTITY):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.vocabulary = vocabulary  # rows beyond it are padding that no token belongs to
        self.logit_transform = logit_transform

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
            vocabulary=self.vocabulary, logit_transform=self.logit_transform,
        )  # fmt: skip


class LanguageModel(nn.Module):
    """A Hugging Face language model, taken apart into backbone and head."""

    def __init__(self, model: Any, vocabulary: int, place: str = "model"):
        """Take the head out of a model.

        Raises:
            UserError: the model's logits are not a linear map of hidden states, scaled and capped at most, the head
                has too few rows, or the model needs more than input ids.
        """
        super().__init__()
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{place}: {type(model).__name__} has no linear language-model head")
        if shape(linear.weight)[0] < vocabulary:
            raise UserError(
                f"{place}: the head knows {shape(linear.weight)[0]} tokens, the tokenizer has {vocabulary}; "
                "expected a model made for this tokenizer"
            )
        self._parent, self._name, self._place = *holder(model, linear), place
        training = model.training
        self._catch = Catch(linear)
        logit_transform = None
        try:
            with gathered(model):
                logit_transform = self._logit_transform(model.eval(), linear)
        finally:
            model.train(training)
            if logit_transform is None:
                setattr(self._parent[0], self._name, linear)
        if logit_transform is None:
            raise UserError(
                f"{place}: {type(model).__name__} changes its logits after the head by more than a scale and a "
                "soft cap (a bias of its own, say), which is not supported"
            )
        self.backbone = model
        self.head = Head(linear, vocabulary, logit_transform)
        self._linear = (linear,)  # a tuple hides it from the module tree: its parameters belong to the head

    @torch.no_grad()
    def _logit_transform(self, model: Any, linear: nn.Linear) -> LogitTransform | None:
        """What the model makes of its head's product, found by trial; None: something else. The head is taken out."""
        probe = torch.arange(2, device=linear.weight.device)[None, :]
        standin = _StandIn(linear)
        setattr(self._parent[0], self._name, standin)
        found = logits(model, probe, self._place)
        if standin.given is None:
            return None
        product = standin.logits(standin.given)
        if not torch.equal(found, product):
            rtol = max(1e-5, 4 * torch.finfo(found.dtype).eps)
            fitting = [x for x in _logit_transforms(model.config) if torch.allclose(found, x.of(product), rtol=rtol)]
            setattr(self._parent[0], self._name, self._catch)
            return fitting[0] if fitting else None
        setattr(self._parent[0], self._name, _Through(linear))
        try:
            hidden = model(input_ids=probe, use_cache=False).logits
        except RuntimeError:  # sizes that do not fit: something as large as the vocabulary comes after the head
            return None
        return IDENTITY if hidden.shape == standin.given.shape and torch.allclose(hidden, standin.given) else None

    def hidden(self, input_ids_BS: Tensor, rows: Tensor) -> Tensor:
        """[N, D]: what the head is applied to, at the given indices of the flattened [B · S]."""
        hidden_BSD = self.backbone(input_ids=input_ids_BS, use_cache=False).logits
        if getattr(self._parent[0], self._name) is self._catch:  # what the model made of them is not the hidden states
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
        """The loss sums over the rows."""
        return self.head(self.hidden(input_ids_BS, rows_N), labels_N, targets, alpha_N, temperature)

    def whole(self) -> Any:
        """The Hugging Face model with its head back in place; this object must not be used afterwards."""
        (linear,) = self._linear
        linear.weight, linear.bias = self.head.weight, self.head.bias  # an engine may have put others in their place
        setattr(self._parent[0], self._name, linear)
        return self.backbone


class _InPlace(nn.Module):
    """Stands in a head's place, with what models read of a head beside calling it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._linear = (linear,)  # hidden from the module tree
        self.given: Any = None

    @property
    def weight(self) -> Tensor:
        return self._linear[0].weight

    @property
    def bias(self) -> Tensor | None:
        return self._linear[0].bias


class Catch(_InPlace):
    """Keeps the hidden states, and returns next to nothing for the model to scale and cap."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.given = hidden
        return hidden[..., :1]


class _Through(_InPlace):
    """Returns the hidden states."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _StandIn(_InPlace):
    """Keeps what it is given, and returns logits far apart, which soft-capping would change."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., rows] from -100 to 100."""
        rows = shape(self.weight)[0]
        return torch.linspace(-100, 100, rows, dtype=hidden.dtype, device=hidden.device).expand(
            *hidden.shape[:-1], rows
        )

    def forward(self, hidden: Tensor) -> Tensor:
        self.given = hidden
        return self.logits(hidden)


def _logit_transforms(config: Any) -> list[LogitTransform]:
    """What a model may make of its head's product, by the names that transformers' configurations have for it."""

    def numbers(*names: str) -> list[float]:
        found = (getattr(config, name, None) for name in names)
        return [float(x) for x in found if isinstance(x, (int, float)) and x > 0]

    scales = numbers("logit_scale", "logits_scaling", "lm_head_multiplier")
    caps = numbers("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return [LogitTransform(scale, cap) for cap in (0.0, *caps) for scale in (1.0, *scales, *(1 / x for x in scales))]


def holder(model: nn.Module, child: nn.Module) -> tuple[tuple[nn.Module], str]:
    """The module that holds a child, inside a tuple, and the child's name there."""
    path = next(name for name, module in model.named_modules() if module is child)
    parent, _, name = path.rpartition(".")
    return (model.get_submodule(parent),), name
