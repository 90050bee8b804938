"""Hugging Face data sets, streamed."""

import json
import sys

import pytest
from helpers.sources import failure, read

from ki_ds.corpus.sources import Tally, documents
from ki_ds.errors import UserError
from ki_ds.experiment.sources import DatasetSource


@pytest.fixture
def dataset(monkeypatch):
    """Rows for `load_dataset`, or the exception that it raises; what it was asked for comes back."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def install(rows):
        def load(*args, **options):
            asked.append((args, options))
            if isinstance(rows, Exception):
                raise rows
            return iter(rows)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return install


def test_dataset_folder_in_a_base_is_streamed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    rows = [{"body": " one "}, {"body": None}, {"body": "two"}]
    (tmp_path / "folder" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(DatasetSource(dataset="folder", field="body"), bases=[tmp_path]) == ["one", "two"]


def test_dataset_by_name(dataset):
    asked = dataset([{"text": "one"}])
    assert read(DatasetSource(dataset="org/name", configuration="en", split="validation")) == ["one"]
    assert asked == [(("org/name", "en"), {"split": "validation", "streaming": True})]


def test_dataset_without_the_field(dataset):
    dataset([{"texts": "one"}])
    message = failure(DatasetSource(dataset="name"))
    assert message.startswith("corpora.wb.sources.0.dataset: name: there is no \"text\", only 'texts'; ")


def test_dataset_field_of_another_type(dataset):
    dataset([{"text": "one"}, {"text": 2}])
    assert 'row 1: "text" is a value of type int; expected a string' in failure(DatasetSource(dataset="name"))


def test_dataset_that_cannot_be_loaded(dataset):
    dataset(ConnectionError("no route\nand a long story"))
    message = failure(DatasetSource(dataset="name"))
    assert message.startswith("corpora.wb.sources.0.dataset: name: cannot be loaded: no route; check the name, ")


def test_dataset_that_breaks_off(dataset):
    def rows():
        yield {"text": "one"}
        raise RuntimeError("lost")

    dataset(rows())
    found = documents([DatasetSource(dataset="name")], [], "corpora.wb", "replace", Tally())
    assert next(found) == "one"
    with pytest.raises(UserError, match="cannot be loaded: lost; check"):
        next(found)


def test_datasets_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "run `pip install datasets`" in failure(DatasetSource(dataset="name"))
