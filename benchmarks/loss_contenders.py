"""What the loss is measured against: inputs of one size, and losses of ours, of plain PyTorch and of others on them.

products             the three bare matrix products: logits, dHidden, dWeight, all rows at once
products by chunks   the same by the chunks that `ki_loss` takes
ce                   cross-entropy by `ki_loss`, α = 0
ki                   `ki_loss` with α = 0.5 and K entries a row
ki, again            as ki, but the forward pass keeps nothing and the backward pass computes all again
dense ce, dense ki   eager PyTorch: all logits, and the teacher's probabilities as a dense tensor
compiled dense ki    the same by torch.compile
deepspeed ce         DeepSpeed's chunked cross-entropy on all logits, its Triton kernels (GPU) and its torch code
liger ce             Liger's fused linear cross-entropy; "in fp32": with the weight gradient added up in fp32, as ours
liger kl             Liger's fused linear KL for cached soft labels: KL alone, from probabilities [N, V] in bf16 that
                     are there already, and are no part of the memory
liger ce and kl      both, added: what inheriting takes with them
liger jsd            Liger's fused linear JSD at β = 0, which is KL alone; the teacher's product is computed in it
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear
from torch.utils.checkpoint import checkpoint

from ki_ds.kernels import PackedTargets, ki_loss, select_targets
from ki_ds.kernels.dispatch import Impl
from ki_ds.kernels.logit_transform import logits_buffer
from ki_ds.targets.selection import Selection

ALPHA = 0.5
Loss = Callable[[], Tensor]


class Case(NamedTuple):
    """Sizes of one comparison."""

    rows: int
    hidden: int
    vocabulary: int
    k: int = 100
    dtype: str = "float32"
    temperature: float = 2.0
    tail: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        more = f", τ {self.temperature:g}" + (", tail" if self.tail else "")
        return f"N {self.rows:,}, D {self.hidden:,}, V {self.vocabulary:,}, K {self.k}, {self.dtype}{more}"


class Inputs(NamedTuple):
    """What every contender reads."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    targets: PackedTargets
    alpha_N: Tensor


