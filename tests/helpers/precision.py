"""How near the loss and the selection come to float64: one check of each, on any device, without a test runner.

N rows, V vocabulary, K kept ids. Whatever has N · V entries is made for a chunk of rows at a time, so that thousands of
rows of a large vocabulary fit in bounded memory. A check that fails raises AssertionError; one that holds returns what
it measured, errors as shares of what is allowed.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import linear

from helpers.definition import by_definition
from helpers.loss_problems import LEAVES, gradients, widened
from ki_ds.kernels import IDENTITY, LogitTransform
from ki_ds.kernels.logit_transform import head
from ki_ds.kernels.loss.reference import Rows, kept_ids
from ki_ds.kernels.select import eager
from ki_ds.targets.codec import Codec
from ki_ds.targets.scalars import scalars_of

BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}  # of float64 tensors of [rows, V] that are alive together, ALIVE of them
ALIVE = 16
ROWS = ("labels_N", "targets", "alpha_N")


def _chunks(rows, vocabulary, device):
    """Runs of rows whose logits, in float64 and several times, are within BYTES."""
    size = max(BYTES[torch.device(device).type] // (8 * ALIVE * vocabulary), 1)
    return (slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size))


def same_bits(run):
    """Two calls give the same bits; what the second one returned.

    Raises:
        AssertionError: they do not.
    """
    one, two = run(), run()
    torch.testing.assert_close(two, one, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"two runs differ: {m}")
    return two


# ------------------------------------------------------------------------------------------------------------ the loss


def _parts(inputs):
    """The arguments of the loss for each chunk of rows; the head's tensors are those of the whole."""
    vocabulary = inputs.get("vocabulary", len(inputs["weight_VD"]))
    for here in _chunks(len(inputs["labels_N"]), vocabulary, inputs["labels_N"].device):
        targets, alpha = inputs["targets"], inputs["alpha_N"]
        yield inputs | {
            "hidden_ND": inputs["hidden_ND"].detach()[here].requires_grad_(),
            "labels_N": inputs["labels_N"][here],
            "targets": None if targets is None else targets.rows(here),
            "alpha_N": None if alpha is None else alpha[here],
        }


def _added(parts):
    """Of chunks: the first of what each gives one after the other, all others added up in float64."""
    firsts, totals = [], None
    for first, *others in parts:
        firsts.append(first)
        totals = [x.double() if totals is None else totals[n].add_(x) for n, x in enumerate(others)]
    return [torch.cat(firsts), *totals]


def reference(inputs, temperature):
    """Loss, CE and KL in float64 of the eager reference, and its gradients in the inputs' type."""
    sums = torch.zeros(3, dtype=torch.float64, device=inputs["labels_N"].device)

    def of(part):
        result, found = gradients("reference", part, temperature)
        sums.add_(torch.stack([x.detach() for x in result[:3]]))
        return found

    found = _added(of(part) for part in _parts(inputs))
    return sums, [x.to(inputs["hidden_ND"].dtype) for x in found]


def terms(inputs, temperature):
    """What the sums in the three gradients add up, all signs taken for plus; times the conditioning of softmax."""
    return _added(_terms(part, temperature) for part in _parts(inputs))


def _terms(inputs, temperature):
    transform, vocabulary = inputs.get("logit_transform", IDENTITY), inputs.get("vocabulary", len(inputs["weight_VD"]))
    hidden, weight, bias = (None if inputs[name] is None else inputs[name].detach().double() for name in LEAVES)
    z = transform.of(linear(hidden, *head(weight, bias, vocabulary)))
    labels, alpha, targets = Rows.of(*(inputs.get(name) for name in ROWS), torch.float64)
    truth = torch.zeros_like(z).scatter_(1, labels.clamp(min=0)[:, None], 1)
    each = (1 - alpha)[:, None] * (z.softmax(1) + truth)
    if targets is not None:
        logp, tail = targets.log_probabilities(temperature, torch.float64)
        student = (z / temperature).softmax(1)
        teacher = torch.zeros_like(z).scatter_add_(1, targets.ids(), logp.exp())
        if tail is not None:
            rest = (z / temperature).masked_fill(kept_ids(targets, vocabulary), -torch.inf)
            teacher += rest.softmax(1).nan_to_num() * tail.exp()[:, None]
        each += (alpha * temperature)[:, None] * (student + teacher)
    each *= transform.scale * (labels >= 0)[:, None] * (1 + z.abs().amax() / temperature if len(z) else 1)
    return each @ weight[:vocabulary].abs(), each.T @ hidden.abs(), each.sum(dim=0)


