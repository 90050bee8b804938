"""Inputs of the loss for the tests of its implementations, the formula by hand, and what they are compared by.

It needs no test runner: the benchmarks of a GPU take their problems from here, too.
"""

import math
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ki_ds.kernels import IDENTITY, LogitTransform, PackedTargets, ki_loss

QUANTUM = 1 / 16
MODES = ("renormalised", "tail", "counts")
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
# arguments of `problem`: none of what a model may have beside a plain head, and all of it
FORMS = {"plain": {}, "everything": dict(padding=5, logit_transform=LogitTransform(0.6, 4.0))}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; on a CPU the interpreter runs them
LEAVES = ("hidden_ND", "weight_VD", "bias_V")


def problem(
    rows, hidden, vocabulary, k, seed, mode="renormalised", dtype=torch.float64, bias=True,
    padding=0, logit_transform=IDENTITY, device="cpu", draw_on=None,
):  # fmt: skip
    """Random inputs: some rows without a label, some without a target, some partly filled, some without a tail. What
    must not be read is poison: entries behind a row's count, the tail and α of rows where there is nothing to weigh.
    Rows of padding would take all probability. `draw_on`: the device to draw on, other numbers than by default and fast
    for many rows of many ids."""
    g = torch.Generator(draw_on or "cpu").manual_seed(seed)
    here = {"generator": g, "device": g.device}
    ids = _spread_ids(rows, vocabulary, k, here) if draw_on else _ids(rows, vocabulary, k, g)
    count = torch.randint(0, k + 1, (rows,), **here, dtype=torch.int32)
    count[::3] = k
    count[5::6] = 0
    behind = torch.arange(k, device=g.device)[None, :] >= count[:, None]
    lowest, highest = (1, 31) if mode == "counts" else (0, 256)
    values = torch.randint(lowest, highest, (rows, k), **here)
    tail = torch.randn(rows, **here) * 3
    tail = tail.masked_fill((torch.rand(rows, **here) < 0.3) | (count == vocabulary), -torch.inf)
    low = (ids & 0xFFFF).to(torch.int32).masked_fill(behind, -1).to(torch.int16)
    high = (ids >> 16).masked_fill(behind, 255).to(torch.uint8) if vocabulary > 1 << 16 else None
    labels = torch.randint(-1, vocabulary, (rows,), **here)
    without = (labels < 0).cumsum(0)
    labels = torch.where(labels < 0, torch.where(without % 2 == 1, -1, -100), labels)
    alpha = torch.rand(rows, **here) * (torch.rand(rows, **here) > 0.3)

    def leaf(*shape):
        return torch.randn(*shape, **here, dtype=torch.float64)

    leaves = {"hidden_ND": leaf(rows, hidden), "weight_VD": leaf(vocabulary, hidden)}
    leaves["bias_V"] = leaf(vocabulary) if bias else None
    if padding:
        leaves["weight_VD"] = torch.cat([leaves["weight_VD"], 1e3 * leaf(padding, hidden)])
        leaves["bias_V"] = torch.cat([leaves["bias_V"], 1e4 + 1e3 * leaf(padding)]) if bias else None
    inputs = {name: None if x is None else x.to(device, dtype).requires_grad_() for name, x in leaves.items()}
    inputs |= dict(
        labels_N=labels.to(device),
        targets=PackedTargets(
            low,
            high,
            values.masked_fill(behind, 255).to(torch.uint8),
            count,
            0.0 if mode == "counts" else QUANTUM,
            tail.masked_fill(count == 0, torch.nan) if mode == "tail" else None,
        ).to(device),
        alpha_N=alpha.to(dtype).masked_fill((labels < 0) | (count == 0), torch.nan).to(device),
    )
    if padding:
        inputs["vocabulary"] = vocabulary
    if logit_transform != IDENTITY:
        inputs["logit_transform"] = logit_transform
    return inputs


def _ids(rows, vocabulary, k, g):
    """int64 [rows, k], distinct and rising within a row."""
    ids = torch.zeros(rows, k, dtype=torch.int64)
    for n in range(rows):
        ids[n] = torch.randperm(vocabulary, generator=g)[:k].sort().values
    return ids


