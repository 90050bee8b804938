"""Teachers cut among ranks (tensor parallel) and partitioned over ranks (ZeRO-3), by real processes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.commands import folder_digest
from helpers.ranks import printed, ranks, run_ranks
from helpers.teaching import TEACH, made, opened

from ki_ds.stages.ranks import join
from ki_ds.stages.teach import Teach
from ki_ds.targets.manifest import open_folder
from ki_ds.teaching import job as teach

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

SAMPLES = 112  # seven shards, so that one of two ranks has nothing to do in the end
OFFLOADED = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}


def one_rank(file, work, settings):
    """What a rank of the teach stage does; how many parameters it holds, of the backbone and of the head, and how many
    files it has seen sealed."""
    space, stage = opened(file, work, *settings), Teach("t@a")
    identity, device = join(stage, space)
    asked = stage.job(space, identity)
    teacher = asked.teacher(device)
    model = (teacher.predict.module if hasattr(teacher.predict, "module") else teacher.predict).model
    held = tuple(sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.head))
    manifest = teach.teach(space.root / stage.folder, identity, replace(asked, teacher=lambda device: teacher), device)
    return held, len(manifest.record["files"])


@pytest.fixture(scope="module", params=["llama", "roberta"])
def clean(request, tmp_path_factory):
    """An experiment with a teacher of a kind, and its targets as one rank makes them."""
    folder, objective = tmp_path_factory.mktemp(request.param), {"llama": "clm", "roberta": "mlm"}[request.param]
    sizes = {"num_key_value_heads": 2} if request.param == "llama" else {}
    file = made(folder, request.param, objective, sizes, samples=SAMPLES)
    whole = run(file, 1, folder / "logs")
    return file, keep(file, folder / "targets"), whole


def run(file, of, logs, *settings):
    """What every rank says it holds: (backbone, head)."""
    found = run_ranks(one_rank, of, file, file.parent / "work", settings, logs=logs, timeout_s=250)
    assert [sealed for _, sealed in found] == [7] * of
    assert "AutoTP:" not in printed(logs, of)
    return [held for held, _ in found]


def keep(file, to):
    """Move the targets away, so that the next run begins anew."""
    (file.parent / "work" / "targets").rename(to)
    return to / "t@a"


def test_cut_teacher_says_the_same(clean, tmp_path):
    """Of four ranks two groups, or one of two; embeddings and the head are whole on every rank, the layers are not."""
    file, expected, [(backbone, head)] = clean
    of = 4 if "llama" in str(file) else 2
    held = run(file, of, tmp_path, "inference.tensor_parallel=2")
    assert all(head == other and part < 0.85 * backbone for part, other in held)
    one, two = (open_folder(folder) for folder in (expected, keep(file, tmp_path / "targets")))
    for samples in one.batches():
        a, b = one.read(samples), two.read(samples)
        assert a.digests == b.digests and a.rows == b.rows
        same = a.planes.ids_nK == b.planes.ids_nK
        assert same.mean() > 0.99  # neighbours may change places
        assert np.abs(a.planes.scalars_Sn.astype(int) - b.planes.scalars_Sn).max() <= 1  # 1/256 nat


def test_partitioned_teacher_says_the_same_to_the_last_bit(clean, tmp_path):
    """ZeRO-3 with what a rank holds kept on the host; parameters are empty where they are partitioned."""
    file, expected, _ = clean
    held = run(file, 2, tmp_path, "inference.engine=" + json.dumps(OFFLOADED))
    assert held == [(0, 0)] * 2
    assert folder_digest(keep(file, tmp_path / "targets")) == folder_digest(expected)


def test_command_line_runs_a_partitioned_teacher_in_half_precision(clean, tmp_path):
    file, expected, _ = clean
    zero3 = {"zero_optimization": {"stage": 3}}
    settings = ("--set", "inference.precision=bf16", "--set", "inference.engine=" + json.dumps(zero3))
    command = [*TEACH, file, "--workdir", file.parent / "work", *settings]
    with ranks([command] * 2, tmp_path) as processes:
        assert [process.wait(250) for process in processes] == [0, 0], printed(tmp_path, 2)
    one, two = (open_folder(folder) for folder in (expected, keep(file, tmp_path / "targets")))
    a, b = (folder.read(np.arange(SAMPLES)) for folder in (one, two))
    assert a.digests == b.digests
    assert 0 < np.abs(a.planes.scalars_Sn.astype(int) - b.planes.scalars_Sn).mean() < 3  # 1/256 nat
