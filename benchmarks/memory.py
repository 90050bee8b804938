"""Measures how much memory training takes on a rank, beside what `ki_ds.planning.memory` says.

    deepspeed --num_accelerators 2 --no_local_rank benchmarks/memory.py
    deepspeed --num_accelerators 2 --no_local_rank benchmarks/memory.py --architecture gpt-base --vocabulary 50265

Two steps of two micro-batches each. Measured is the sum of what torch has allocated and not freed, at its highest, as
its own profiler reports every allocation: what `max_memory_allocated` is on a GPU. Memory that is never touched counts
too, so buckets are set to a size that is filled (1.2 million elements, or --bucket).
"""

from __future__ import annotations

import argparse
import gc
import json
from typing import Any

import torch
from tabulate import tabulate

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.engine.config import EngineConfig
from ki_ds.engine.engine import Engine
from ki_ds.experiment.schema import Train
from ki_ds.launch import distributed
from ki_ds.models import architectures, hugging_face
from ki_ds.models.language_model import LanguageModel
from ki_ds.planning import memory
from ki_ds.planning.activations import Pass, kept

SMALL = {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "n_head": 4}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, gradients fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
MICRO_BATCHES = 2


def main() -> None:
    """One line a case, on rank 0."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--architecture", type=lambda x: json.loads(x) if x.startswith("{") else x, default=SMALL)
    given.add_argument("--vocabulary", type=int, default=4000)
    given.add_argument("--sequences", type=int, default=2)
    given.add_argument("--length", type=int, default=64)
    given.add_argument("--dropout", type=float, default=0.1)
    given.add_argument("--bucket", type=int, default=1_200_000)
    given.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    given.add_argument("--precisions", nargs="*", default=list(PRECISIONS), choices=PRECISIONS)
    a = given.parse_args()
    distributed.quiet()
    distributed.init_distributed()
    objective = architectures.ARCHITECTURES[a.architecture][0] if isinstance(a.architecture, str) else "clm"
    tokenizer = tokenizers.expected(a.vocabulary, objective)
    config = architectures.configuration(a.architecture, objective, tokenizer, a.length, "architecture")
    architectures.set_dropout(config, a.dropout)
    rows = []
    for stage in a.stages:
        for precision in a.precisions:
            if stage == 0 and precision.startswith("bf16"):
                continue  # refused: DeepSpeed takes a wrong first step there
            zero = {"stage": stage, "reduce_bucket_size": a.bucket, "allgather_bucket_size": a.bucket}
            engine = EngineConfig.read({"zero_optimization": zero} | PRECISIONS[precision], precision)
            measured, parameters = measure(config, objective, a, engine)
            said = expected(config, objective, a, engine)
            if distributed.rank() == 0:
                row = [stage, precision, distributed.world_size(), measured / 1e6, said.device / 1e6]
                rows.append([*row, said.device / measured, measured / parameters])
                print(tabulate(rows[-1:], tablefmt="pipe", floatfmt=".2f"), flush=True)
    if distributed.rank() == 0:
        head = [
            "stage",
            "precision",
            "ranks",
            "measured MB",
            "estimated MB",
            "estimated / measured",
            "bytes a parameter",
        ]
        print(tabulate(rows, head, tablefmt="pipe", floatfmt=("", "", "", ".1f", ".1f", ".2f", ".1f")), flush=True)


def expected(config: Any, objective: str, a: argparse.Namespace, engine: EngineConfig) -> memory.Estimate:
    """What `ki_ds.planning.memory` says."""
    model = memory.outlined(config, objective)
    how = Pass.of(a.sequences, a.length, engine, gpu=torch.cuda.is_available())
    tokens = a.sequences * a.length
    micro = memory.Micro(tokens, tokens, 0, kept(config, objective, how))
    return memory.estimate(model, micro, distributed.world_size(), engine, how.gpu)


def measure(config: Any, objective: str, a: argparse.Namespace, chosen: EngineConfig) -> tuple[float, int]:
    """(bytes that torch had allocated, at the highest, parameters) from the making of the model on."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        student = LanguageModel(hugging_face.new_model(config, objective, seed=1), a.vocabulary)
        parameters = sum(p.numel() for p in student.parameters())
        size = a.sequences * MICRO_BATCHES * distributed.world_size()
        settings = Train(on={"a": 1.0}, steps=10, batch_size=size, micro_batch_size=a.sequences, learning_rate=1e-4)
        plan = BatchLayout(size, a.sequences, distributed.rank(), distributed.world_size())
        engine = Engine(student, settings, plan, chosen)
        engine.deepspeed.train()
        for _ in range(2):
            for micro in range(MICRO_BATCHES):
                ids = torch.randint(5, a.vocabulary, (a.sequences, a.length))
                rows = torch.arange(ids.numel())
                result = engine.deepspeed(ids, rows, torch.roll(ids.flatten(), -1), None, None, 1.0)
                engine.deepspeed.backward(result.loss / ids.numel())
                del result
                if micro < MICRO_BATCHES - 1:
                    engine.deepspeed.step()
            engine.step(1e-4)
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    engine.deepspeed.destroy()
    return most, parameters


if __name__ == "__main__":
    main()
