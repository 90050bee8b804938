"""What the compiled form of the Triton kernels shows without a GPU; with one, see `tests/gpu`. Their numbers are
compared in `loss/` and `select/`."""

import json
import os
import subprocess
import sys

import pytest
from helpers.marks import NEEDS_TRITON

pytestmark = [NEEDS_TRITON, pytest.mark.slow]

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
# dtype, architecture, temperatures, soft cap
SELECTION = [
    *((dtype, sm, 2, 0.0) for sm in (80, 90) for dtype in ("float16", "bfloat16", "float32")),
    ("bfloat16", 80, 1, 0.0), ("bfloat16", 90, 1, 30.0), ("float16", 90, 4, 0.0), ("bfloat16", 80, 8, 30.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """What one process, which does not interpret, makes of both kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": os.pathsep.join(sys.path)}
    variants = json.dumps({"loss": MAIN + OTHERS, "selection": SELECTION})
    command = [sys.executable, "-W", "ignore", "-m", "helpers.compiling", variants]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(MAIN)), ids=[f"{v[0]}-sm{v[1]}" for v in MAIN])
def test_loss_compiles_without_spilling_and_with_wide_loads(compiler, number):
    found = compiler["loss"][number]
    allowed = 16 if MAIN[number][0] == "float32" else 0  # on sm_80 ptxas stops at 40 registers, two pointers too few
    assert found["LOCAL"] == 0 and found["STACK"] <= allowed
    assert found["REG"] <= 64  # two programs of 16 warps on a processor
    assert found["shared"] <= 1024
    assert "ld.global.v4.b32" in found["ptx"] and "st.global.v4.b32" in found["ptx"]  # 16 bytes a thread


def test_rarer_variants_of_the_loss_compile_without_spilling(compiler):
    for variant, found in zip(OTHERS, compiler["loss"][len(MAIN) :], strict=True):
        assert found["LOCAL"] == 0, variant


def test_row_offsets_are_computed_in_64_bits(compiler):
    """16,385 rows of 131,072 logits are more than 2^31: the row's number is widened before anything else."""
    for variant, found in zip(MAIN + OTHERS, compiler["loss"], strict=True):
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
        constant, general = compiler["loss parameters"][name]
        assert not constant and general, name
    constants = {name for name, (constant, _) in compiler["loss parameters"].items() if constant}
    assert constants == {"TAUGHT", "HIGH", "TAIL", "POWER", "CAP", "GRADIENT", "BLOCK", "BLOCK_K"}


def test_selection_compiles_without_spills_with_wide_loads_and_once_for_all_sizes(compiler):
    for variant, found in zip(SELECTION, compiler["selection"], strict=True):
        use = {name: found[name] for name in ("REG", "STACK", "LOCAL")}
        assert use["LOCAL"] == use["STACK"] == 0 and use["REG"] <= 128, (variant, use)
        assert "ld.global.v4.b32" in found["ptx"], variant
    parameters = compiler["selection parameters"]
    assert [name for name, (constant, _) in parameters.items() if constant] == ["T", "BLOCK", "TILE", "CAP"]
    assert {"V", "K", "room", "scale", "cap"} <= {name for name, (_, general) in parameters.items() if general}