def inputs(case: Case, device: str) -> Inputs:
    """Random hidden states and head; targets of rising distinct ids; logits of about a language model's spread."""
    generator = torch.Generator(device).manual_seed(0)
    how: Any = dict(generator=generator, device=device)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.rows, case.hidden, **how) * (2.0 / case.hidden**0.5)
    weight = torch.randn(case.vocabulary, case.hidden, **how)
    gap = case.vocabulary // case.k
    ids = torch.arange(case.k, device=device) * gap + torch.randint(0, gap, (case.rows, case.k), **how)
    targets = PackedTargets(
        (ids & 0xFFFF).to(torch.int32).to(torch.int16),
        (ids >> 16).to(torch.uint8) if case.vocabulary > 1 << 16 else None,
        torch.randint(0, 200, (case.rows, case.k), **how).to(torch.uint8),
        torch.full((case.rows,), case.k, dtype=torch.int32, device=device),
        63 / 1024,
        torch.full((case.rows,), -1.0, device=device) if case.tail else None,
    )
    labels = torch.randint(0, case.vocabulary, (case.rows,), **how)
    leaves = (hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
    return Inputs(*leaves, labels, targets, torch.full((case.rows,), ALPHA, device=device))


def dense_ki(x: Inputs, temperature: float) -> Tensor:
    """Eager PyTorch, as the formula is usually written."""
    logits = linear(x.hidden_ND, x.weight_VD).float()
    logp, _ = x.targets.log_probabilities(temperature)
    teacher = torch.zeros_like(logits).scatter_(1, x.targets.ids(), logp.exp())
    ce = cross_entropy(logits, x.labels_N, reduction="sum")
    kl = kl_div((logits / temperature).log_softmax(dim=1), teacher, reduction="sum")
    return (1 - ALPHA) * ce + ALPHA * temperature**2 * kl


def products(x: Inputs, rows: int) -> Callable[[], None]:
    """Three products in the inputs' type into memory that is there already, nothing else."""
    hidden, weight = x.hidden_ND.detach(), x.weight_VD.detach()
    logits, grad_hidden = logits_buffer(rows, len(weight), hidden).zero_(), torch.zeros_like(hidden)
    grad_weight = torch.zeros_like(weight)

    def call() -> None:
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            some = logits[: len(part)]
            torch.mm(part, weight.T, out=some)
            torch.mm(some, weight, out=grad_hidden[start : start + rows])
            torch.addmm(grad_weight, some.T, part, out=grad_weight)

    return call


def losses(case: Case, x: Inputs, impl: Impl = "auto", compiled: bool = True) -> dict[str, Loss]:
    """Losses by name, sums over the rows, that leave gradients of hidden states and head when gone back through; those
    whose package is here. `compiled`: with torch.compile's."""
    logits = partial(linear, x.hidden_ND, x.weight_VD)

    def ki(hidden: Tensor) -> Tensor:
        return ki_loss(
            hidden, x.weight_VD, None, x.labels_N, x.targets, x.alpha_N, case.temperature, impl=impl
        ).loss  # fmt: skip

    found: dict[str, Loss] = {
        "ce": lambda: ki_loss(x.hidden_ND, x.weight_VD, None, x.labels_N, impl=impl).loss,
        "ki": lambda: ki(x.hidden_ND),
        "ki, again": lambda: checkpoint(ki, x.hidden_ND, use_reentrant=True),
        "dense ce": lambda: cross_entropy(logits(), x.labels_N, reduction="sum"),
    }
    if not case.tail:
        found["dense ki"] = partial(dense_ki, x, case.temperature)
        if compiled:
            found["compiled dense ki"] = partial(_compiled(), x, case.temperature)
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

        backends = ("triton", "torch") if x.hidden_ND.is_cuda else ("torch",)
        for backend in backends:
            how = dict(reduction="sum", backend=backend)
            found[f"deepspeed ce, {backend}"] = lambda how=how: chunked_cross_entropy(logits(), x.labels_N, **how)
    return found | (liger(case, x) if x.hidden_ND.is_cuda and importlib.util.find_spec("liger_kernel") else {})


@cache
def _compiled() -> Any:
    return torch.compile(dense_ki, dynamic=False)


def liger(case: Case, x: Inputs) -> dict[str, Loss]:
    """Liger's, on the same inputs."""
    from liger_kernel.transformers import functional as them

    ce = partial(
        them.liger_fused_linear_cross_entropy, x.hidden_ND, x.weight_VD, x.labels_N, reduction="sum"
    )  # fmt: skip
    found: dict[str, Loss] = {"liger ce": ce, "liger ce, in fp32": partial(ce, accum_dtype=torch.float32)}
    if case.tail:
        return found
    logp, _ = x.targets.log_probabilities(case.temperature)
    shape = case.rows, case.vocabulary
    teacher = torch.zeros(shape, dtype=x.hidden_ND.dtype, device=x.hidden_ND.device)
    teacher.scatter_(1, x.targets.ids(), logp.exp().to(teacher.dtype))
    kl = partial(
        them.liger_fused_linear_kl_div, x.hidden_ND, x.weight_VD, teacher, None, "sum", temperature=case.temperature
    )  # fmt: skip
    other = torch.randn_like(x.weight_VD)
    return found | {
        "liger kl": kl,
        "liger ce and kl": lambda: (1 - ALPHA) * ce() + ALPHA * case.temperature**2 * kl(),
        "liger jsd": lambda: them.liger_fused_linear_jsd(
            x.hidden_ND, x.weight_VD, x.hidden_ND.detach(), other, x.labels_N, 0.0, temperature=case.temperature
        ),
    }


def backward(x: Inputs, loss: Loss) -> Callable[[], None]:
    """Forward and backward pass of a loss."""

    def call() -> None:
        x.hidden_ND.grad = x.weight_VD.grad = None
        loss().backward()

    return call


def select_contenders(case: Case, x: Inputs, impl: Impl = "auto") -> dict[str, Callable[[], Any]]:
    """The teacher's side: what it cannot do without, how it is done here, and by whole rows of probabilities."""
    how = Selection("top_k", case.k)
    hidden, weight = x.hidden_ND.detach(), x.weight_VD.detach()
    product = logits_buffer(case.rows, case.vocabulary, hidden).zero_()
    return {
        "head product": lambda: torch.mm(hidden, weight.T, out=product),
        "select": lambda: select_targets(hidden, weight, None, x.labels_N, how, 63 / 1024, (2.0,), impl=impl),
        "log_softmax and topk": lambda: linear(hidden, weight).float().log_softmax(dim=1).topk(case.k, dim=1),
    }
