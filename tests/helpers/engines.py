"""DeepSpeed engines around a tiny model, in this process as the one rank of a world of its own."""

import pytest
import torch

from helpers import commands
from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.engine.config import EngineConfig
from ki_ds.engine.engine import Engine
from ki_ds.experiment.schema import Train
from ki_ds.launch import distributed
from ki_ds.models import architectures, hugging_face
from ki_ds.models.language_model import LanguageModel
from ki_ds.training.batches import Batch, MicroBatch
from ki_ds.training.loop import Sums, accumulate
from ki_ds.training.run import TrainRun

VOCABULARY, LENGTH = 300, 16
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def world():
    """The process group is joined once; DeepSpeed does not survive its end."""
    with pytest.MonkeyPatch.context() as patch:
        commands.no_rank(patch)
        distributed.init_distributed()
        yield


def settings(**changes):
    given = dict(on={"a": 1.0}, steps=20, batch_size=4, micro_batch_size=2, learning_rate=1e-2, dropout=0.0)
    return Train(**given | changes)


def new_engine(stage, half=False, fp16=None, bucket=None, **changes):
    """`half` for bf16, or what `fp16` holds beside "enabled"; `bucket`: elements reduced at once."""
    zero = {"stage": stage} | ({"reduce_bucket_size": bucket} if bucket else {})
    given = {"zero_optimization": zero} | ({"bf16": {"enabled": True}} if half else {})
    given |= {} if fp16 is None else {"fp16": {"enabled": True, **fp16}}
    return engine_of(given, **changes)


def new_student(dropout=0.0):
    config = architectures.configuration("gpt-tiny", "clm", tokenizers.expected(VOCABULARY, "clm"), LENGTH, "m")
    architectures.set_dropout(config, dropout)
    return LanguageModel(hugging_face.new_model(config, "clm", seed=1), VOCABULARY)


def engine_of(given, dropout=0.0, layout=None, **changes):
    """Of an engine JSON; two micro-batches a step, on one rank."""
    layout = layout or BatchLayout(batch_size=4, micro_batch_size=2, rank=0, world_size=1)
    return Engine(new_student(dropout), settings(**changes), layout, EngineConfig.read(given, "engine.json"))


def batch(step, size=2):
    """Two micro-batches with different numbers of targets."""
    g = torch.Generator().manual_seed(step)
    found = []
    for count in (5, 11):
        ids = torch.randint(0, VOCABULARY, (size, LENGTH), generator=g)
        rows = torch.randperm(size * LENGTH, generator=g)[:count]
        labels = torch.randint(0, VOCABULARY, (count,), generator=g)
        found.append(MicroBatch(ids, rows, labels, None, None, torch.zeros(count, dtype=torch.int16)))
    return found


def tiny_run(name="m", **changes):
    return TrainRun(name, settings(**changes), None, 1, LENGTH, {})


def means(one, number, micros):
    """Of loss, CE and KL over a step's rows, its gradients accumulated."""
    sums = Sums.of(accumulate(one, Batch(number, 0.0, micros), tiny_run()), tiny_run())
    return dict(zip(("loss", "ce", "kl"), sums.means, strict=True))


def weights(one):
    import deepspeed

    parameters = list(one.deepspeed.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=one.deepspeed.zero_optimization_stage() == 3):
        return [p.detach().clone() for p in parameters]


def step(one, number, poisoned=False, rate=1e-2):
    micros = batch(number)
    if poisoned:
        hook = one.deepspeed.module.head.register_forward_pre_hook(lambda _m, a: (a[0] * float("nan"), *a[1:]))
        found = means(one, number, micros)
        hook.remove()
    else:
        found = means(one, number, micros)
    return found, *one.step(rate)


class Loader:
    """Gives the micro-batches above; `alpha`: what it says of a step's α."""

    layout = BatchLayout(4, 2, 0, 1)

    def __init__(self, alpha=lambda step: 0.0):
        self.alpha = alpha
        self.reading_s = self.waited_s = 0.0

    def __call__(self, number):
        return Batch(number, self.alpha(number), batch(number))

    def close(self):
        pass


class Interrupted(Exception):
    """What a `Watched` loader raises."""


class Watched(Loader):
    """Keeps which steps it was asked for; `until`: raises Interrupted when asked for this one."""

    def __init__(self, until=None, **more):
        super().__init__(**more)
        self.asked, self.until = [], until

    def __call__(self, number):
        if number == self.until:
            raise Interrupted
        self.asked.append(number)
        return super().__call__(number)
