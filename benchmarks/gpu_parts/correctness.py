"""Right first: the Triton loss and selection against float64 on the device, by the checks of the tests.

    python -m benchmarks.gpu_parts.correctness               # all cases, one a line; exit code 1 where one fails
    python -m benchmarks.gpu_parts.correctness --tiny        # the same code, small, interpreted without a GPU
    compute-sanitizer --tool memcheck python -m benchmarks.gpu_parts.correctness --sanitize

In order of worth, about 300 cases (on an H100 an estimated three minutes, of which one compiles 100 kernels):

    1. every type with every kind of targets, V 50,265, τ 2, N 77: 12 of the loss, and each selection in every type
    2. N 8,192: each type at each V, so that all pairs of type, V, kind of targets, τ and form but a few occur, and all
       kinds at the largest V in bf16; the selection alike (the whole product would take a quarter of an hour)
    3. the whole product of type, V, kind of targets and τ, at N 1 and 77; forms (padding, scale, soft caps) in turn
    4. compute-sanitizer's memcheck and racecheck of the bare kernels

Errors are given as shares of what the tests allow. Needs tests/helpers, but neither pytest nor hypothesis.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from helpers.loss_problems import FORMS, MODES, gradients, leaves, problem
from helpers.precision import (
    Logits,
    check_draws,
    check_loss,
    check_selection,
    recorded_products,
    same_bits,
    whole_numbers,
)

from gpu_parts.part import ROOT, NotHere
from ki_ds.kernels import IDENTITY, LogitTransform, select_targets
from ki_ds.kernels.select.pack import Predictions
from ki_ds.targets.selection import Selection

Check = Callable[[], dict[str, Any]]

DTYPES = ("bfloat16", "float16", "float32")
TARGETS = (*MODES, "none")
TEMPERATURES = (2.0, 1.0, 3.0)
HIDDEN = 64
SCALE = 4  # hidden states are divided by it: logits of a deviation of about 2
QUANTUM = 1 / 16
ALL_FORMS: dict[str, dict[str, Any]] = FORMS | {
    "padded": {"padding": 5},
    "soft cap": {"logit_transform": LogitTransform(1.0, 30.0)},
}
KINDS = ("top_k", "top_p", "sampled")
TRANSFORMS = {"plain": IDENTITY, "scaled": LogitTransform(0.5), "soft cap": LogitTransform(1.0, 30.0)}
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_S = 240


class Sizes(NamedTuple):
    """What the cases are made of."""

    vocabularies: tuple[int, ...]
    typical: int  # of these, for one of each kind first
    few: tuple[int, ...]  # rows
    many: int
    k: int  # more than one block of the kernel's
    every: int  # of the whole products only so many-th


WHOLE = Sizes((2_048, 50_265, 128_256, 151_936), 50_265, (1, 77), 8_192, 150, 1)
TINY = Sizes((64, 300), 300, (1, 3), 7, 150, 7)


class Loss(NamedTuple):
    """One check of the loss."""

    dtype: str
    targets: str  # a kind, or "none"
    vocabulary: int
    temperature: float
    form: str
    rows: tuple[int, ...]

    def name(self) -> str:
        sizes = f"V {self.vocabulary:,}, N {' and '.join(f'{n:,}' for n in self.rows)}"
        return f"loss {self.dtype}, targets {self.targets}, τ {self.temperature:g}, {sizes}, {self.form}"

    def check(self, device: str, k: int) -> dict[str, Any]:
        """The largest share of each number over the rows; seconds, and the allocator's peak above the inputs.

        Raises:
            AssertionError: it is too far from float64, or two runs differ.
        """
        begun, figures, peak = time.perf_counter(), {}, 0
        for rows in self.rows:
            inputs = self._inputs(rows, device, k)
            _keep_largest(figures, check_loss(inputs, self.temperature))
            run = partial(gradients, "triton", inputs, self.temperature)
            same_bits(run)
            peak = max(peak, _peak(device, run))
        return _figures(figures, begun, peak)

    def _inputs(self, rows: int, device: str, k: int) -> dict[str, Any]:
        mode, dtype = "tail" if self.targets == "none" else self.targets, getattr(torch, self.dtype)
        size, k = (rows, HIDDEN, self.vocabulary), min(k, self.vocabulary // 2)
        more = ALL_FORMS[self.form]
        inputs = problem(*size, k, rows, mode, dtype, device=device, draw_on=device, **more)
        inputs["hidden_ND"] = (inputs["hidden_ND"].detach() / SCALE).requires_grad_()
        inputs["labels_N"][0].clamp_(min=0)  # of one row there is all to see
        inputs["alpha_N"][0] = 0.7
        return inputs | ({"targets": None, "alpha_N": None} if self.targets == "none" else {})


class Choice(NamedTuple):
    """One check of the selection."""

    dtype: str
    kind: str
    vocabulary: int
    k: int
    numbers: str  # "ties": whole numbers, exact in every type and full of ties; "gaussian"
    transform: str
    rows: tuple[int, ...]

    def name(self) -> str:
        sizes = f"V {self.vocabulary:,}, K {self.k:,}, N {' and '.join(f'{n:,}' for n in self.rows)}"
        return f"selection {self.dtype}, {self.kind}, {sizes}, {self.numbers}, {self.transform}"

    def check(self, device: str) -> dict[str, Any]:
        """As of `Loss`.

        Raises:
            AssertionError: another choice than by definition, or two runs differ.
        """
        begun, figures, peak = time.perf_counter(), {}, 0
        for rows in self.rows:
            found, peak_here = self._of(rows, device)
            _keep_largest(figures, found)
            peak = max(peak, peak_here)
        return _figures(figures, begun, peak)

    def _of(self, rows: int, device: str) -> tuple[dict[str, float], int]:
        drawn, transform = self.kind == "sampled", TRANSFORMS[self.transform]
        selection = Selection(self.kind, min(self.k, 255 if drawn else self.vocabulary), 0.9, 2.0 if drawn else 1.0)
        hidden, weight, bias, labels = arguments = self._arguments(rows, device)
        g = torch.Generator(device).manual_seed(rows)
        uniforms = torch.rand(rows, selection.k, dtype=torch.float64, device=device, generator=g) if drawn else None
        padding = torch.full((5, weight.shape[1]), 50.0, dtype=weight.dtype, device=device)
        given = (hidden, torch.cat([weight, padding]), torch.nn.functional.pad(bias, (0, 5), value=1e4), labels)
        quantum, temperatures = (0.0, ()) if drawn else (QUANTUM, (1.0, 2.0))
        more = {"vocabulary": self.vocabulary, "logit_transform": transform, "impl": "triton"}

        def run() -> Predictions:
            return select_targets(*given, selection, quantum, temperatures, uniforms, **more)

        if self.numbers == "ties":
            found, logits = run(), Logits.exact(arguments, transform)
        else:
            with recorded_products() as products:
                found = run()
            logits = Logits.of_chunks(products, transform)
        if drawn:
            shares = check_draws(found, logits, labels, selection, uniforms)
        else:
            exact = self.numbers == "ties" and not transform.cap
            step, edge = 0 if exact else 1, 1e-6
            shares = check_selection(found, logits, labels, selection, quantum, temperatures, step, edge)
        same_bits(lambda: _tensors(run()))
        return shares, _peak(device, run)

    def _arguments(self, rows: int, device: str) -> tuple[torch.Tensor, ...]:
        dtype = getattr(torch, self.dtype)
        if self.numbers == "ties":
            return whole_numbers(rows, HIDDEN // 4, self.vocabulary, rows, dtype, device=device)
        g = torch.Generator(device).manual_seed(rows)
        shapes = ((rows, HIDDEN), (self.vocabulary, HIDDEN), (self.vocabulary,))
        hidden, weight, bias = (torch.randn(shape, generator=g, device=device) for shape in shapes)
        labels = torch.randint(0, self.vocabulary, (rows,), generator=g, device=device)
        return (hidden / SCALE).to(dtype), weight.to(dtype), bias.to(dtype), labels


def _keep_largest(into: dict[str, float], found: dict[str, float]) -> None:
    for name, share in found.items():
        into[name] = max(into.get(name, 0.0), share)


def _figures(shares: dict[str, float], begun: float, peak: int) -> dict[str, Any]:
    rounded = {name: float(f"{share:.3g}") for name, share in shares.items()}
    return {"shares": rounded, "two_runs": "bit-equal", "seconds": round(time.perf_counter() - begun, 2), "peak": peak}


def _peak(device: str, run: Callable[[], Any]) -> int:
    """Bytes that the allocator holds at most during a run, above what it held before; 0 where there is none to ask."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _tensors(found: Predictions) -> dict[str, torch.Tensor]:
    named = vars(found) | {str(name): x for name, x in found.scalars.items()}
    return {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}


