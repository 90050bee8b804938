"""fp16 and the estimate of memory on real hardware; of fp16 on a CPU see `tests/engine/test_fp16.py`."""

import gc
import math

import pytest
import torch
from helpers.commands import metrics
from helpers.engines import Interrupted, Watched, new_engine, settings, tiny_run, world  # noqa: F401
from helpers.marks import NEEDS_GPU

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.engine.config import EngineConfig
from ki_ds.engine.engine import Engine
from ki_ds.models import architectures, hugging_face
from ki_ds.models.language_model import LanguageModel
from ki_ds.planning import memory
from ki_ds.planning.activations import Pass, kept
from ki_ds.planning.memory import Micro, estimate
from ki_ds.training.batches import Batch, MicroBatch
from ki_ds.training.loop import accumulate, train

pytestmark = NEEDS_GPU

STAGES = (1, 2, 3)
# of the estimate: large enough for a library's workspaces, tens of MiB, not to count
MODEL, VOCABULARY, LENGTH, SEQUENCES = (
    ("gpt-base", 8192, 256, 4) if torch.cuda.is_available() else ("gpt-tiny", 300, 16, 2)
)


def train_on(one, folder, loader=None, **changes):
    """The records of a run."""
    folder.mkdir(exist_ok=True)
    train(one, loader or Watched(), tiny_run(folder.name, **changes), folder, {"fingerprint": "x"})
    return metrics(folder)


def follows(found, wanted):
    """To what fp16 rounds, twenty steps long."""
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2), mine["step"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_on_real_hardware_lowers_the_scale_and_costs_no_step(stage, tmp_path):
    one, loader = new_engine(stage, fp16={"initial_scale_power": 34}), Watched()
    assert one.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    found = train_on(one, tmp_path / "half", loader)
    assert found[0]["skipped"] > 0 and 1 <= found[0]["loss_scale"] < 2**34
    assert loader.asked == list(range(20)) and [line["step"] for line in found] == list(range(1, 21))
    assert all(line["applied"] and math.isfinite(line["loss"]) for line in found)
    follows(found, train_on(new_engine(stage), tmp_path / "whole"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_in_fp16_goes_on_where_it_was(stage, tmp_path):
    """Interrupted in step 11, resumed from step 10, with the loss scale of then."""
    how = dict(initial_scale_power=22, loss_scale_window=4)
    wanted = train_on(new_engine(stage, fp16=how), tmp_path / "whole", checkpoint_every=5)
    with pytest.raises(Interrupted):
        train_on(new_engine(stage, fp16=how), tmp_path / "two", Watched(until=11), checkpoint_every=5)
    before, loader = metrics(tmp_path / "two"), Watched()
    found = train_on(new_engine(stage, fp16=how), tmp_path / "two", loader, checkpoint_every=5)
    assert loader.asked[0] == 10 and found[:10] == before[:10]
    assert found[10]["loss_scale"] == before[10]["loss_scale"] and found[10]["skipped"] == before[10]["skipped"]
    follows(found, wanted)


def peak(run):
    """Bytes that torch's allocator held at most, above what it held before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def micro_batch():
    """Every token has a label."""
    tokens = SEQUENCES * LENGTH
    ids = torch.randint(5, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    return MicroBatch(ids, torch.arange(tokens), ids.flatten(), None, None, torch.zeros(tokens, dtype=torch.int16))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_of_memory_is_what_torch_allocates_on_a_gpu(stage, precision):
    """Of two steps of two micro-batches; a tenth below to a third above what is measured."""
    bucket = 20_000_000
    zero = {"stage": stage, "reduce_bucket_size": bucket}
    half = {} if precision == "fp32" else {precision: {"enabled": True}}
    given = EngineConfig.read({"zero_optimization": zero} | half, "engine.json")
    objective = architectures.ARCHITECTURES[MODEL][0]
    config = architectures.configuration(MODEL, objective, tokenizers.expected(VOCABULARY, objective), LENGTH, "m")
    architectures.set_dropout(config, 0.0)
    layout = BatchLayout(2 * SEQUENCES, SEQUENCES, 0, 1)
    engines = []

    def run():
        model = LanguageModel(hugging_face.new_model(config, objective, seed=1), VOCABULARY)
        changes = dict(batch_size=2 * SEQUENCES, micro_batch_size=SEQUENCES)
        one = Engine(model, settings(**changes), layout, given)
        engines.append(one)
        for number in range(2):
            accumulate(one, Batch(number, 0.0, [micro_batch(), micro_batch()]), tiny_run(**changes))
            one.step(1e-4)

    measured = peak(run)
    engines.pop().deepspeed.destroy()
    tokens = SEQUENCES * LENGTH
    activations = kept(config, objective, Pass.of(SEQUENCES, LENGTH, given, gpu=True))
    said = estimate(memory.outlined(config, objective), Micro(tokens, tokens, 0, activations), 1, given, gpu=True)
    assert 0.9 < said.device / measured < 1.33, f"{said.device / measured:.2f} of {measured / 2**20:.0f} MiB"
