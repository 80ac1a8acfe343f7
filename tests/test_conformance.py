"""Every kind of store keeps the contract. A new kind joins by adding a row."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance import Kind, StoreConformance

import foldlog
from foldlog import AppendLogSnapshot


def import_and_open(artifact: Path, dest: Path) -> foldlog.Store:
    """Land an artifact, and open the threaded store on it."""
    AppendLogSnapshot.import_artifact(artifact, dest)[1].close()
    return foldlog.open(dest)


KINDS = [
    Kind(
        "engine",
        lambda path: AppendLogSnapshot.open(path)[1],
        lambda path: AppendLogSnapshot.open(path, 0)[1],
        lambda artifact, dest: AppendLogSnapshot.import_artifact(artifact, dest)[1],
    ),
    Kind(
        "store",
        foldlog.open,
        lambda path: foldlog.open(path, compact_threshold=0),
        import_and_open,
    ),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


class TestEveryStore(StoreConformance):
    """The suite itself is in `conformance.py`."""
