"""What a model keeps of a forward pass for the backward pass, counted on tensors that have a shape and no memory.

Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models, section 4.1) count by hand what
a layer like BERT's or GPT's keeps in half precision: 34 B S D bytes, and 5 heads B S² more where attention scores are
written out (B sequences of S tokens, D hidden size). With fused attention RoBERTa comes out the same here. But an
activation function that is composed of several operations (GPT-2's GELU in transformers) or gated keeps more, and other
kinds of layers are built otherwise. So the model itself is asked.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ki_ds.engine.config import EngineConfig
from ki_ds.models.flops import outline
from ki_ds.models.language_model import Catch, holder


class Kept(NamedTuple):
    """Bytes of a micro-batch between its forward and its backward pass on one rank; the loss is not in it."""

    everything: int
    inputs: int  # of the layers: what is kept where the rest is computed again
    layer: int  # of one layer, while it is computed again
    traced: bool = True  # else the model asks for values, which shapes do not have, and nothing is known


class Pass(NamedTuple):
    """How a forward pass is computed."""

    sequences: int
    length: int
    dtype: torch.dtype  # of the weights
    autocast: torch.dtype | None
    gpu: bool

    @classmethod
    def of(cls, sequences: int, length: int, engine: EngineConfig, gpu: bool) -> Pass:
        """Under an engine JSON; half precision counts alike, whichever it is."""
        dtype = torch.float32 if engine.precision == "fp32" else torch.bfloat16
        return cls(sequences, length, dtype, torch.bfloat16 if engine.autocast else None, gpu)


def kept(config: Any, objective: str, how: Pass) -> Kept:
    """The backbone's activations. `config`: a Hugging Face configuration with the dropout of training."""
    try:
        everything = saved_bytes(config, objective, how)
    except Exception:  # each model that asks for values has its own
        return Kept(0, 0, 0, traced=False)
    layers = config.num_hidden_layers
    inputs = layers * how.sequences * how.length * config.hidden_size * how.dtype.itemsize
    return Kept(everything, inputs, everything // max(layers, 1))


def saved_bytes(config: Any, objective: str, how: Pass) -> int:
    """Bytes of what autograd saves in a forward pass up to the head; memory that several tensors share, once."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[int, Tensor] = {}  # they stay alive, or others would come to lie in their places

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage()._cdata) not in own:
            found[place] = tensor
        return tensor

    with FakeTensorMode(), contextlib.ExitStack() as stack:
        model = outline(config, objective, how.dtype, "cpu").train()
        linear = model.get_output_embeddings()
        (parent,), name = holder(model, linear)
        setattr(parent, name, Catch(linear))
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        ids = torch.zeros(how.sequences, how.length, dtype=torch.int64)
        stack.enter_context(_AsThere(how.gpu))
        if how.autocast:
            stack.enter_context(torch.autocast("cpu", how.autocast))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        model(input_ids=ids, use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


class _AsThere(TorchFunctionMode):
    """Attention by a fused kernel, which a CPU has only without dropout. A GPU's masks of dropout are bytes, while a
    CPU's are as wide as what they mask."""

    def __init__(self, gpu: bool):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), args, strict=False)) | kwargs
            if self.gpu or not given.get("dropout_p"):
                return _FusedAttention.apply(given["query"], given["key"], given["value"])
        if func is functional.dropout and self.gpu:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            p, training = given.get("p", 0.5), given.get("training", True)
            return torch.native_dropout(given["input"], p, True)[0] if p and training else given["input"]
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):  # which has shapes in bf16 only
            return _Experts.apply(args[0], args[1])
        return func(*args, **kwargs)


class _Experts(torch.autograd.Function):
    """The products of tokens [T, D], sorted by expert, with their experts' weights [E, D, F]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return tokens.new_empty(tokens.shape[0], weight.shape[-1])


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: its inputs, its output, and a normaliser a row. q, k, v: [B, heads, S, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, _ = q.shape
        mixed = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mixed, q.new_empty(batch, heads, length, dtype=torch.float32))
        return mixed