# ----------------------------------------------------------------------------------------------------------- the cases


def losses(sizes: Sizes) -> tuple[list[Loss], list[Loss], list[Loss]]:
    """One of each; many rows; all."""
    forms = tuple(ALL_FORMS)
    first, many, whole = [], [], []
    for (i, dtype), (j, targets) in product(enumerate(DTYPES), enumerate(TARGETS)):
        first.append(Loss(dtype, targets, sizes.typical, TEMPERATURES[0], forms[(i + j) % 4], sizes.few[-1:]))
    for (i, dtype), (j, vocabulary) in product(enumerate(DTYPES), enumerate(sizes.vocabularies)):
        targets, temperature, form = TARGETS[(i + j) % 4], TEMPERATURES[(i + 2 * j) % 3], forms[(2 * i + j + 1) % 4]
        many.append(Loss(dtype, targets, vocabulary, temperature, form, (sizes.many,)))
    for targets in TARGETS:
        many.append(Loss(DTYPES[0], targets, sizes.vocabularies[-1], TEMPERATURES[0], "plain", (sizes.many,)))
    every = map(enumerate, (DTYPES, sizes.vocabularies, TARGETS, TEMPERATURES))
    for (i, dtype), (j, vocabulary), (m, targets), (t, temperature) in product(*every):
        whole.append(Loss(dtype, targets, vocabulary, temperature, forms[(i + j + m + t) % 4], sizes.few))
    return first, many, whole[:: sizes.every]


