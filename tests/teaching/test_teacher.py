"""How teachers are run: what is refused, micro-batches found by trial, and half precision."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.teaching import LENGTH, VOCABULARY, made, opened

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.engine.config import InferenceEngineConfig
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Inference
from ki_ds.kernels.select.eager import select
from ki_ds.kernels.select.pack import pack
from ki_ds.launch import heartbeat
from ki_ds.stages import pipeline
from ki_ds.stages.evaluate import Evaluate
from ki_ds.stages.teach import Teach
from ki_ds.stages.train import Train
from ki_ds.targets.selection import Selection
from ki_ds.targets.spec import TargetSpec
from ki_ds.teaching import asking
from ki_ds.teaching import job as teach
from ki_ds.teaching import teacher as inference
from ki_ds.teaching.batch_size import MICRO_BATCH
from ki_ds.teaching.parallel import Replicated
from ki_ds.teaching.teacher import MicroBatchFinder, Teacher

ZERO3 = {"zero_optimization": {"stage": 3}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made(tmp_path_factory.mktemp("inference"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return made(tmp_path_factory.mktemp("llama"), "llama", sizes={"num_key_value_heads": 2})


def asked(file, *settings):
    """What the experiment's teacher is to do."""
    space = opened(file, file.parent / "work", *settings)
    stage = Teach("t@a")
    return stage.job(space, stage.identity(space))


# ------------------------------------------------------------------------------------------------------ refusals


def preflight(file, *settings):
    """Of the teach stage and those before it, by four ranks, before anything has run."""
    space = opened(file, file.parent / "elsewhere", *settings)
    before = [stage for stage in pipeline.stages(space.experiment) if stage.kind in ("tokenizer", "corpus")]
    pipeline.preflight(space, [*before, *Teach.of(space.experiment)], 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["inference.tensor_parallel=3"], "inference.tensor_parallel: 3 does not divide the 4 processes"),
        (
            ["inference.tensor_parallel=2"],
            "models.t: DeepSpeed cannot cut a gpt2 model for inference",
        ),
        (["inference.engine=nowhere.json"], "inference.engine: there is no nowhere.json"),
        (["inference.engine=ds_configs/engine/zero1_fp32.json"], "zero_optimization.stage: found 1; expected 3"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(file, settings, words):
    with pytest.raises(UserError, match=words):
        preflight(file, *settings)


def test_k_beyond_a_given_tokenizer_is_refused_before_ranks_start(file):
    with pytest.raises(UserError, match=r"models\.s\.inherit\.targets\.k: found 301; .* the vocabulary size, 300"):
        preflight(file, "models.s.inherit.targets.k=301")


def test_teacher_of_another_tokenizer_is_refused_whichever_stage_is_asked_for(file):
    """Of as many ids, so that nothing else would show it; also where a student begins from that model."""
    trained = tokenizers.train([f"quite another text, with the number {n**3}" for n in range(300)], VOCABULARY, "clm")
    trained.save_pretrained(file.parent / "other")
    student = ("models.s.architecture=null", "models.s.start_from=t")
    space = opened(file, file.parent / "elsewhere", "tokenizer.pretrained=other", *student)
    for kind in (Teach, Train, Evaluate):
        with pytest.raises(UserError, match=r"models.t.pretrained: .* has another tokenizer"):
            pipeline.preflight(space, kind.of(space.experiment), 1)


def test_heads_that_cannot_be_shared_out_are_refused(llama):
    with pytest.raises(UserError, match=r"num_attention_heads is 2; expected inference.tensor_parallel 4 to divide it"):
        preflight(llama, "inference.tensor_parallel=4")
    preflight(llama, "inference.tensor_parallel=2")


def test_precision_that_the_machine_lacks_is_refused_with_those_that_it_has(file, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "supported_dtypes", lambda: [torch.float32, torch.bfloat16])
    space = opened(file, file.parent / "elsewhere", "inference.precision=fp16")
    with pytest.raises(UserError, match=r'inference.precision: .* cannot compute in "fp16"; expected bf16 or fp32'):
        pipeline.preflight(space, pipeline.stages(space.experiment), 1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "stage: found null; expected 3"),
        ({"zero_optimization": {"stage": 2}}, "stage: found 2; expected 3"),
        ({**ZERO3, "bf16": {"enabled": True}}, "bf16: inference.precision says this"),
        ({**ZERO3, "optimizer": {}}, "optimizer: not a key for inference"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {}}}, "inference has no optimizer"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "tape"}}}, 'expected an object with "device"'),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 'needs "nvme_path"'),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/"}}}, "rounds .* bf16"),
    ],
)  # fmt: skip
def test_engine_json_that_is_not_for_inference_is_refused(config, words):
    with pytest.raises(UserError, match=words):
        InferenceEngineConfig.read(config, "z.json", "fp32")


