"""Every kind of store keeps the contract. A new kind joins by adding a row."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance import Kind, StoreConformance

import foldlog
from foldlog import AppendLogSnapshot, Put, RocksDbSnapshot, StoreClosed, WatchCursor
from foldlog.protocol.store import FormatName


def import_and_open(artifact: Path, dest: Path, format: FormatName = "foldlog") -> foldlog.Store:
    """Land an artifact, and open the threaded store on it."""
    AppendLogSnapshot.import_artifact(artifact, dest, format=format)[1].close()
    return foldlog.open(dest)


def import_and_open_rocksdb(artifact: Path, dest: Path) -> foldlog.Store:
    """The same, of a RocksDB store."""
    RocksDbSnapshot.import_artifact(artifact, dest)[1].close()
    return foldlog.open(dest, backend="rocksdb")


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
    Kind(
        "engine, slipstream-v2",
        lambda path: AppendLogSnapshot.open(path, format="slipstream-v2")[1],
        lambda path: AppendLogSnapshot.open(path, 0, format="slipstream-v2")[1],
        lambda artifact, dest: AppendLogSnapshot.import_artifact(
            artifact, dest, format="slipstream-v2"
        )[1],
    ),
    Kind(
        "RocksDB",
        lambda path: RocksDbSnapshot.open(path)[1],
        lambda path: RocksDbSnapshot.open(path)[1],
        lambda artifact, dest: RocksDbSnapshot.import_artifact(artifact, dest)[1],
    ),
    Kind(
        "store, RocksDB",
        lambda path: foldlog.open(path, backend="rocksdb"),
        lambda path: foldlog.open(path, backend="rocksdb"),
        import_and_open_rocksdb,
    ),
    Kind(
        "store, slipstream-v2",
        lambda path: foldlog.open(path, format="slipstream-v2"),
        lambda path: foldlog.open(path, format="slipstream-v2", compact_threshold=0),
        lambda artifact, dest: import_and_open(artifact, dest, "slipstream-v2"),
    ),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


class TestEveryStore(StoreConformance):
    """The suite itself is in `conformance.py`."""


def test_every_kind_counts_its_entries_and_knows_them_and_is_true_also_when_empty(
    kind: Kind, path: Path
) -> None:
    with kind.open(path) as store:
        assert (len(store), bool(store), "k" in store) == (0, True, False)
        store.apply([Put("k", b"v")], WatchCursor.from_u64(1))
        assert (len(store), "k" in store, 7 in store) == (1, True, False)
    for use in (lambda: len(store), lambda: "k" in store, lambda: store.snapshot()):
        with pytest.raises(StoreClosed):
            use()
