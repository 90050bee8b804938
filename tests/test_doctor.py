"""What `ki-ds doctor` says of packages: which these are stands in the package's own metadata."""

from email.message import Message

import pytest

from ki_ds import doctor

REQUIRED = [
    "numpy>=1.26",
    "torch>=2.6",
    'triton>=3.2; platform_system == "Linux" and extra == "gpu"',
    'nvidia-ml-py>=12; extra == "gpu"',
    's3fs>=2024.2; extra == "s3"',
    'elsewhere>=1; platform_system == "Plan9"',
]
THERE = {"numpy": "2.4.6", "torch": "2.13.0+cpu", "triton": "3.1", "s3fs": "2026.1"}


@pytest.fixture
def said(monkeypatch, capsys):
    """(whether all that is needed is there, what was printed) for made-up packages."""

    def packages(there, required=REQUIRED):
        about = Message()
        about["Provides-Extra"], about["Provides-Extra"] = "gpu", "s3"
        monkeypatch.setattr(doctor.metadata, "requires", {"ki_ds": required}.__getitem__)
        monkeypatch.setattr(doctor.metadata, "metadata", {"ki_ds": about}.__getitem__)
        monkeypatch.setattr(doctor, "_version", there.get)
        return doctor._packages(), capsys.readouterr().out

    return packages


def test_versions_and_extras(said):
    enough, text = said(THERE)
    assert enough and text.splitlines() == [
        "packages: numpy 2.4.6, torch 2.13.0+cpu",
        "extra gpu: lacks triton>=3.2 (found 3.1), nvidia-ml-py>=12; pip install 'ki_ds[gpu]'",
        "extra s3: there",
    ]


@pytest.mark.parametrize(
    ("torch", "listed"), [({}, "torch>=2.6"), ({"torch": "2.5.1"}, "torch>=2.6 (found 2.5.1)")], ids=["absent", "old"]
)
def test_a_package_that_is_absent_or_too_old_is_missing(said, torch, listed):
    enough, text = said({"numpy": "2.4.6", **torch})
    assert not enough and f"MISSING: {listed}; run: pip install 'torch>=2.6'" in text


def test_a_source_folder_that_is_not_installed(monkeypatch, capsys):
    def requires(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    assert not doctor._packages() and "only its source is here; run: pip install -e ." in capsys.readouterr().out