def _spread_ids(rows, vocabulary, k, here):
    """The same without a loop over rows: an id out of each of k runs of ids."""
    ends = torch.arange(k + 1, device=here["device"]) * vocabulary // k
    within = (torch.rand(rows, k, dtype=torch.float64, **here) * ends.diff()).long()
    return ends[:-1] + within.clamp(max=ends.diff() - 1)


def leaves(inputs):
    return [inputs[name] for name in LEAVES if inputs[name] is not None]


def gradients(impl, inputs, temperature, scale=1.0):
    result = ki_loss(**inputs, temperature=temperature, impl=impl)
    return result, torch.autograd.grad(result.loss * scale, leaves(inputs))


def widened(inputs):
    """The same numbers in float64."""
    return {k: v.detach().double().requires_grad_() if k in LEAVES and v is not None else v for k, v in inputs.items()}


def laid_out(inputs, layout):
    """The same numbers with other strides: `transposed` storages, or every other element of something `strided`."""

    def one(x):
        if not isinstance(x, torch.Tensor) or layout == "dense":
            return x
        if layout == "transposed":
            moved = x.detach().T.contiguous().T if x.ndim == 2 else x.detach().clone()
        else:
            moved = x.detach().repeat_interleave(2, dim=0)[::2]
        return moved.requires_grad_(x.requires_grad)

    targets = inputs["targets"]
    if targets is not None:
        targets = PackedTargets(**{name: one(x) for name, x in vars(targets).items()})
    return {name: one(x) for name, x in inputs.items()} | {"targets": targets}


@contextmanager
def poisoned_memory():
    """New memory holds NaN (or the largest integer), so that what nobody wrote shows."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills memory in this mode only
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


class Largest(TorchDispatchMode):
    """Within it, the most bytes that a tensor coming out of any operation has."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.itemsize)
        return out


def quanta(value):
    """FORMAT.md's D(v) / q."""
    return value + 7 * max(value - 192, 0)


def by_hand(inputs, temperature):
    """The formula, in Python floats, row by row and entry by entry: loss, ce, kl."""
    loss, ce_sum, kl_sum = 0.0, 0.0, 0.0
    targets, transform = inputs["targets"], inputs.get("logit_transform", IDENTITY)
    vocabulary = inputs.get("vocabulary", len(inputs["weight_VD"]))
    product = (inputs["hidden_ND"] @ inputs["weight_VD"][:vocabulary].T + inputs["bias_V"][:vocabulary]).tolist()
    for n, label in enumerate(inputs["labels_N"].tolist()):
        if label < 0:
            continue
        z = [v * transform.scale for v in product[n]]
        if transform.cap:
            z = [transform.cap * math.tanh(v / transform.cap) for v in z]
        ce = math.log(sum(math.exp(v) for v in z)) - z[label]
        count = int(targets.count_N[n])
        alpha = float(inputs["alpha_N"][n]) if count else 0.0
        values = targets.values_NK[n][:count].tolist()
        tokens = [i & 0xFFFF for i in targets.ids_NK[n][:count].tolist()]
        total = sum(math.exp(v / temperature) for v in z)
        outcomes = [math.exp(z[i] / temperature) / total for i in tokens]
        weights = (
            values if targets.quantum == 0 else [math.exp(-targets.quantum * quanta(v) / temperature) for v in values]
        )
        if targets.tail_N is not None and count and float(targets.tail_N[n]) > -math.inf:
            outcomes.append(sum(math.exp(v / temperature) for i, v in enumerate(z) if i not in tokens) / total)
            weights.append(math.exp(float(targets.tail_N[n])))
        kl = sum(w / sum(weights) * math.log(w / sum(weights) / q) for w, q in zip(weights, outcomes, strict=True) if w)
        loss += (1 - alpha) * ce + alpha * temperature**2 * kl
        ce_sum += ce
        kl_sum += kl if alpha > 0 else 0
    return loss, ce_sum, kl_sum
