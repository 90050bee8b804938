"""The Triton kernels compiled for GPUs that need not be there, in a process that does not interpret them.

python -m helpers.compiling '{"loss": […], "selection": […]}'      # from tests/; prints JSON
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from helpers.loss_problems import problem
from ki_ds.kernels import LogitTransform
from ki_ds.kernels.loss import triton_loss
from ki_ds.kernels.loss.reference import Rows
from ki_ds.kernels.select import triton_select

LOSS, SELECTION = triton_loss.ki_loss_rows, triton_select.select_kernel
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.int16: "i16", torch.uint8: "u8"}  # fmt: skip


class Launch:
    """In a kernel's place: keeps what it is launched with."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *given, **constants):
        self.given, self.constants = given, constants


def compiled(kernel, launch, stride, sm):
    """A kernel for an architecture, as it was launched; pointers and the row's stride are aligned."""
    constants = dict(launch.constants)
    warps = constants.pop("num_warps")
    kinds = ["*" + TYPES[x.dtype] if isinstance(x, torch.Tensor) else {int: "i32", float: "fp32"}[type(x)]
             for x in launch.given]  # fmt: skip
    signature = dict(zip(kernel.arg_names, kinds, strict=False)) | dict.fromkeys(constants, "constexpr")
    assert list(signature) == kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
               if kind.startswith("*") or name == stride}  # fmt: skip
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    found = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return usage | {"shared": found.metadata.shared, "ttir": found.asm["ttir"], "ptx": found.asm["ptx"]}


def loss(dtype, sm, mode, temperature, cap, wide, gradient):
    """As `chunk_loss` launches it."""
    vocabulary = 70_000 if wide else 64
    inputs = problem(32, 4, vocabulary, 8, 1, mode or "tail", torch.float32)
    rows = Rows.of(inputs["labels_N"], inputs["targets"] if mode else None, inputs["alpha_N"], torch.float32)
    triton_loss.ki_loss_rows = launch = Launch()
    product = torch.zeros(32, vocabulary, dtype=getattr(torch, dtype))
    triton_loss.chunk_loss(product, rows, temperature, LogitTransform(cap=cap), 1.0, gradient)
    return compiled(LOSS, launch, "padded", sm)


def selection(dtype, sm, temperatures, cap):
    """As `largest` launches it."""
    triton_select.select_kernel = launch = Launch()
    product = torch.zeros(2, 64, dtype=getattr(torch, dtype))
    triton_select.largest(product, 8, range(1, temperatures + 1), LogitTransform(cap=cap))
    return compiled(SELECTION, launch, "stride", sm)


def main(variants):
    found = {"loss": [loss(*one) for one in variants["loss"]]}
    found["selection"] = [selection(*one) for one in variants["selection"]]
    for name, kernel in (("loss", LOSS), ("selection", SELECTION)):
        found[f"{name} parameters"] = {p.name: (p.is_constexpr, p.do_not_specialize) for p in kernel.params}
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