def test_engine_json_for_inference_is_taken():
    for offload in ({"device": "cpu"}, {"device": "none"}, {"device": "nvme", "nvme_path": "/x"}):
        InferenceEngineConfig.read({"zero_optimization": {"stage": 3, "offload_param": offload}}, "z.json", "bf16")
    with pytest.raises(ValueError, match=r'"engine" .*or "tensor_parallel" above 1, not both'):
        Inference.model_validate({"engine": ZERO3, "tensor_parallel": 2})


def test_only_another_precision_makes_other_targets(file):
    stage, work = Teach("t@a"), file.parent / "work"
    plain = stage.identity(opened(file, work))
    assert "precision" not in plain.config
    assert stage.identity(opened(file, work, "inference.tensor_parallel=2", "inference.micro_batch_size=3")) == plain
    assert stage.identity(opened(file, work, "inference.precision=bf16")).config["precision"] == "bf16"


# -------------------------------------------------------------------------------------------------- micro-batches


class Short:
    """A teacher that has memory for so many sequences, and takes its time for them."""

    def __init__(self, predict, most):
        self.predict, self.most, self.sizes = predict, most, []

    def __call__(self, ids_BS, *rest):
        self.sizes.append(len(ids_BS))
        if len(ids_BS) > self.most:
            raise torch.OutOfMemoryError("short")
        return self.predict(ids_BS, *rest)


@pytest.fixture(scope="module")
def real(file):
    """The job, and its teacher."""
    found = asked(file)
    return found, found.teacher(CPU)


def frames(blocks):
    return [frame for block in blocks for frame in block.frames]


def computed(real, most, micro_batch, samples=100):
    short = Short(real[1].predict, most)
    teacher = Teacher(short, Replicated(), micro_batch, lambda: None)
    told = []
    blocks = teach.compute(teacher, real[0], np.arange(samples), CPU, lambda here: told.append(here) or True)
    assert sum(len(block.index) for block in blocks) == samples
    return short.sizes, frames(blocks), told


def test_memory_that_runs_short_halves_the_micro_batch_and_loses_nothing(real):
    sizes, found, told = computed(real, 5, MicroBatchFinder(16, False, True))
    assert sizes[:4] == [16, 8, 4, 4] and set(sizes[2:]) == {4}
    assert told[:4] == [0, 0, 0, 4] and told[-1] == 96
    assert found == computed(real, 100, MicroBatchFinder(4, False, True))[1]


def test_last_short_micro_batch_is_halved_too(real):
    micro_batch = MicroBatchFinder(16, False, True)
    sizes, _, _ = computed(real, 2, micro_batch, 3)
    assert sizes == [3, 1, 1, 1] and micro_batch.size == 1


def test_memory_too_short_for_one_sequence_names_the_remedies(real):
    with pytest.raises(UserError, match=r"models.t: memory was short for a single.*bf16.*tensor_parallel.*ZeRO"):
        computed(real, 0, MicroBatchFinder(16, True, True))


def test_ranks_that_compute_together_do_not_halve(real):
    with pytest.raises(UserError, match=r"short for 16 sequences at once. Expected a smaller inference"):
        computed(real, 10, MicroBatchFinder(16, False, False))


def test_micro_batch_grows_until_memory_is_short(real, monkeypatch):
    """Two micro-batches later than it could: when it is heard how long one took, the next is under way, and what comes
    after it is ready."""
    clock = iter(range(1000))
    monkeypatch.setattr(asking.time, "perf_counter", lambda: float(next(clock)))  # any size takes one second
    sizes, _, _ = computed(real, 100, MicroBatchFinder(16, True, True), 600)
    assert sizes == [*[16] * 4, *[32] * 4, *[64] * 4, 128, 64, 64, 24]


def test_what_was_said_is_taken_while_the_next_micro_batch_is_computed(real, monkeypatch):
    """The host packs an answer when the next question is on its way; none is lost or changes places."""
    said = []
    real_take = asking.Answer.take

    def take(self, *rest):
        said.append(("taken", int(self.question.samples[0])))
        return real_take(self, *rest)

    def predict(ids, *rest):
        said.append("asked")
        return real[1].predict(ids, *rest)

    monkeypatch.setattr(asking.Answer, "take", take)
    teacher = Teacher(predict, Replicated(), MicroBatchFinder(16, False, True), lambda: None)
    teach.compute(teacher, real[0], np.arange(40), CPU, lambda here: True)
    assert said == ["asked", "asked", ("taken", 0), "asked", ("taken", 16), ("taken", 32)]


