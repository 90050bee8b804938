"""The Triton kernel: any shape against float64. On a GPU it runs as it is, on a CPU in Triton's interpreter; what the
other loss tests call `triton` is this kernel too."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.loss_problems import DEVICE, FORMS, MODES, TEMPERATURES, gradients, problem
from helpers.precision import check_loss
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.kernels import LogitTransform, PackedTargets, ki_loss
from ki_ds.kernels.loss import chunked

triton = pytest.importorskip("triton")
# the interpreter computes in numpy, which warns of what stays behind a mask
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(0.25, 0.0),
    LogitTransform(3.0, 0.0),
    LogitTransform(1.0, 2.0),
    LogitTransform(0.7, 5.0),
]


@given(
    rows=st.integers(0, 12),
    hidden=st.integers(1, 8),
    vocabulary=st.integers(2, 200),
    seed=st.integers(0, 1 << 30),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from(TEMPERATURES),
    bias=st.booleans(),
    padding=st.sampled_from([0, 0, 1, 30]),
    logit_transform=st.sampled_from(TRANSFORMS),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_against_float64(rows, vocabulary, temperature, data, **more):
    k = data.draw(st.integers(1, vocabulary))
    check_loss(problem(rows=rows, vocabulary=vocabulary, k=k, device=DEVICE, **more), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "temperature", "form"), [
    ("tail", 2.0, "plain"), ("tail", 1.0, "everything"), ("renormalised", 0.5, "everything"), ("counts", 4.0, "plain"),
])  # fmt: skip
def test_several_blocks_of_columns_and_of_kept_ids(mode, temperature, form, dtype):
    """9,000 columns are three blocks, 300 kept ids as well."""
    check_loss(problem(3, 4, 9000, 300, 5, mode, dtype, device=DEVICE, **FORMS[form]), temperature)


@pytest.mark.parametrize("vocabulary", [4095, 4096, 4097, 16, 17])
def test_last_partial_block(vocabulary):
    check_loss(problem(2, 4, vocabulary, 16, 6, "tail", torch.float32, device=DEVICE), 2.0)


@pytest.mark.parametrize("mode", MODES)
def test_ids_beyond_sixteen_bits(mode):
    inputs = problem(2, 3, 70_000, 200, 6, mode, torch.float32, device=DEVICE)
    assert inputs["targets"].ids().max() > 1 << 16
    found, wanted = (gradients(impl, inputs, 2.0) for impl in ("triton", "reference"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 40])
@pytest.mark.parametrize("mode", MODES)
def test_one_kept_id_and_all(k, mode):
    check_loss(problem(7, 4, 40, k, 7, mode, torch.float32, device=DEVICE), 2.0)


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
        given, floats = LogitTransform(scale, cap), LogitTransform(float(scale), float(cap))
        whole = gradients("triton", inputs | {"logit_transform": given}, temperature)
        real = gradients("triton", inputs | {"logit_transform": floats}, float(temperature))
        torch.testing.assert_close(whole, real, rtol=0, atol=0)


def test_chunks_on_a_gpu_begin_where_pointers_stay_aligned():
    """Triton compiles anew where a pointer is no longer a multiple of 16 bytes: weights of 1,250 rows are 5,000."""
    hidden = SimpleNamespace(is_cuda=True, shape=(0, 768))
    for rows in (1, 15, 2047, 2049, 5000, 100_001):
        size = chunked.chunk_rows(rows, 50_000, hidden)
        assert size % 16 == 0 and size <= 2048
        assert -(-rows // size) == -(-rows // 2048)  # no more chunks for it
