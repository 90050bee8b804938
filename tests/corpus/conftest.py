"""Shared fixtures of the corpus tests."""

import fsspec
import pytest


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty: what a URL leads to."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()
