"""The checks that tests and the GPU's benchmark share: chunks decide nothing, and what is wrong is found."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import precision
from helpers.loss_problems import FORMS, MODES, gradients, problem, widened
from helpers.precision import Logits, check_draws, check_loss, check_selection, recorded_products, whole_numbers

from ki_ds.kernels import select_targets
from ki_ds.targets.selection import Selection

ROOT = Path(__file__).parents[2]
QUANTUM, TEMPERATURES = 1 / 16, (1.0, 2.0)


@pytest.fixture
def small_chunks(monkeypatch):
    """Of three rows of 40 ids."""
    monkeypatch.setitem(precision.BYTES, "cpu", 3 * 40 * 8 * precision.ALIVE)


def example(mode, dtype=torch.float32, rows=20, **more):
    inputs = problem(rows, 4, 40, 6, 5, mode or "tail", dtype, draw_on="cpu", **more)
    return inputs | ({} if mode else {"targets": None, "alpha_N": None})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", [None, *MODES])
def test_the_reference_by_chunks_is_the_reference(small_chunks, mode, form):
    inputs = widened(example(mode, **FORMS[form]))
    wanted, of_leaves = gradients("reference", inputs, 2.0)
    sums, found = precision.reference(inputs, 2.0)
    torch.testing.assert_close(sums, torch.stack(wanted[:3]).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, list(of_leaves), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mode", [None, *MODES])
def test_terms_by_chunks_allow_no_more(mode, monkeypatch):
    found = precision.terms(example(mode), 2.0)
    monkeypatch.undo()
    for mine, whole in zip(found, precision.terms(example(mode), 2.0), strict=True):
        assert mine.shape == whole.shape and (mine <= whole * (1 + 1e-12)).all()
        assert (mine > 0.3 * whole)[whole > 0].all()


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_problems_drawn_on_the_device_hold_what_the_others_hold(dtype, mode):
    inputs = example(mode, dtype, rows=60)
    assert {-1, -100} >= set(inputs["labels_N"][inputs["labels_N"] < 0].tolist())
    if mode:
        targets = inputs["targets"]
        rising = targets.ids().diff(dim=1)[targets.kept()[:, 1:]]
        assert (rising > 0).all() and (targets.ids() < 40).all()
        assert (targets.count_N == 0).any() and (targets.count_N == 6).any() and inputs["alpha_N"].isnan().any()
    shares = check_loss(inputs, 2.0, "chunked")
    assert set(shares) == {"loss", "ce", "kl", *(f"{name} gradient" for name in precision.LEAVES)}


@pytest.mark.parametrize("wrong", range(4))
def test_a_wrong_loss_or_gradient_is_found_and_named(monkeypatch, wrong):
    """One row's loss, or gradients too small by a ten-thousandth."""

    def spoilt(impl, *given):
        result, found = gradients(impl, *given)
        if impl == "chunked" and wrong == 3:
            return result._replace(loss=result.loss * 1.0001), found
        if impl == "chunked":
            return result, [x * 0.9999 if n == wrong else x for n, x in enumerate(found)]
        return result, found

    check_loss(example("tail"), 2.0, "chunked")
    monkeypatch.setattr(precision, "gradients", spoilt)
    name = [*(f"{name} gradient" for name in precision.LEAVES), "loss"][wrong]
    with pytest.raises(AssertionError, match=rf"allowed: {name} \d"):
        check_loss(example("tail"), 2.0, "chunked")


def test_runs_that_differ_are_found():
    numbers = iter(torch.arange(4.0))
    with pytest.raises(AssertionError, match="two runs differ"):
        precision.same_bits(lambda: [next(numbers)])
    precision.same_bits(lambda: {"same": torch.tensor(torch.nan)})


def chosen(kind, arguments, uniforms=None):
    selection = Selection(kind, 6, 0.9, 2.0 if uniforms is not None else 1.0)
    given = (0.0, (), uniforms) if uniforms is not None else (QUANTUM, TEMPERATURES)
    return selection, select_targets(*arguments, selection, *given, impl="chunked")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["top_k", "top_p"])
def test_a_wrong_choice_is_found(kind):
    arguments = whole_numbers(20, 3, 40, 1)
    selection, found = chosen(kind, arguments)
    given = (Logits.exact(arguments), arguments[3], selection, QUANTUM, TEMPERATURES)
    assert all(share <= 1 for share in check_selection(found, *given, edge=1e-6).values())
    for name, change in (("ids_NK", 1), ("values_NK", 1), ("count_N", -1)):
        spoilt = getattr(found, name).clone()
        spoilt.view(-1)[-1] += change
        with pytest.raises(AssertionError):
            check_selection(replace(found, **{name: spoilt}), *given)
    scalars = found.scalars | {2.0: found.scalars[2.0] + 1e-3}
    with pytest.raises(AssertionError, match=r"allowed: 2\.0 "):
        check_selection(replace(found, scalars=scalars), *given)


@pytest.mark.usefixtures("small_chunks")
def test_logits_of_recorded_products_are_those_of_any_chunks(monkeypatch):
    from ki_ds.kernels.select import eager

    arguments = whole_numbers(20, 3, 40, 1, bias=False)
    monkeypatch.setitem(eager.LOGIT_BYTES, "chunked", 7 * 40 * 4)
    with recorded_products() as products:
        chosen("top_k", arguments)
    assert [len(x) for x in products] == [7, 7, 6]
    recorded, exact = Logits.of_chunks(products), Logits.exact(arguments)
    for here in (slice(0, 20), slice(5, 9), slice(6, 15), slice(19, 20)):
        assert torch.equal(recorded[here], exact[here])


@pytest.mark.usefixtures("small_chunks")
def test_wrong_draws_are_found():
    arguments = whole_numbers(20, 3, 40, 1)
    uniforms = torch.rand(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    selection, found = chosen("sampled", arguments, uniforms)
    check_draws(found, Logits.exact(arguments), arguments[3], selection, uniforms)
    with pytest.raises(AssertionError, match="draws elsewhere"):
        check_draws(found, Logits.exact(arguments), arguments[3], selection, uniforms.flip(0))


def correctness(code):
    """What Python prints where neither pytest nor hypothesis can be imported."""
    bare = "import sys; sys.modules['pytest'] = sys.modules['hypothesis'] = None\n"
    bare += "import benchmarks.gpu_parts.correctness as part\n"
    command = [sys.executable, "-W", "ignore", "-c", bare + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_benchmark_of_correctness_needs_no_test_runner():
    names, figures = correctness("""
import json
found = list(part.rows("cpu", True))
print(json.dumps([name for name, _ in found]))
print(json.dumps(found[0][1]()))
""").splitlines()[-2:]
    names, figures = json.loads(names), json.loads(figures)
    assert len(set(names)) == len(names) > 50 and names[-1] == "compute-sanitizer racecheck"
    assert figures["two_runs"] == "bit-equal" and max(figures["shares"].values()) <= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_benchmark_of_correctness_in_small():
    assert "FAILED" not in correctness("sys.argv = ['', '--tiny']; assert part.main() == 0")
    correctness("part.sanitize('cpu')")
