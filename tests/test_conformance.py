"""Every kind of store keeps the contract. A new kind joins by adding a row."""

from __future__ import annotations

import pytest
from conformance import Kind, StoreConformance

from foldlog import AppendLogSnapshot

KINDS = [
    Kind(
        "engine",
        lambda path: AppendLogSnapshot.open(path)[1],
        lambda path: AppendLogSnapshot.open(path, 0)[1],
        lambda artifact, dest: AppendLogSnapshot.import_artifact(artifact, dest)[1],
    ),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


class TestEveryStore(StoreConformance):
    """The suite itself is in `conformance.py`."""
