"""The loss on a head that ZeRO-3 partitions over two processes, against plain torch in one.

This file is also what each of the two processes runs.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import environment
from helpers.loss_problems import NEEDS_TRITON, problem

from ki_ds.corpus.tokenizer import expected
from ki_ds.launch import distributed
from ki_ds.models import architectures, hugging_face, language_model
from ki_ds.models.language_model import LanguageModel

VOCABULARY, LENGTH, WORLD = 60, 10, 2
CASES = [(True, "chunked"), (False, "chunked"), (True, "triton")]  # tied embeddings?, implementation


def student(tied):
    sizes = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "tie_word_embeddings": tied}
    config = architectures.configuration(sizes, "clm", expected(VOCABULARY, "clm"), LENGTH, "m")
    architectures.set_dropout(config, 0.0)
    return LanguageModel(hugging_face.new_model(config, "clm", seed=1), VOCABULARY)


def batches(rank):
    """Two micro-batches; ranks and micro-batches have different numbers of targets, one of them none with a label."""
    found = []
    for micro, rows in enumerate(((7, 3), (4, 8))[rank]):
        seed = 10 * rank + micro
        given = problem(rows, 1, VOCABULARY, 6, seed, "tail", torch.float32)
        if (rank, micro) == (1, 0):
            given["labels_N"] = torch.full((rows,), -100)
        g = torch.Generator().manual_seed(seed)
        where = torch.randperm(2 * LENGTH, generator=g)[:rows]
        ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=g)
        found.append((ids, where, given["labels_N"], given["targets"], given["alpha_N"], 2.0))
    return found


def by_one_process(model):
    """The mean over ranks and micro-batches of their losses; its gradients; the sum of the losses."""
    losses = [model(*micro).loss for rank in range(WORLD) for micro in batches(rank)]
    (sum(losses) / len(losses)).backward()
    return {"loss": sum(losses).detach(), "gradients": {name: p.grad for name, p in model.named_parameters()}}


def by_one_of_two(tied, impl):
    """The same from the engine, after the micro-batches of both ranks have been accumulated; and in evaluation."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    original = language_model.ki_loss
    language_model.ki_loss = functools.partial(original, impl=impl)
    try:
        model = student(tied)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        assert engine.module.head.weight.numel() == 0  # partitioned: it exists while the head runs
        total = torch.zeros(())
        first, second = batches(distributed.rank())
        for micro in (first, second):
            loss = engine(*micro).loss
            engine.backward(loss)
            if micro is first:
                engine.step()
            total += loss.detach()
        found = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
        engine.eval()
        with torch.no_grad():
            evaluated = engine(*first).loss + engine(*second).loss
        sums = distributed.all_reduce(torch.stack([total, evaluated]))
        return {"loss": sums[0], "evaluated": sums[1], "gradients": found}
    finally:
        language_model.ki_loss = original


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What rank 0 of two processes found, by case."""
    folder = tmp_path_factory.mktemp("zero3")
    port = str(distributed.free_port())
    shared = environment() | {
        "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRITON_INTERPRET": "1",
        "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder / "found.pt")],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=200)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * WORLD, "\n".join(said)
    return torch.load(folder / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "impl"), [*CASES[:2], pytest.param(*CASES[2], marks=NEEDS_TRITON)])
def test_partitioned_head_equals_one_process(both, tied, impl):
    """In training, over two micro-batches, and in evaluation."""
    found, wanted = both[tied, impl], by_one_process(student(tied))
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["evaluated"], wanted["loss"], rtol=1e-6, atol=0)
    assert wanted["gradients"].keys() == found["gradients"].keys()
    torch.testing.assert_close(found["gradients"], wanted["gradients"], rtol=1e-5, atol=1e-6)


def main(path):
    import importlib.util

    distributed.init_distributed()
    torch.set_num_threads(1)
    cases = [case for case in CASES if case[1] != "triton" or importlib.util.find_spec("triton")]
    found = {case: by_one_of_two(*case) for case in cases}
    if distributed.rank() == 0:
        torch.save(found, path)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
