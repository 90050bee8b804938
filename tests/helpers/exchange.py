"""A small corpus, a teacher elsewhere that answers about it, and `ki-ds targets` in this process."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.commands import here
from helpers.documents import documentation
from helpers.folders import forge
from ki_ds.targets.manifest import open_folder
from ki_ds.targets.shard import Shard, pack_block, write_shard

TRAIN = {"on": {"a": 1.0}, "steps": 4, "batch_size": 8, "learning_rate": 1e-2, "dropout": 0.0}
EXPERIMENT = {
    "name": "tools",
    "objective": "mlm",
    "sequence_length": 24,
    "masking": {"views": 2, "probability": 0.08},  # some sequences have no row at all
    "tokenizer": {"train": {"vocabulary_size": 400, "on": ["a"]}},
    "corpora": {"a": {"sources": [documentation("logging")], "validation": 0.1}},
    "models": {
        "big": {"targets": {"a": "big@a"}},
        "student": {
            "architecture": {
                "model_type": "roberta", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
                "intermediate_size": 16,
            },
            "train": TRAIN,
            "inherit": {"from": {"a": "big"}, "alpha_T": 1.0, "targets": {"k": 20}},
        },
    },
    "samples_per_shard": 16,
}  # fmt: skip
SAMPLES = 48


def answer(questions, k=20, seed=0, truth=True):
    """Rows of a teacher that says something of its own about every question, as a table."""
    rng = np.random.default_rng(seed)
    rows = []
    for one in pq.read_table(questions).to_pylist():
        for index, token in zip(one["index"], one["token"], strict=True):
            logits = rng.normal(0, 3, 400)
            logits[token] += 5
            logp = logits - np.log(np.exp(logits).sum())
            ids = np.argsort(-logp)[: int(rng.integers(1, k + 1))]
            row = {"sample": one["sample"], "index": index, "token": token}
            row |= {"ids": ids.tolist(), "logprobs": logp[ids].tolist()}
            rows.append(row | ({"truth": float(logp[token])} if truth else {}))
    return rows


def save(rows, path):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def run(*arguments, code=0):
    """What a `ki-ds targets` command says, in this process: each would take seconds to start."""
    return here("targets", *arguments, code=code)


def imported(world, rows, tmp_path, code=2):
    """What `import` says of other rows."""
    path = save(rows, tmp_path / "answers.parquet")
    arguments = ("--corpus", "a", "--workdir", world[0] / "work")
    said = run("import", world[1], path, tmp_path / "made@a", *arguments, code=code)
    assert "Traceback" not in said
    if code:
        assert not (tmp_path / "made@a" / "manifest.json").exists()
    return said


def damage(folder, number):
    """Flip a bit in the middle of the frames of a shard; its path."""
    path = sorted(folder.glob("*.kit"))[number]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))
    return path


def vouch(folder):
    """Let the manifest say what its shards are now, as somebody does who makes a whole folder."""
    digests = {path.name: Shard(path).digest for path in sorted(folder.glob("*.kit"))}
    forge(folder, digests=digests, files={path.name: path.stat().st_size for path in sorted(folder.glob("*.kit"))})


def rewritten(folder, number, change):
    """Write a shard again with right checksums after `change(planes, digests)`, also those of the manifest."""
    shards = open_folder(folder)
    shard = shards.shard(number)
    start, end = shard.header.start, shard.header.end
    read = shards.read(np.arange(start, end))
    planes, digests = read.planes, np.array(read.digests, np.uint64)
    change(planes, digests)
    block = pack_block(shards.codec, planes, np.cumsum(read.rows), digests, np.zeros(len(planes)))
    write_shard(folder / shards.name(number), shards.header, start, [block])
    vouch(folder)
