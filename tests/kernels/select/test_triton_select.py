"""What of the teacher's kernel only its compiled form shows; its numbers are compared in `test_select_targets.py`.

Compiled for GPUs in a process of its own, without the interpreter that the other tests run it in.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.loss_problems import NEEDS_TRITON

from ki_ds.kernels.select.eager import select_targets
from ki_ds.targets.selection import Selection

COMPILE = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ki_ds.kernels.select import triton_select as at

kernel, tool = at.select_kernel, Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
pointers = {"inverse_ptr": "*fp32", "listed_ptr": "*i32", "ids_ptr": "*i32", "kept_ptr": "*fp32", "rest_ptr": "*fp32"}
floats = {"scale": "fp32", "cap": "fp32"}
found = []
for capability, kind, temperatures, cap in json.loads(sys.argv[1]):
    constants = {"T": temperatures, "BLOCK": at.LANES, "TILE": at.tile(temperatures), "CAP": cap}
    types = {"x_ptr": f"*{kind}", **pointers, **floats, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if "ptr" in name or name == "stride"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": at.WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    use = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
    found.append({**use, "wide": made.asm["ptx"].count("ld.global.v4.b32")})
constant = [p.name for p in kernel.params if p.is_constexpr]
varying = [p.name for p in kernel.params if p.do_not_specialize]
print(json.dumps({"kernels": found, "constant": constant, "varying": varying}))
"""
FORMS = [
    *((capability, kind, 2, False) for capability in (80, 90) for kind in ("fp16", "bf16", "fp32")),
    (80, "bf16", 1, False), (90, "bf16", 1, True), (90, "fp16", 4, False), (80, "bf16", 8, True),
]  # fmt: skip


@NEEDS_TRITON
def test_compiles_without_spills_with_wide_loads_and_once_for_all_sizes():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, json.dumps(FORMS)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout.splitlines()[-1])
    for form, use in zip(FORMS, found["kernels"], strict=True):
        assert use["LOCAL"] == use["STACK"] == 0 and use["REG"] <= 128 and use["wide"] > 0, (form, use)
    assert found["constant"] == ["T", "BLOCK", "TILE", "CAP"]
    assert {"V", "K", "room", "scale", "cap"} <= set(found["varying"])


@NEEDS_TRITON
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter compiles nothing")
def test_no_recompilation_for_other_sizes():
    from ki_ds.kernels.select.triton_select import select_kernel

    compiled = set()
    for rows, vocabulary, k in [(1, 50, 1), (3, 16, 16), (7, 5000, 17), (40, 50_265, 100), (16, 1024, 512)]:
        hidden, weight = (torch.randn(n, 8, device="cuda") for n in (rows, vocabulary))
        labels = torch.zeros(rows, dtype=torch.int64, device="cuda")
        select_targets(hidden, weight, None, labels, Selection("top_k", k), 1 / 16, impl="triton")
        compiled.add(len(select_kernel.device_caches[torch.cuda.current_device()][0]))
    assert len(compiled) == 1


def test_float64_is_refused():
    hidden, weight = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(9, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cannot run: they compute in float32, the hidden states are float64"):
        select_targets(hidden, weight, None, torch.zeros(2).long(), Selection("top_k", 2), 1 / 16, impl="triton")