def test_micro_batch_stops_growing_where_it_does_not_pay():
    micro_batch, tried = MicroBatchFinder(16, True, True), []
    while micro_batch.growing:
        tried.append(micro_batch.size)
        first = len(tried) % 2 == 1
        micro_batch.took(micro_batch.size, 1.0 + 9.0 * first if micro_batch.size <= 64 else micro_batch.size / 64)
    assert tried == [16, 16, 32, 32, 64, 64, 128, 128] and micro_batch.size == 64
    micro_batch.took(64, 0.01)
    assert micro_batch.size == 64


def test_shorter_micro_batches_say_nothing_about_the_size():
    micro_batch = MicroBatchFinder(16, True, True)
    for _ in range(5):
        micro_batch.took(7, 1.0)
    assert micro_batch.size == 16


def test_on_a_cpu_the_size_is_fixed(file, real):
    micro_batch = real[1].micro_batch
    assert (micro_batch.size, micro_batch.growing, micro_batch.halving) == (MICRO_BATCH, False, True)
    assert asked(file, "inference.micro_batch_size=3").teacher(CPU).micro_batch.size == 3


def test_shard_that_somebody_else_has_written_is_left(real):
    short = Short(real[1].predict, 100)
    left = iter([True, True, False])
    teacher = Teacher(short, Replicated(), MicroBatchFinder(16, False, True), lambda: None)
    assert teach.compute(teacher, real[0], np.arange(100), CPU, lambda here: next(left)) is None
    assert short.sizes == [16, 16]


def test_a_wish_to_stop_ends_the_work_at_the_next_micro_batch(real, monkeypatch):
    wishes = iter([False, False, True])
    monkeypatch.setattr(heartbeat, "asked_to_stop", lambda: next(wishes))
    with pytest.raises(heartbeat.Stopped):
        computed(real, 100, MicroBatchFinder(16, False, True))


@pytest.mark.parametrize("selection", [Selection("top_k", 12), Selection("top_p", 12, 0.9), Selection("sampled", 9)])
@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_prediction_that_is_no_probability_is_refused_with_its_sample_and_row(real, selection, logit):
    """Of the third sample, row 5: one logit, or all of them where it is -inf."""
    row = 2 * (LENGTH - 1) + 5

    def predict(ids, rows, labels, drawn):
        logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(0))
        logits[row, ... if logit < 0 else 7] = logit
        return predictions(logits, labels, selection, drawn)

    codec = TargetSpec(selection, (1.0,), 2e-4, 100).codec(VOCABULARY)
    job = replace(real[0], selection=selection, header=replace(real[0].header, codec=codec))
    teacher = Teacher(predict, Replicated(), MicroBatchFinder(16, False, True), lambda: None)
    with pytest.raises(UserError, match=r"models\.t: .*not a number or infinite at sample 42 of .* row 5 \(index 5\)"):
        teach.compute(teacher, job, np.arange(40, 60), CPU, lambda here: True)


def predictions(logits, labels, selection, drawn):
    """As a teacher packs them."""
    found = select(logits, labels, selection, (1.0,), drawn)
    return pack(found, selection.k, 0.0 if selection.counts else 1 / 16, (1.0,), False)


# ------------------------------------------------------------------------------------------------------ precision


def test_half_precision_says_nearly_the_same_and_keeps_the_positions(llama):
    found = {}
    for precision in ("fp32", "bf16"):
        teacher = asked(llama, f"inference.precision={precision}").teacher(CPU)
        ids = torch.arange(64).reshape(2, 32) + 5
        rows = torch.arange(64)
        with torch.inference_mode():
            found[precision] = teacher.predict(ids, rows, ids.flatten(), None)
        model = teacher.predict.module.model
        assert {p.dtype for p in model.parameters()} == {inference.DTYPES[precision]}
        frequencies = next(b for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
        expected = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)  # cast to bf16 they would be off by 4e-3
    truth = {name: one.scalars["truth"] for name, one in found.items()}
    assert (truth["fp32"] - truth["bf16"]).abs().max() < 0.05
    assert not math.isclose(truth["fp32"].sum().item(), truth["bf16"].sum().item(), rel_tol=1e-9)
