"""A run as a user starts it, with a teacher and a student, on a GPU; and what its batches lie in."""

import json
import math

import pytest
import torch
from helpers.commands import ki_ds, metrics
from helpers.experiments import written
from helpers.marks import NEEDS_GPU
from helpers.taught_corpora import TAIL, layout, loader, make_world

pytestmark = NEEDS_GPU

BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_teach_and_train_through_the_launcher_in_bf16(tmp_path):
    file, work = written(tmp_path, engine=BF16), tmp_path / "work"
    ki_ds("run", file, "--workdir", work, "--processes", 1)
    student = metrics(work / "models" / "s")
    assert len(student) == 8 and student[-1]["loss"] < student[0]["loss"]
    assert all(math.isfinite(line["loss"]) and line["applied"] for line in student)
    assert student[0]["alpha"] > 0 and student[0]["kl"] > 0
    made = json.loads((work / "models" / "s" / "manifest.json").read_text())
    named = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    assert f'"{named}"' in json.dumps(made)
    assert (work / "report" / "report.html").exists()


def tensors(ids, rows, labels, targets, alpha):
    return [ids, rows, labels, alpha, *(x for x in vars(targets).values() if isinstance(x, torch.Tensor))]


def test_batches_are_pinned_and_arrive_whole(tmp_path):
    """Also those that the loader's own thread has made; copied without waiting, while the host goes on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = loader(make_world(tmp_path, vocabulary=90_000), layout(8, 8), tail=TAIL)
    made.alpha = lambda step: 0.5
    try:
        for step in range(3):
            (micro,) = made(step).micro_batches
            there = tensors(*micro.to(device))
            here = tensors(micro.input_ids_BS, micro.rows_N, micro.labels_N, micro.targets, micro.alpha_N)
            assert len(there) == len(here) == 9
            for copied, pinned in zip(there, here, strict=True):
                assert copied.device.type == device.type and pinned.is_pinned() == (device.type == "cuda")
                assert torch.equal(copied.cpu(), pinned)
    finally:
        made.close()
