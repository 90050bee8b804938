"""The teach stage: samples a second beside the bare forward pass of its backbone, and where the rest goes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_parts.part import Figures, Row, apart
from gpu_parts.workload import LLAMA_1B, Workload, on_device

TURNS = 5
BASE = dict(architecture="roberta-base", objective="mlm", vocabulary=50_265, length=512, samples=8192)
LLAMA = dict(architecture=LLAMA_1B, objective="clm", vocabulary=128_256, length=512, samples=1024)
TINY = dict(architecture="roberta-tiny", objective="mlm", vocabulary=320, length=16, samples=16, k=8)


def rows(device: str, tiny: bool) -> Iterator[Row]:
    """Both teachers in bf16, by sequences at once; the first with a size that the stage finds itself."""
    if tiny:
        yield "roberta-tiny, 4 at once", partial(apart, "teacher_speed", {"sizes": TINY, "micro": 4, "tiny": True})
        return
    for name, sizes, micros in (("roberta-base", BASE, (64, 256)), ("a Llama of 1 B", LLAMA, (16, 32))):
        for micro in micros:
            given = {"sizes": sizes, "micro": micro, "tiny": False}
            yield f"{name}, {micro} at once", partial(apart, "teacher_speed", given)
    yield (
        "roberta-base, as many at once as it finds",
        partial(apart, "teacher_speed", {"sizes": BASE, "micro": None, "tiny": False}),
    )


def measure(given: dict[str, Any]) -> Figures:
    """The whole stage, then each of its steps alone."""
    from ki_ds.experiment.schema import Distortion, Inference
    from ki_ds.sealed import Identity
    from ki_ds.teaching.job import TeachJob, teach
    from ki_ds.teaching.teacher import teacher

    device, work = on_device(), Workload(**given["sizes"])
    precision = "bf16" if device.type == "cuda" else "fp32"
    settings = Inference(precision=precision, micro_batch_size=given["micro"])
    selection, codec = work.spec.selection, work.header.codec

    def load(dtype: torch.dtype) -> Any:
        return work.new_model(0.0).to(dtype)

    asked = teacher(load, "teacher", selection, codec, settings, None, device)
    bound = Distortion.model_validate({})

    def job(samples: int) -> TeachJob:
        return TeachJob(lambda _: asked, "teacher", work.tokens, work.stream, work.viewer, samples, 2048, selection,
                        work.header, bound)  # fmt: skip

    size = given["micro"] or 64
    with tempfile.TemporaryDirectory() as folder:
        first = min(work.samples, 4 * size)
        teach(Path(folder) / "warm", Identity("targets", {}, {}), job(first), device)
        began = time.perf_counter()
        teach(Path(folder) / "all", Identity("targets", {}, {}), job(work.samples), device)
        whole_s = time.perf_counter() - began
        stored_bytes = sum(file.stat().st_size for file in (Path(folder) / "all").glob("*.kit"))
        size = asked.micro_batch.size
        parts = steps(asked, work, size, device, Path(folder))
    bare = size / parts["the backbone"]
    return {
        "samples a second": work.samples / whole_s, "of the bare forward pass": work.samples / whole_s / bare,
        "bare forward pass, samples a second": bare, "sequences at once": size,
        "log_softmax and topk instead, samples a second": size / parts["the backbone, log_softmax and topk"],
        "rows a second": work.samples / whole_s * work.rows_per_sequence,
        "seconds of each step alone, a micro-batch": parts, "precision": precision,
        "bytes a row": stored_bytes / (work.samples * work.rows_per_sequence),
    }  # fmt: skip


def steps(asked: Any, work: Workload, size: int, device: torch.device, folder: Path) -> dict[str, float]:
    """Median seconds of what a micro-batch takes, each step alone, its inputs at hand."""
    from ki_ds.kernels.select.pack import planes_of
    from ki_ds.targets.shard import pack_block, write_shard

    predictor = getattr(asked.predict, "module", asked.predict)
    model, codec, samples = predictor.model, work.header.codec, np.arange(size)
    sequences, views = work.stream.pairs(samples)

    def view() -> Any:
        return work.viewer(work.tokens.train[sequences], sequences, views)

    seen = view()
    at = np.flatnonzero(seen.loss_mask_BS)
    arrays = seen.inputs_BS.astype(np.int64), at, seen.labels_BS.reshape(-1)[at].astype(np.int64)

    def sent() -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(array).to(device) for array in arrays)

    ids, rows_N, labels = sent()
    weight, bias = model.head.parameters_VD()

    def dense() -> Any:
        logits = torch.nn.functional.linear(model.hidden(ids, rows_N), weight, bias)
        return logits.float().log_softmax(dim=1).topk(work.k, dim=1)

    with torch.inference_mode():
        found = asked.predict(ids, rows_N, labels, None)
        planes = planes_of(found, codec)
        ends, lost = np.cumsum(seen.loss_mask_BS.sum(axis=1)), found.distortion_N.cpu().numpy()
        block = pack_block(codec, planes, ends, work.viewer.digests(seen), lost)
        return {
            "view": median(view, device),
            "to the device": median(sent, device),
            "the backbone": median(lambda: model.hidden(ids, rows_N), device),
            "the backbone and selection": median(lambda: asked.predict(ids, rows_N, labels, None), device),
            "the backbone, log_softmax and topk": median(dense, device),
            "to the host": median(lambda: planes_of(found, codec), device),
            "packing and zstd, one thread": median(
                lambda: pack_block(codec, planes, ends, work.viewer.digests(seen), lost), device
            ),
            "disk": median(lambda: write_shard(folder / "one.kit", work.header, 0, [block]), device),
        }


def median(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call with all that it leaves to the device, after two that warm up."""
    found = []
    for _ in range(TURNS + 2):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])