def choices(sizes: Sizes) -> tuple[list[Choice], list[Choice], list[Choice]]:
    """One of each; many rows; all. Capped logits are whole numbers, since float32 would tie near ones."""
    first, many, whole = [], [], []
    for dtype, kind in product(DTYPES, KINDS):
        for numbers in ("ties",) if kind == "sampled" else ("ties", "gaussian"):
            first.append(Choice(dtype, kind, sizes.typical, 100, numbers, "plain", sizes.few[-1:]))
    for (i, dtype), (j, vocabulary) in product(enumerate(DTYPES), enumerate(sizes.vocabularies[1:])):
        kind = KINDS[(i + j) % 3]
        numbers = "ties" if kind == "sampled" or j % 2 else "gaussian"
        many.append(Choice(dtype, kind, vocabulary, 100, numbers, "plain", (sizes.many,)))
    logits = (("gaussian", "plain"), ("ties", "scaled"), ("ties", "soft cap"))
    for dtype, vocabulary, k, (numbers, transform) in product(DTYPES, sizes.vocabularies, (1, 100, 1000), logits):
        whole.append(Choice(dtype, "top_k", vocabulary, k, numbers, transform, sizes.few))
    return first, many, whole[:: sizes.every]


def rows(device: str, tiny: bool) -> Iterator[tuple[str, Check]]:
    """Name and check of each case, in order of worth.

    A check returns JSON: `shares`, errors as shares of what is allowed; `two_runs`; `seconds`; `peak`, bytes that a run
    takes above its inputs; or why it was `skipped`. It raises AssertionError where the kernels are wrong.
    """
    sizes = TINY if tiny else WHOLE
    checks: dict[str, Check] = {}  # once each
    for of_loss, of_choice in zip(losses(sizes), choices(sizes), strict=True):
        checks |= {one.name(): partial(one.check, device, sizes.k) for one in of_loss}
        checks |= {one.name(): partial(one.check, device) for one in of_choice}
    yield from checks.items()
    for tool in SANITIZERS:
        yield f"compute-sanitizer {tool}", partial(sanitized, tool, device)


# ------------------------------------------------------------------------------------------------------- the sanitizer


def sanitized(tool: str, device: str = "cuda") -> dict[str, Any]:
    """The bare kernels under compute-sanitizer.

    Raises:
        NotHere: it is not installed, or there is no GPU.
        TimeoutError: it took too long.
        AssertionError: it found something; with what it said.
    """
    if device == "cpu":
        raise NotHere("there is no GPU")
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=places)
    if program is None:
        raise NotHere("compute-sanitizer is not installed")
    begun = time.perf_counter()
    # torch's allocator would hide what lies beside a tensor; its probes of the driver are no errors
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, "-m", "benchmarks.gpu_parts.correctness", "--sanitize"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, timeout=SANITIZER_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"it took more than {SANITIZER_S} s") from None
    assert done.returncode == 0, f"compute-sanitizer --tool {tool}: exit code {done.returncode}\n{done.stdout[-4000:]}"
    said = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
    return {"said": said, "seconds": round(time.perf_counter() - begun, 2)}


def sanitize(device: str) -> None:
    """A small problem through each kernel, apart from any library's product. The products come from the CPU."""
    from ki_ds.kernels.logit_transform import logits_buffer
    from ki_ds.kernels.loss.reference import Rows
    from ki_ds.kernels.loss.triton_loss import chunk_loss
    from ki_ds.kernels.select.triton_select import largest

    transform = LogitTransform(0.6, 4.0)
    for vocabulary, dtype in ((2_500, torch.bfloat16), (66_000, torch.float32)):
        inputs = problem(7, 8, vocabulary, 150, 1, "tail", dtype)
        logits = torch.nn.functional.linear(*(x.detach() for x in leaves(inputs))).to(device)
        for targets in (inputs["targets"].to(device), None):
            rows_N = Rows.of(inputs["labels_N"].to(device), targets, inputs["alpha_N"].to(device), torch.float32)
            buffer_NV = logits_buffer(*logits.shape, logits)
            buffer_NV.copy_(logits)
            assert torch.isfinite(chunk_loss(buffer_NV, rows_N, 2.0, transform, 1.0, True)).all()
            assert torch.isfinite(buffer_NV).all()
        buffer_NV.copy_(logits)
        for k in (100, 1100):
            ids_NK, kept_NK, _ = largest(buffer_NV, k, (1.0, 2.0), transform)
            wanted = transform.of(logits.float()).topk(k, dim=1).values.sum(dim=1)
            torch.testing.assert_close(kept_NK.sum(dim=1), wanted)
            assert (ids_NK.diff(dim=1) > 0).all()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sanitize", action="store_true", help="what compute-sanitizer watches")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.sanitize:
        sanitize(device)
        return 0
    failed = 0
    for name, check in rows(device, given.tiny):
        try:
            print(f"{name}: {check()}", flush=True)
        except (NotHere, TimeoutError) as reason:
            print(f"{name}: left out: {reason}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"{name}: FAILED: {error}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
