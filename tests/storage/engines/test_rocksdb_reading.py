"""A RocksDB database that is read while its writer replaces files: whole, and never called damaged.

A reader that found a table in the list of tables, and then not in the directory, called the
database damaged. So did every second `foldlog get` right after a start on one busy processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rocksdict

from foldlog import CorruptLogError, FoldlogError, Put, RocksDbSnapshot, WatchCursor
from foldlog.storage.engines.rocksdb.database import opening
from foldlog.storage.engines.rocksdb.exchange.reading import stored_fold

CACHE = 8 * 1024 * 1024
MISSING = "Corruption: Can't access /000009.sst: IO error: No such file or directory"


@pytest.fixture
def writer(path: Path) -> Iterator[RocksDbSnapshot]:
    with RocksDbSnapshot.open(path, cache_bytes=CACHE)[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        yield snap


class Openings:
    """The module `rocksdict`. Each opening first meets what `events` has left for it."""

    def __init__(self, patch: pytest.MonkeyPatch, *events: Callable[[], object]) -> None:
        self.events, self.opened = list(events), 0
        real = rocksdict.Rdict

        def open_as_told(*given: Any, **options: Any) -> Any:
            self.opened += 1
            if self.events:
                self.events.pop(0)()
            return real(*given, **options)

        module = SimpleNamespace(**{**vars(rocksdict), "Rdict": open_as_told})
        patch.setattr(opening, "binding", lambda: module)


def replace_files(snap: RocksDbSnapshot) -> None:
    snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.compact()


def test_a_table_that_the_writer_removes_meanwhile_is_no_damage(writer, path, monkeypatch):
    def too_late() -> None:
        replace_files(writer)
        raise Exception(MISSING)

    openings = Openings(monkeypatch, too_late)
    with stored_fold(path) as fold:
        assert [entry.key for entry in fold.range("")] == ["a", "b"]
    assert openings.opened == 2


def test_a_state_that_was_read_while_files_were_replaced_is_read_again(writer, path, monkeypatch):
    """It may lack a write-ahead log that was flushed, and removed, between two looks at it."""
    openings = Openings(monkeypatch, lambda: replace_files(writer))
    with stored_fold(path) as fold:
        assert [entry.key for entry in fold.range("")] == ["a", "b"]
    assert openings.opened == 2


@pytest.mark.usefixtures("writer")
def test_a_missing_table_that_nobody_removes_is_damage_at_once(path, monkeypatch):
    def missing() -> None:
        raise Exception(MISSING)

    openings = Openings(monkeypatch, missing)
    with pytest.raises(CorruptLogError, match="No such file"), stored_fold(path):
        pass
    assert openings.opened == 1


@pytest.mark.usefixtures("writer")
def test_a_reader_gives_up_where_files_are_replaced_without_end(path, monkeypatch):
    monkeypatch.setattr(opening, "READ_ATTEMPTS", 3)
    numbers = iter(range(10))
    change = [lambda: (path / f"new-{next(numbers)}").touch()] * 10
    openings = Openings(monkeypatch, *change)
    with pytest.raises(FoldlogError, match="faster than they can be opened"):
        stored_fold(path).__enter__()
    assert openings.opened == 3
