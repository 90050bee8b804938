"""The Triton kernel: any shape against float64, what it compiles to, and where it is chosen. On a GPU it runs as it is,
on a CPU in Triton's interpreter; what the other loss tests call `triton` is this kernel too."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.loss_problems import DEVICE, FORMS, LEAVES, MODES, TEMPERATURES, gradients, leaves, problem, widened
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.kernels import LogitTransform, PackedTargets, ki_loss
from ki_ds.kernels import dispatch as choice
from ki_ds.kernels.logit_transform import head
from ki_ds.kernels.loss import chunked
from ki_ds.kernels.loss.reference import Rows, kept_ids

triton = pytest.importorskip("triton")
# the interpreter computes in numpy, which warns of what stays behind a mask
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

ROWS = ("labels_N", "targets", "alpha_N", "weights_N")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN_AND_NOT = [
    LogitTransform(),
    LogitTransform(0.25, 0.0),
    LogitTransform(3.0, 0.0),
    LogitTransform(1.0, 2.0),
    LogitTransform(0.7, 5.0),
]


def terms(inputs, temperature):
    """What the sums in the three gradients add up, all signs taken for plus; times the conditioning of softmax."""
    form, vocabulary = inputs.get("logits", LogitTransform()), inputs.get("vocabulary", len(inputs["weight_VD"]))
    hidden, weight, bias = (None if inputs[name] is None else inputs[name].detach().double() for name in LEAVES)
    z = form.of(torch.nn.functional.linear(hidden, *head(weight, bias, vocabulary)))
    labels, weights, alpha, targets = Rows.of(*(inputs.get(name) for name in ROWS), torch.float64)
    logp, tail = targets.log_probabilities(temperature, torch.float64)
    kept = kept_ids(targets, vocabulary)
    student = (z / temperature).softmax(1)
    teacher = torch.zeros_like(z).scatter_add_(1, targets.ids(), logp.exp())
    if tail is not None:
        teacher += (z / temperature).masked_fill(kept, -torch.inf).softmax(1).nan_to_num() * tail.exp()[:, None]
    truth = torch.zeros_like(z).scatter_(1, labels.clamp(min=0)[:, None], 1)
    each = (1 - alpha)[:, None] * (z.softmax(1) + truth) + (alpha * temperature)[:, None] * (student + teacher)
    each *= form.scale * weights[:, None] * (1 + z.abs().amax() / temperature if len(z) else 1)
    return each @ weight[:vocabulary].abs(), each.T @ hidden.abs(), each.sum(dim=0)


def check_precision(inputs, temperature):
    """Errors are at most twice those of eager code, and what rounding its terms makes of each sum, without which the
    ratio of the errors of single numbers would be a matter of luck."""
    dtype = inputs["hidden_ND"].dtype
    truth, true_gradients = gradients("reference", widened(inputs), temperature)
    eager, eager_gradients = gradients("reference", inputs, temperature)
    ours, our_gradients = gradients("triton", inputs, temperature)
    in_fp32 = terms(inputs, temperature)
    unit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    cut = 2 if DEVICE == "cpu" and dtype == torch.bfloat16 else 1  # the interpreter does not round to the nearest bf16
    for mine, theirs, true in zip(ours, eager, truth, strict=True):
        assert abs(mine - true) <= 2 * abs(theirs - true) + 1e-6 * (1 + abs(true))
    for mine, theirs, true, term in zip(our_gradients, eager_gradients, true_gradients, in_fp32, strict=False):
        error, theirs_error = ((x.double() - true).norm() for x in (mine, theirs))
        assert error <= cut * (2 * theirs_error + unit * true.norm()) + 2.0**-23 * term.norm()


@given(
    rows=st.integers(0, 12),
    hidden=st.integers(1, 8),
    vocabulary=st.integers(2, 200),
    seed=st.integers(0, 1 << 30),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from(TEMPERATURES),
    bias=st.booleans(),
    weighted=st.booleans(),
    padding=st.sampled_from([0, 0, 1, 30]),
    logits=st.sampled_from(PLAIN_AND_NOT),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_against_float64(rows, vocabulary, temperature, data, **more):
    k = data.draw(st.integers(1, vocabulary))
    check_precision(problem(rows=rows, vocabulary=vocabulary, k=k, device=DEVICE, **more), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "temperature", "form"), [
    ("tail", 2.0, "plain"), ("tail", 1.0, "everything"), ("renormalised", 0.5, "everything"), ("counts", 4.0, "plain"),
])  # fmt: skip
def test_several_blocks_of_columns_and_of_kept_ids(mode, temperature, form, dtype):
    """9,000 columns are three blocks, 300 kept ids as well."""
    check_precision(problem(3, 4, 9000, 300, 5, mode, dtype, device=DEVICE, **FORMS[form]), temperature)


@pytest.mark.parametrize("vocabulary", [4095, 4096, 4097, 16, 17])
def test_last_partial_block(vocabulary):
    check_precision(problem(2, 4, vocabulary, 16, 6, "tail", torch.float32, device=DEVICE), 2.0)


@pytest.mark.parametrize("mode", MODES)
def test_ids_beyond_sixteen_bits(mode):
    inputs = problem(2, 3, 70_000, 200, 6, mode, torch.float32, device=DEVICE)
    assert inputs["targets"].ids().max() > 1 << 16
    found, wanted = (gradients(impl, inputs, 2.0) for impl in ("triton", "reference"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 40])
@pytest.mark.parametrize("mode", MODES)
def test_one_kept_id_and_all(k, mode):
    check_precision(problem(7, 4, 40, k, 7, mode, torch.float32, device=DEVICE), 2.0)


@pytest.mark.parametrize("form", FORMS)
def test_targets_of_no_columns_are_none(form):
    inputs = problem(9, 4, 11, 3, 4, "tail", torch.float32, device=DEVICE, **FORMS[form])
    empty = {name: x[:, :0] for name, x in vars(inputs["targets"]).items() if name.endswith("NK") and x is not None}
    targets = replace(inputs["targets"], **empty, count_N=inputs["targets"].count_N * 0)
    wanted = gradients("reference", inputs | {"targets": None, "alpha_N": None}, 2.0)
    for impl in ("reference", "chunked", "triton"):
        torch.testing.assert_close(gradients(impl, inputs | {"targets": targets}, 2.0), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_no_target_in_batch_is_plain_cross_entropy(form):
    inputs = problem(9, 4, 30, 3, 8, dtype=torch.float32, device=DEVICE, **FORMS[form])
    plain = inputs | {"targets": None, "alpha_N": None}
    found, wanted = (gradients(impl, plain, 2.0) for impl in ("triton", "reference"))
    torch.testing.assert_close(found, wanted)
    assert found[0].kl == 0
    torch.testing.assert_close(gradients("triton", inputs | {"alpha_N": None}, 2.0), found, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_rows_with_alpha_zero_beside_taught_rows_do_not_read_their_targets(mode):
    inputs = problem(12, 4, 30, 5, 9, mode, torch.float32, device=DEVICE)
    inputs["labels_N"] = inputs["labels_N"].clamp(min=0)
    inputs["alpha_N"] = torch.tensor([0.0, 0.5] * 6, device=DEVICE)
    targets = inputs["targets"]
    spoilt = targets.ids_NK.clone()
    spoilt[::2] = -1
    other = PackedTargets(**vars(targets) | {"ids_NK": spoilt})
    wanted = gradients("reference", inputs, 2.0)
    for given_targets in (targets, other):
        found = gradients("triton", inputs | {"targets": given_targets}, 2.0)
        torch.testing.assert_close(found, wanted)


def test_all_rows_ignored_keeps_the_graph_alive():
    inputs = problem(5, 4, 30, 3, 10, "tail", torch.float32, device=DEVICE, **FORMS["everything"])
    inputs["labels_N"] = torch.full_like(inputs["labels_N"], -100)
    result, grads = gradients("triton", inputs, 2.0)
    assert result.loss == 0 and result.loss.requires_grad and not any(x.any() for x in grads)


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("beyond", [30, 31, 47, 65_535])
def test_an_id_or_a_label_beyond_the_vocabulary_makes_the_loss_not_a_number(beyond, padding):
    """A kernel cannot raise; a loss that is no number is a step that is not applied, and is named in the log. Rows of
    padding, and what lies between the rows of the logits, are not tokens either."""
    inputs = problem(4, 4, 30, 3, 11, "tail", torch.float32, padding=padding, device=DEVICE)
    inputs |= {"labels_N": torch.tensor([1, 2, 3, 4], device=DEVICE), "alpha_N": torch.full((4,), 0.5, device=DEVICE)}
    assert torch.isfinite(ki_loss(**inputs, temperature=2.0, impl="triton").loss)
    labels = inputs["labels_N"].clone()
    labels[2] = beyond
    assert ki_loss(**inputs | {"labels_N": labels}, temperature=2.0, impl="triton").loss.isnan()
    ids = inputs["targets"].ids_NK.clone()
    ids[0, 2] = beyond if beyond < 1 << 15 else beyond - (1 << 16)
    targets = PackedTargets(**vars(inputs["targets"]) | {"ids_NK": ids})
    found, grads = gradients("triton", inputs | {"targets": targets}, 2.0)
    assert found.loss.isnan()
    torch.testing.assert_close(grads[0][1:], gradients("triton", inputs, 2.0)[1][0][1:])  # the other rows'


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_a_count_above_k_is_k(mode, impl):
    inputs = problem(9, 4, 30, 5, 3, mode, torch.float32, device=DEVICE)
    full = torch.full((9,), 5, dtype=torch.int32, device=DEVICE)
    ids = torch.arange(0, 45, dtype=torch.int16, device=DEVICE).view(9, 5) % 30
    tail = None if mode != "tail" else torch.full((9,), -1.0, device=DEVICE)
    whole = replace(inputs["targets"], ids_NK=ids, count_N=full, tail_N=tail)
    more = replace(whole, count_N=full + 7)
    inputs |= {"alpha_N": torch.full((9,), 0.5, device=DEVICE)}
    torch.testing.assert_close(
        gradients(impl, inputs | {"targets": more}, 2.0), gradients(impl, inputs | {"targets": whole}, 2.0)
    )


def test_whole_numbers_for_temperature_scale_and_cap():
    inputs = problem(6, 4, 30, 3, 12, "tail", torch.float32, device=DEVICE)
    for temperature, scale, cap in ((2, 1, 30), (1, 2, 0), (4, 2, 3)):
        whole = gradients("triton", inputs | {"logits": LogitTransform(scale, cap)}, temperature)
        real = gradients("triton", inputs | {"logits": LogitTransform(float(scale), float(cap))}, float(temperature))
        torch.testing.assert_close(whole, real, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- the implementation


def test_float64_is_refused():
    inputs = problem(4, 4, 30, 3, 13, device=DEVICE)
    with pytest.raises(ValueError, match=r'impl="triton" cannot run: .*float32, the hidden states are float64'):
        ki_loss(**inputs, impl="triton")


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = problem(4, 4, 30, 3, 13, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"cannot run: .*CUDA devices, the hidden states are on cpu"):
        ki_loss(**inputs, impl="triton")


def test_a_machine_without_triton_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(choice, "_installed", lambda: False)
    inputs = problem(4, 4, 30, 3, 13, dtype=torch.float32)
    with pytest.raises(ValueError, match=r'triton is not installed \(pip install "ki_ds\[gpu\]"\)'):
        ki_loss(**inputs, impl="triton")
    assert torch.isfinite(ki_loss(**inputs).loss)


def test_auto_takes_chunks_on_a_cpu_and_says_so_once(caplog):
    choice._say.cache_clear()
    inputs = problem(4, 4, 30, 3, 13, dtype=torch.float32)
    with caplog.at_level(logging.INFO, logger="ki_ds"):
        first, second = ki_loss(**inputs), ki_loss(**inputs)
    assert [record.getMessage() for record in caplog.records] == ["ki_loss runs: chunked (not on a GPU)"]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, ki_loss(**inputs, impl="chunked"), rtol=0, atol=0)


def test_a_gpu_without_triton_is_worth_a_warning(monkeypatch, caplog):
    choice._say.cache_clear()
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert choice.choose("ki_loss", "auto", on_gpu) == "triton"
    assert not caplog.records
    monkeypatch.setattr(choice, "_installed", lambda: False)
    assert choice.choose("ki_loss", "auto", on_gpu) == "chunked"
    assert "ki_loss runs: chunked (triton is not installed (pip install" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


# ------------------------------------------------------------------------------------------------------- compiling


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ki_ds.kernels import LogitTransform
from ki_ds.kernels.loss import triton_loss as t
from ki_ds.kernels.loss.reference import Rows
from loss_problems import problem

kernel = t.ki_loss_rows
tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
types = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.int16: "i16", torch.uint8: "u8"}


class Launches:
    def __getitem__(self, grid):
        return lambda *given, **more: setattr(self, "last", (given, more))


def compiled(dtype, sm, mode, temperature, cap, wide, gradient):
    inputs = problem(32, 4, 70_000 if wide else 64, 8, 1, mode or "tail", torch.float32)
    targets = inputs["targets"] if mode else None
    rows = Rows.of(inputs["labels_N"], targets, inputs["alpha_N"], None, torch.float32)
    gain = torch.ones(()) if dtype == "float16" else None
    t.ki_loss_rows = Launches()
    t.chunk_loss(torch.zeros(32, 70_000 if wide else 64, dtype=getattr(torch, dtype)), rows, temperature,
                 LogitTransform(cap=cap), gain, gradient)
    given, more = t.ki_loss_rows.last
    warps = more.pop("num_warps")
    types_of = ["*" + types[x.dtype] if isinstance(x, torch.Tensor) else {int: "i32", float: "fp32"}[type(x)]
                for x in given]
    signature = dict(zip(kernel.arg_names, types_of)) | {name: "constexpr" for name in more}
    assert list(signature) == kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name].startswith("*") or name == "padded"}
    constants = {(kernel.arg_names.index(name),): value for name, value in more.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    found = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", said.stdout)}
    return dict(usage=usage, shared=found.metadata.shared, ttir=found.asm["ttir"], ptx=found.asm["ptx"])


variants = json.loads(sys.argv[1])
params = {p.name: (p.is_constexpr, p.do_not_specialize) for p in kernel.params}
print(json.dumps(dict(params=params, compiled=[compiled(*variant) for variant in variants])))
"""
# dtype, architecture, kind of targets, τ, soft cap, ids beyond 16 bits, gradient
MAIN = [
    (dtype, sm, "tail", 2.0, 0.0, False, True) for sm in (80, 90) for dtype in ("bfloat16", "float16", "float32")
]  # fmt: skip
OTHERS = [
    *((dtype, 90, None, 1.0, 0.0, False, True) for dtype in ("bfloat16", "float16", "float32")),  # no targets at all
    ("bfloat16", 80, None, 1.0, 30.0, False, False),
    ("bfloat16", 80, "renormalised", 3.0, 30.0, True, True),
    ("bfloat16", 90, "tail", 1.0, 0.0, False, False),
    ("float16", 90, "counts", 2.0, 0.0, False, True),
]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """What a process that does not interpret makes of the kernel, for GPUs that need not be there."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("source")  # Triton reads a kernel's source from files
    (folder / "compile_loss.py").write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(folder / "compile_loss.py"), json.dumps(MAIN + OTHERS)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(MAIN)), ids=[f"{v[0]}-sm{v[1]}" for v in MAIN])
def test_compiles_without_spilling_and_with_wide_loads(compiler, number):
    found = compiler["compiled"][number]
    allowed = 16 if MAIN[number][0] == "float32" else 0  # on sm_80 ptxas stops at 40 registers, two pointers too few
    assert found["usage"]["LOCAL"] == 0 and found["usage"]["STACK"] <= allowed
    assert found["usage"]["REG"] <= 64  # two programs of 16 warps on a processor
    assert found["shared"] <= 1024
    assert "ld.global.v4.b32" in found["ptx"] and "st.global.v4.b32" in found["ptx"]  # 16 bytes a thread


@pytest.mark.parametrize("number", range(len(MAIN), len(MAIN + OTHERS)))
def test_rarer_variants_compile_without_spilling(compiler, number):
    assert compiler["compiled"][number]["usage"]["LOCAL"] == 0


def test_row_offsets_are_computed_in_64_bits(compiler):
    """16,385 rows of 131,072 logits are more than 2^31: the row's number is widened before anything else."""
    for variant, found in zip(MAIN + OTHERS, compiler["compiled"], strict=True):
        lines = found["ttir"].splitlines()
        (made,) = [line for line in lines if "get_program_id" in line]
        name = made.split("=")[0].strip()
        uses = [line for line in lines if line is not made and name in line.replace(",", " ").split()]
        assert any("extsi" in line and "i32 to i64" in line for line in uses)
        assert not any("muli" in line for line in uses), uses
        offsets = 1 if variant[2] is None else 2  # of the logits, and of the kept ids
        assert sum("muli" in line and ": i64" in line for line in lines) >= offsets