def check_loss(inputs, temperature, impl="triton"):
    """Errors are at most twice those of eager code, and what rounding its terms makes of each sum, without which the
    ratio of the errors of single numbers would be a matter of luck.

    Returns:
        The error of loss, CE, KL and each gradient as a share of what is allowed.
    """
    dtype, device = inputs["hidden_ND"].dtype, inputs["hidden_ND"].device.type
    truth, true_gradients = reference(widened(inputs), temperature)
    eager_sums, eager_gradients = reference(inputs, temperature)
    ours, our_gradients = gradients(impl, inputs, temperature)
    unit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    cut = 2 if device == "cpu" and dtype == torch.bfloat16 else 1  # the interpreter does not round to the nearest bf16
    found = {}
    sums = (x.detach() for x in ours[:3])
    for name, mine, theirs, true in zip(("loss", "ce", "kl"), sums, eager_sums, truth, strict=True):
        found[name] = _share(abs(mine - true), 2 * abs(theirs - true) + 1e-6 * (1 + abs(true)))
    names = [name for name in LEAVES if inputs[name] is not None]
    several = zip(names, our_gradients, eager_gradients, true_gradients, terms(inputs, temperature), strict=False)
    for name, mine, theirs, true, term in several:
        error, theirs_error = ((x.double() - true).norm() for x in (mine, theirs))
        allowed = cut * (2 * theirs_error + unit * true.norm()) + 2.0**-23 * term.norm()
        found[f"{name} gradient"] = _share(error, allowed)
    _within(found)
    return found


def _share(error, allowed):
    error, allowed = float(error), float(allowed)
    return 0.0 if error == 0 else error / allowed if allowed else math.inf


def _within(shares):
    wrong = [f"{name} {share:.3g}" for name, share in shares.items() if not share <= 1]  # NaN is not
    assert not wrong, f"errors, as multiples of what is allowed: {', '.join(wrong)}"


# ------------------------------------------------------------------------------------------------------- the selection


@dataclass(frozen=True)
class Logits:
    """Logits in float64, made for some rows when they are asked for."""

    rows: int
    vocabulary: int
    product: Callable[[slice], torch.Tensor]  # of the head, for some rows
    transform: LogitTransform = IDENTITY

    def __getitem__(self, here):
        return self.transform.of(self.product(here).double())

    def chunks(self, device):
        return _chunks(self.rows, self.vocabulary, device)

    @classmethod
    def exact(cls, arguments, transform=IDENTITY):
        """Of hidden states and a head (and labels) whose product float64 holds exactly."""
        hidden, weight, bias, _ = (None if x is None else x.double() for x in arguments)
        return cls(len(hidden), len(weight), lambda here: linear(hidden[here], weight, bias), transform)

    @classmethod
    def of_chunks(cls, products, transform=IDENTITY):
        """Of the products that `recorded_products` kept, one after the other."""
        starts = np.cumsum([0, *map(len, products)]).tolist()

        def rows(here):
            ends = zip(starts, products, strict=False)
            return torch.cat([x[max(here.start - start, 0) : max(here.stop - start, 0)] for start, x in ends])

        return cls(starts[-1], products[0].shape[1], rows, transform)


@contextmanager
def recorded_products():
    """A list that the products made by the selection within it end in: as they are rounded there, to the last bit."""
    kept, multiply = [], eager.multiply

    def recording(*arguments):
        multiply(*arguments)
        kept.append(arguments[-1].clone())

    eager.multiply = recording
    try:
        yield kept
    finally:
        eager.multiply = multiply


def whole_numbers(rows, hidden, vocabulary, seed, dtype=torch.float32, bias=True, device="cpu"):
    """Hidden states, head and labels, small integers: a product that is exact in every type, and full of ties."""
    g = torch.Generator(device).manual_seed(seed)
    here = {"generator": g, "device": device}
    states, weight = (torch.randint(-2, 3, (n, hidden), **here).to(dtype) for n in (rows, vocabulary))
    offset = torch.randint(-3, 4, (vocabulary,), **here).to(dtype) if bias else None
    return states, weight, offset, torch.randint(0, vocabulary, (rows,), **here)


def by_sorting(z, labels, selection, temperatures, counts, edge=0.0):
    """The definition: ids [n, K], log-probabilities less the first's, -inf where none is kept, and scalars, as numpy.

    A mass within `edge` of the p of a nucleus may count as either side of it, as `counts`, the entries found, have it.
    """
    k = min(selection.k, z.shape[1])
    values, ids = (z + 0.0).sort(dim=1, descending=True, stable=True)  # both zeros alike
    below = values - values[:, :1]
    total = below.exp().sum(dim=1)
    end = torch.full_like(labels, k)
    if selection.kind == "top_p" and selection.p < 1:
        mass = (below[:, :k].exp() / total[:, None]).cumsum(dim=1)
        fewest, most = (((mass < selection.p + e).sum(dim=1) + 1).clamp(max=k) for e in (-edge, edge))
        end = torch.minimum(torch.maximum(counts.to(end), fewest), most)
    kept = torch.arange(z.shape[1], device=z.device) < end[:, None]
    truth = z.gather(1, labels[:, None]).squeeze(1) - values[:, 0] - total.log()
    scalars = {"first": -total.log(), "truth": truth}
    for temperature in scalars_of(selection, temperatures)[2:]:
        scalars[temperature] = (below / temperature).exp().masked_fill(kept, 0).sum(dim=1).log()
    given = below[:, :k].masked_fill(~kept[:, :k], -torch.inf)
    return [ids[:, :k].cpu().numpy(), given.cpu().numpy(), {name: x.cpu().numpy() for name, x in scalars.items()}]


