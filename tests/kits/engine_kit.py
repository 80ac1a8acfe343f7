"""The engines, for tests of what they promise alike."""

from __future__ import annotations

from typing import Any

import pytest

from foldlog import AppendLogSnapshot, RocksDbSnapshot
from foldlog.protocol.store import Backend
from foldlog.storage.engines.registry import SEATS

ENGINES: dict[Backend, Any] = {"append-log": AppendLogSnapshot, "rocksdb": RocksDbSnapshot}
"""The store for one thread, by the value of `backend=`."""


@pytest.fixture(params=list(SEATS))
def backend(request: pytest.FixtureRequest) -> str:
    """Each engine of the table in turn."""
    if request.param == "rocksdb":
        pytest.importorskip("rocksdict")
    return str(request.param)
