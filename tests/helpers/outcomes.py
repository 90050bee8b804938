"""What has come of an experiment with a teacher `t` and a student `s`, and whether two runs are the same."""

import json
import re

import pytest

from helpers.commands import folder_digest, metrics

STEPS = 200  # of a student whose training is to be disturbed
COMPUTED = ("step", "loss", "ce", "kl", "alpha", "learning_rate", "gradient_norm", "validation")


def outcome(work):
    """Everything that both models, the targets and the perplexities are: to the last bit, without times."""
    return {
        "targets": folder_digest(work / "targets" / "t@a"),
        **{name: trained(work, name) for name in ("t", "s")},
        "perplexity": {name: perplexity(work, name) for name in ("t", "s")},
    }


def trained(work, name):
    """The computed values of each step, and the weights."""
    lines = [{key: line.get(key) for key in COMPUTED} for line in metrics(work / "models" / name)]
    return lines, (work / "models" / name / "model" / "model.safetensors").read_bytes()


def perplexity(work, name):
    return json.loads((work / "results" / name / "perplexity.json").read_text())["corpora"]


def steps_done(work):
    """Steps of the student in the metrics."""
    path = work / "models" / "s" / "metrics.jsonl"
    return max(len(re.findall(r"\n", path.read_text())) - 1, 0) if path.exists() else 0


def checkpoint(work):
    """The step of the student's last checkpoint."""
    found = sorted((work / "models" / "s" / "checkpoints").glob("step-*/ki_ds.json"))
    return json.loads(found[-1].read_text())["step"] if found else 0


def assert_same_course(one, two, rel=0.0):
    """The student's disturbed training took the same course in both, to the last bit or to a relative difference."""
    first, second = (metrics(work / "models" / "s") for work in (one, two))
    assert len(first) == len(second) == STEPS
    for mine, theirs in zip(first, second, strict=True):
        for key in COMPUTED:
            wanted = theirs.get(key)
            if rel and wanted is not None:
                wanted = pytest.approx(wanted, rel=rel, abs=rel)
            assert mine.get(key) == wanted, (mine["step"], key)