def check_selection(found, logits, labels, selection, quantum, temperatures, step=0, edge=0.0):
    """Planes exactly as the codec packs the definition's choice, values up to a step; scalars and distortion nearly.

    Args:
        found: what `select_targets` returned of such logits.
        edge: as of `by_sorting`; float32 rounds a mass by 1e-6 at most.

    Returns:
        The errors of the scalars and of the distortion as shares of what is allowed; the values' in steps.
    """
    device, parts = labels.device, []
    for here in logits.chunks(device):
        counts = found.count_N[here].to(device)
        parts.append(by_sorting(logits[here], labels[here], selection, temperatures, counts, edge))
    ids, given = (np.concatenate([part[n] for part in parts]) for n in (0, 1))
    scalars = {name: np.concatenate([part[2][name] for part in parts]) for name in parts[0][2]}
    how = Codec(logits.vocabulary, ids.shape[1], quantum, scalars=tuple(scalars))
    planes, lost = by_definition(how, ids, given, scalars)
    np.testing.assert_array_equal(_host(found.count_N), planes.count_n, err_msg="counts")
    np.testing.assert_array_equal(_host(found.ids_NK).view(np.uint16), planes.ids_nK, err_msg="ids")
    assert (found.high_NK is None) == (planes.high_nK is None)
    if planes.high_nK is not None:
        np.testing.assert_array_equal(_host(found.high_NK), planes.high_nK, err_msg="ids, bits above the 16th")
    steps = np.abs(_host(found.values_NK).astype(int) - planes.values_nK).max(initial=0)
    assert steps <= step, f"values are {steps} steps off, {step} allowed"
    assert tuple(found.scalars) == tuple(scalars)
    shares = {str(name): _largest(found.scalars[name], wanted, 1e-5, 1e-5) for name, wanted in scalars.items()}
    if not step:
        shares["distortion"] = _largest(found.distortion_N, lost, 1e-4, 1e-7)
    _within(shares)
    return shares | {"values, steps": int(steps)}


def check_draws(found, logits, labels, selection, uniforms):
    """Draws are those of one cumulated sum in float64. An id's probability is rounded to float32, so that one in a
    thousand may fall on the other side of its edge.

    Returns:
        How many do, as a share of what is allowed; and the truth's error alike.
    """
    device, elsewhere, truth = labels.device, 0, []
    low = found.ids_NK.long() & 0xFFFF
    ids = low if found.high_NK is None else low | (found.high_NK.long() << 16)
    for here in logits.chunks(device):
        z = logits[here]
        mass = (z / selection.temperature).softmax(dim=1).cumsum(dim=1)
        wanted = torch.searchsorted(mass, uniforms[here] * mass[:, -1:], right=True).sort(dim=1).values
        ends = found.values_NK[here].to(device).long().cumsum(dim=1)
        assert (ends[:, -1] == selection.k).all(), "a row's counts are not its draws"
        number = torch.arange(selection.k, device=device).expand(len(z), -1).contiguous()
        drawn = ids[here].to(device).gather(1, torch.searchsorted(ends, number, right=True))
        elsewhere += int((drawn != wanted).sum())
        truth.append(z.log_softmax(dim=1).gather(1, labels[here, None]).squeeze(1))
    shares = {
        "draws elsewhere": _share(elsewhere, max(uniforms.numel() // 1000, 1)),
        "truth": _largest(found.scalars["truth"], _host(torch.cat(truth)), 1e-5, 1e-5),
    }
    _within(shares)
    return shares


def _largest(mine, wanted, rtol, atol):
    """The largest error as a share of what numpy's tolerances allow; NaN fits nothing."""
    mine = _host(mine).astype(np.float64)
    with np.errstate(invalid="ignore"):
        shares = np.where(mine == wanted, 0, np.abs(mine - wanted) / (atol + rtol * np.abs(wanted)))
    return float(np.where(np.isnan(shares), np.inf, shares).max(initial=0))


def _host(tensor):
    return tensor.cpu().numpy()
