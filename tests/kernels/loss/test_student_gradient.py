"""What each kind of target does to the student's gradient, by the whole path from a teacher's logits through planes to
the loss: sampled targets alone are unbiased, a tail makes the loss one of merged outcomes."""

import math

import numpy as np
import pytest
import torch
from helpers.loss_problems import TEMPERATURES

from ki_ds.corpus.masking import View
from ki_ds.kernels import PackedTargets, ki_loss
from ki_ds.kernels.select.eager import select
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets.codec import Codec
from ki_ds.targets.quanta import NAT
from ki_ds.targets.selection import Selection
from ki_ds.teaching.asking import uniforms


def taught(logits, selection, quantum, temperature, tail=False):
    """What the loss reads of a teacher, as the stages make it; M rows, each with draws of its own where it is drawn."""
    rows, vocabulary = logits.shape
    view = View(np.zeros((rows, 1), np.int32), np.ones((rows, 1), bool), np.zeros((rows, 1), np.int32))
    numbers = uniforms(99, np.arange(rows), np.zeros(rows, np.int64), np.arange(rows), view, selection)
    given = None if numbers is None else torch.from_numpy(numbers)
    parts = []
    for start in range(0, rows, 500):  # each draw looks into a block of its own, in float64
        here = slice(start, start + 500)
        labels, drawn = torch.zeros(len(logits[here]), dtype=torch.int64), None if given is None else given[here]
        parts.append(select(logits[here], labels, selection, (temperature,), drawn))
    ids, kept = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids_NK", "given_NK"))
    scalars = {name: torch.cat([part.scalars[name] for part in parts]).numpy() for name in parts[0].scalars}
    codec = Codec(vocabulary, min(selection.k, vocabulary), quantum, tuple(scalars))
    planes, _ = pack_arrays(codec, ids.numpy(), kept.numpy(), scalars)
    assert planes.high_nK is None
    return PackedTargets(
        torch.from_numpy(planes.ids_nK.view(np.int16)),
        None,
        torch.from_numpy(planes.values_nK),
        torch.from_numpy(planes.count_n.astype(np.int32)),
        codec.quantum,
        torch.from_numpy(codec.scalar(planes, temperature)) if tail else None,
    )


def hidden_gradients(targets, hidden_D, weight, temperature, alpha=1.0):
    """[M, D]: the gradient of each row's loss with respect to its own copy of one hidden state; and the KLs' sum."""
    rows = len(targets)
    hidden = hidden_D.expand(rows, -1).clone().requires_grad_()
    labels, alphas = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), alpha, dtype=torch.float64)
    result = ki_loss(hidden, weight, None, labels, targets, alphas, temperature)
    return torch.autograd.grad(result.loss, [hidden])[0], result.kl


def dense(teacher_V, hidden_D, weight, temperature):
    """τ² KL(softmax(teacher / τ) ‖ student) over the whole vocabulary, and its gradient."""
    hidden = hidden_D.clone().requires_grad_()
    logp = (teacher_V.double() / temperature).log_softmax(0)
    logq = ((weight @ hidden) / temperature).log_softmax(0)
    loss = temperature**2 * (logp.exp() * (logp - logq)).sum()
    return torch.autograd.grad(loss, [hidden])[0], loss.detach()


def pupil(seed, vocabulary, hidden):
    """A teacher's logits, and a student with as many hidden units as asked; 0: its logits are its hidden state."""
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(vocabulary, generator=g)
    weight = torch.eye(vocabulary).double()
    if hidden:
        weight = torch.randn(vocabulary, hidden, generator=g, dtype=torch.float64)
    return teacher, torch.randn(weight.shape[1], generator=g, dtype=torch.float64), weight


