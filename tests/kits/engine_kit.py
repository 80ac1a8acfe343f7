"""The engines, for tests of what they promise alike.

A test that takes `backend` runs on each engine. A module that says

    ON_EACH_ENGINE = True

runs on each engine as it is: `foldlog.open` and what is built on it open a store on RocksDB where
no backend is named. On RocksDB it carries the marker `exhaustive`, and tests marked `append_log`
are left out: what they are about is the log's, for the reason given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import foldlog
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


@pytest.fixture(autouse=True)
def default_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The engine of a store for which no backend is named.

    With a patch of its own: a test's `monkeypatch` holds what it patched, and must end before the
    fixtures that look for what was left open.
    """
    engine = str(getattr(request, "param", "append-log"))
    with pytest.MonkeyPatch.context() as patch:
        if engine == "rocksdb":
            pytest.importorskip("rocksdict")
            patch.setitem(foldlog.open.__kwdefaults__, "backend", engine)
        yield engine


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "append_log(why): about the append log alone; not run on the other engine"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    alike = getattr(metafunc.module, "ON_EACH_ENGINE", False)
    if not alike or "backend" in metafunc.fixturenames:
        return
    if metafunc.definition.get_closest_marker("append_log"):
        return
    second = pytest.param("rocksdb", marks=pytest.mark.exhaustive)
    metafunc.parametrize("default_engine", ["append-log", second], indirect=True)
