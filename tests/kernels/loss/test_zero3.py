"""The loss on a head that ZeRO-3 partitions over two processes, against plain torch in one."""

import functools
import importlib.util

import pytest
import torch
from helpers.loss_problems import problem
from helpers.marks import NEEDS_TRITON
from helpers.models import tiny_model
from helpers.ranks import run_ranks

from ki_ds.launch import distributed
from ki_ds.models import language_model
from ki_ds.models.language_model import LanguageModel

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

VOCABULARY, LENGTH, WORLD = 60, 10, 2
CASES = [(True, "chunked"), (False, "chunked"), (True, "triton")]  # tied embeddings?, implementation


def student(tied):
    given = {"vocabulary": VOCABULARY, "length": LENGTH, "n_layer": 1, "tie_word_embeddings": tied}
    return LanguageModel(tiny_model("gpt2", seed=1, **given), VOCABULARY)


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


def by_two():
    """What a rank found, by case."""
    cases = [case for case in CASES if case[1] != "triton" or importlib.util.find_spec("triton")]
    return {case: by_one_of_two(*case) for case in cases}


@pytest.fixture(scope="module")
def both():
    """What rank 0 of two processes found, by case."""
    return run_ranks(by_two, WORLD)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "impl"), [*CASES[:2], pytest.param(*CASES[2], marks=NEEDS_TRITON)])
def test_partitioned_head_equals_one_process(both, tied, impl):
    """In training, over two micro-batches, and in evaluation."""
    found, wanted = both[tied, impl], by_one_process(student(tied))
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["evaluated"], wanted["loss"], rtol=1e-6, atol=0)
    assert wanted["gradients"].keys() == found["gradients"].keys()
    torch.testing.assert_close(found["gradients"], wanted["gradients"], rtol=1e-5, atol=1e-6)