ROWS, DRAWS, KEPT, SIZE, FINE = 20_000, 16, 4, 24, 1 / 112


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_only_sampled_targets_have_the_full_distributions_gradient_in_the_mean(temperature, hidden):
    """The claim that sampled targets are stored for. 20,000 rows of 16 draws each: every component of their mean
    gradient lies within 4.5 standard errors of the gradient of the full distribution, and Pearson's statistic of all
    (over the logits) within 4.5 of its standard deviations. In the same units top-K, renormalised, is 28 to 470 off. A
    tail repairs the kept ids' gradient, which quantisation alone separates from the truth, but not the others', where
    its mass goes by the student's own proportions: nearer to the truth over the logits, not always behind a narrow
    head."""
    teacher, state, weight = pupil(1, SIZE, hidden)
    full, _ = dense(teacher, state, weight, temperature)
    many = teacher.expand(ROWS, -1)
    drawn = taught(many, Selection("sampled", DRAWS, temperature=temperature), 0.0, temperature)
    each, _ = hidden_gradients(drawn, state, weight, temperature)
    error = each.mean(0) - full
    deviation = each.std(0) / math.sqrt(ROWS)
    assert (error.abs() < 4.5 * deviation + 1e-12).all()

    p = (teacher.double() / temperature).softmax(0)
    if not hidden:  # by the multinomial's own variance, not by the sample's
        common = p * ROWS * DRAWS > 100
        own = temperature * (p * (1 - p) / DRAWS / ROWS).sqrt()
        torch.testing.assert_close(deviation[common], own[common], rtol=0.1, atol=0)
        chi_square = ROWS * DRAWS * ((error / temperature) ** 2 / p)[common].sum().item()
        freedom = int(common.sum()) - 1
        assert abs(chi_square - freedom) < 4.5 * math.sqrt(2 * freedom)

    best = Selection("top_k", KEPT)
    cut, tailed = (taught(teacher[None], best, FINE, temperature, tail) for tail in (False, True))
    off_cut, off_tailed = (hidden_gradients(x, state, weight, temperature)[0][0] - full for x in (cut, tailed))
    assert (off_cut / deviation).abs().max() > 25
    assert 10 * error.norm() < min(off_cut.norm(), off_tailed.norm())
    if not hidden:
        kept = cut.ids()[0]
        # log p̂ - log p of a kept id: half a quantum each of its own and the normaliser's, and half a unit of the tail
        bound = p[kept] * temperature * math.expm1(FINE / temperature + 0.5 / NAT)
        assert (off_tailed[kept].abs() <= bound).all()
        assert (off_cut[kept].abs() > 2.5 * bound).all()
        assert off_tailed.norm() < 0.7 * off_cut.norm()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("left_out", [0, 1])
def test_with_a_tail_of_at_most_one_id_the_loss_is_the_dense_kl(temperature, left_out):
    """K = V, or one less, where the tail is an id's own probability; a quantum of 1/1024 in a flat distribution."""
    g = torch.Generator().manual_seed(7)
    teacher = torch.rand(40, generator=g) * 0.18
    _, state, weight = pupil(8, 40, 6)
    targets = taught(teacher[None], Selection("top_k", 40 - left_out), 1 / 1024, temperature, tail=True)
    assert torch.isneginf(targets.tail_N).item() == (left_out == 0)
    gradient, kl = hidden_gradients(targets, state, weight, temperature)
    expected, loss = dense(teacher, state, weight, temperature)
    assert (kl * temperature**2).item() == pytest.approx(loss.item(), rel=1e-4)
    assert (gradient[0] - expected).norm() < 2e-4 * expected.norm()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_merging_ids_into_a_tail_only_loses_divergence(temperature):
    """Data processing: the KL of merged outcomes is never above that of all, and rises with K to reach it."""
    teacher, state, weight = pupil(9, 30, 4)
    full = dense(teacher, state, weight, temperature)[1].item() / temperature**2
    found = []
    for k in (1, 3, 10, 20, 30):
        targets = taught(teacher[None], Selection("top_k", k), 1 / 32, temperature, tail=True)
        found.append(hidden_gradients(targets, state, weight, temperature)[1].item())
    slack = 0.03 / temperature  # of quantisation
    assert all(0 <= a <= b + slack for a, b in zip(found, [*found[1:], full], strict=True))
    assert found[-1] == pytest.approx(full, abs=slack) and found[0] < full - slack
