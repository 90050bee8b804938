"""Works out which engine JSON trains which model on which GPUs: the table of docs/engine.md. Nothing is measured.

    python benchmarks/fits.py

Every cell names the first of ds_configs/engine in the order of `ki-ds plan`, in bf16, with GiB on the GPU; *ck*: only
with activation checkpointing; *h*: GiB of host memory a rank; *n*: GiB of NVMe. Targets of K = 100, dropout 0.1.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from tabulate import tabulate

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.engine.config import EngineConfig
from ki_ds.models import architectures
from ki_ds.planning import memory
from ki_ds.planning.activations import Kept, Pass, kept
from ki_ds.planning.plan import in_order, shipped_engines
from ki_ds.planning.room import GIB, Room

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "tie_word_embeddings": False,
}  # fmt: skip
GPT = {"model_type": "gpt2", "n_embd": 2048, "n_layer": 24, "n_head": 16}
# name, architecture, objective, vocabulary, sequence length, share of tokens that are rows, sequences
CASES: list[tuple[str, Any, str, int, int, float, int]] = [
    ("roberta-base", "roberta-base", "mlm", 50265, 512, 0.15, 32),
    ("gpt-base", "gpt-base", "clm", 50257, 1024, 1.0, 8),
    ("roberta-large", "roberta-large", "mlm", 50265, 512, 0.15, 32),
    ("GPT-2, 24 × 2,048", GPT, "clm", 50257, 2048, 1.0, 4),
    ("Llama, 32 × 4,096", LLAMA, "clm", 32000, 2048, 1.0, 1),
]
RANKS = (1, 8, 64)
SIZES = (24, 40, 80)  # GB
# as much as bf16; others with keys that one adds; and what saves by rounding
LEFT_OUT = ("fp16", "extras", "cluster", "states", "zeropp")


def main() -> None:
    shipped = {name: c for name, c in shipped_engines().items() if not any(word in name for word in LEFT_OUT)}
    engines = in_order(shipped, shipped["zero1_bf16.json"])
    rows = []
    for name, architecture, objective, vocabulary, length, share, sequences in CASES:
        config = architectures.configuration(
            architecture, objective, tokenizers.expected(vocabulary, objective), length, name
        )
        architectures.set_dropout(config, 0.1)
        model = memory.outlined(config, objective)

        @cache
        def activations(how: Pass, config: Any = config, objective: str = objective) -> Kept:
            return kept(config, objective, how)

        def need(engine: EngineConfig, ranks: int) -> memory.Estimate:
            one, two = (activations(Pass.of(count, length, engine, True)) for count in (1, 2))  # noqa: B023
            held = Kept(*(a + (sequences - 1) * (b - a) for a, b in zip(one, two, strict=True)))  # noqa: B023
            micro = memory.Micro(sequences * length, int(sequences * length * share), 100, held)  # noqa: B023
            return memory.estimate(model, micro, ranks, engine, True)  # noqa: B023

        for ranks in RANKS:
            cells = []
            for size in SIZES:
                room = Room(True, size * GIB)
                ways = ((False, ""), (True, " *ck*"))
                tries = [(e, replace(c, activation_checkpointing=on), mark) for on, mark in ways for e, c in engines]
                found = next(((e, n, m) for e, c, m in tries if room.holds(n := need(c, ranks))), None)
                cells.append("none" if found is None else said(*found))
            first = ranks == RANKS[0]
            about = [name, f"{model.parameters / 1e6:,.0f} M", f"{sequences} × {length:,}"] if first else [""] * 3
            rows.append([*about, ranks, *cells])
    heads = ["model", "parameters", "sequences × length", "GPUs", *(f"{size} GB" for size in SIZES)]
    print(tabulate(rows, heads, tablefmt="github"))


def said(engine: str, need: memory.Estimate, mark: str) -> str:
    """A cell."""
    parts = [f"{engine.removesuffix('.json')}{mark}, {need.device / GIB:.1f}"]
    parts += [f"*{letter}* {x / GIB:.0f}" for letter, x in (("h", need.host), ("n", need.nvme)) if x]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