def test_number_of_rows_of_kept_ids_and_of_tokens_compile_nothing_anew(compiler):
    for name in ("rows", "stride_k", "vocabulary"):
        constant, general = compiler["params"][name]
        assert not constant and general, name
    constants = {name for name, (constant, _) in compiler["params"].items() if constant}
    assert constants == {"TAUGHT", "HIGH", "TAIL", "POWER", "CAP", "GAIN", "GRADIENT", "BLOCK", "BLOCK_K"}


def test_chunks_on_a_gpu_begin_where_pointers_stay_aligned():
    """Triton compiles anew where a pointer is no longer a multiple of 16 bytes: weights of 1,250 rows are 5,000."""
    hidden = SimpleNamespace(is_cuda=True, shape=(0, 768))
    for rows in (1, 15, 2047, 2049, 5000, 100_001):
        size = chunked.chunk_rows(rows, 50_000, hidden)
        assert size % 16 == 0 and size <= 2048
        assert -(-rows // size) == -(-rows // 2048)  # no more chunks for it


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
def test_on_a_gpu_one_kernel_serves_all_sizes():
    from ki_ds.kernels.loss.triton_loss import ki_loss_rows

    def kernels():
        return len(ki_loss_rows.device_caches[torch.cuda.current_device()][0])

    def run(rows, k, vocabulary):
        inputs = problem(rows, 8, vocabulary, k, 14, "tail", torch.bfloat16, device=DEVICE)
        torch.autograd.grad(ki_loss(**inputs, temperature=2.0, impl="triton").loss, leaves(inputs))

    run(64, 16, 1000)
    before = kernels()
    for rows, k, vocabulary in ((1, 1, 1000), (63, 7, 999), (5000, 100, 1003), (16, 16, 1024)):
        run(rows, k, vocabulary)
    assert kernels() == before
