"""The subjects: foldlog and what a user would pick instead, each behind the same few operations.

A subject opens a path, atomically applies a batch of updates with a cursor, and reads. `record` and
`position` create the arguments of its `apply`, outside the timings. To add one, derive from
`Subject` and add it to `SUBJECTS`.

All are configured as by a typical user, without a sync at each commit unless the name says so.
foldlog stores an 8-byte version with each entry; the others store only key and value.
"""

from __future__ import annotations

import os
import pickle
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEVER = 1 << 50
"""A compact_threshold that is never reached: compaction is measured separately."""


class Subject(ABC):
    """An open store. Each subject sets `get` to the function, taking a key, that a user would
    call."""

    name = ""
    get: Callable[[str], Any]

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """Open or create the store at `path`."""

    @staticmethod
    def record(key: str, value: bytes, number: int) -> Any:
        """An update, as `apply` takes it."""
        return key, value

    @staticmethod
    def position(number: int) -> Any:
        """A cursor, as `apply` takes it."""
        return number.to_bytes(8, "big")

    def apply(self, updates: list[Any], cursor: Any) -> Any:
        """Atomically store the updates and the cursor."""
        raise NotImplementedError

    def range(self, prefix: str) -> list[Any]:
        """The entries under a prefix, in key order."""
        raise NotImplementedError

    def for_thread(self) -> Subject:
        """The same store, for use by another thread."""
        return self

    def load_done(self) -> None:  # noqa: B027 - most have nothing to do
        """Called once all entries are loaded, before the prepared store is closed."""

    @abstractmethod
    def close(self) -> None: ...


class Own(Subject):
    """What foldlog's stores share. `opened` is the store itself."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Any:
        """The open store, which never compacts by itself."""

    def __init__(self, path: Path) -> None:
        self.opened = opened = self.open(path)
        self.get, self.range = opened.get, opened.range  # type: ignore[method-assign]
        self.apply = opened.apply  # type: ignore[method-assign]

    @staticmethod
    def record(key: str, value: bytes, number: int) -> Any:
        from foldlog import Put, VersionToken

        return Put(key, value, VersionToken.from_u64(number))

    @staticmethod
    def position(number: int) -> Any:
        from foldlog import WatchCursor

        return WatchCursor.from_u64(number)

    def load_done(self) -> None:
        self.opened.compact()

    def close(self) -> None:
        self.opened.close()


class Foldlog(Own):
    """The single-threaded store, `AppendLogSnapshot`."""

    name = "foldlog"

    @classmethod
    def open(cls, path: Path) -> Any:
        from foldlog import AppendLogSnapshot

        return AppendLogSnapshot.open(path, NEVER)[1]


class Store(Own):
    """The multithreaded store, `foldlog.open`, synced every second in the background."""

    name = "foldlog-store"
    sync: Any = "interval"

    @classmethod
    def open(cls, path: Path) -> Any:
        import foldlog

        return foldlog.open(path, sync=cls.sync, compact_threshold=NEVER)


class StoreSynced(Store):
    """`foldlog.open(sync="always")`: answered batches survive a power loss."""

    name = "foldlog-store-synced"
    sync = "always"


class PlainDict(Subject):
    """A dict: no durability, no atomicity, no key order. It is opened by unpickling it."""

    name = "dict"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dict: dict[str, bytes] = pickle.loads(path.read_bytes()) if path.exists() else {}
        self.get = self._dict.get
        self._cursor = b""

    def apply(self, updates: list[Any], cursor: Any) -> None:
        self._dict.update(updates)
        self._cursor = cursor

    def range(self, prefix: str) -> list[Any]:
        return sorted(item for item in self._dict.items() if item[0].startswith(prefix))

    def load_done(self) -> None:
        self._path.write_bytes(pickle.dumps(self._dict, pickle.HIGHEST_PROTOCOL))

    def close(self) -> None:
        pass


class Sqlite(Subject):
    """sqlite3, WAL, synchronous=OFF; a table without row ids, a prepared statement per
    operation."""

    name = "sqlite3"
    synchronous = "OFF"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = db = sqlite3.connect(path, timeout=60, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={self.synchronous}")
        db.execute(
            "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID"
        )
        db.execute("CREATE TABLE IF NOT EXISTS cursor (one INTEGER PRIMARY KEY, raw BLOB)")
        execute = db.execute
        self.get = lambda key: execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()

    def apply(self, updates: list[Any], cursor: Any) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", updates)
        db.execute("INSERT OR REPLACE INTO cursor VALUES (1, ?)", (cursor,))
        db.execute("COMMIT")

    def range(self, prefix: str) -> list[Any]:
        query = "SELECT key, value FROM entries WHERE key >= ? AND key < ? ORDER BY key"
        return self._db.execute(query, (prefix, prefix + "\U0010ffff")).fetchall()

    def for_thread(self) -> Subject:
        return type(self)(self._path)

    def load_done(self) -> None:
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self._db.close()


class SqliteSynced(Sqlite):
    """sqlite3, WAL, synchronous=FULL: commits survive a power loss."""

    name = "sqlite3-synced"
    synchronous = "FULL"


def _under(start: bytes, items: Any) -> list[Any]:
    """The first of `items`, which are in key order: those under `start`."""
    found = []
    for key, value in items:
        if not key.startswith(start):
            break
        found.append((key.decode(), value))
    return found


class Lmdb(Subject):
    """lmdb with sync=False; a transaction per get, so that it sees the newest commit, as foldlog's
    does."""

    name = "lmdb"
    sync = False
    writemap = False

    def __init__(self, path: Path) -> None:
        import lmdb

        self._env = env = lmdb.open(
            os.fspath(path),
            map_size=1 << 36,
            sync=self.sync,
            writemap=self.writemap,
            max_dbs=0,
            subdir=True,
        )
        begin = env.begin

        def get(key: str) -> bytes | None:
            with begin() as transaction:
                return transaction.get(key.encode())

        self.get = get

    def apply(self, updates: list[Any], cursor: Any) -> None:
        with self._env.begin(write=True) as transaction:
            put = transaction.put
            for key, value in updates:
                put(key.encode(), value)
            put(b"\x00cursor", cursor)

    def range(self, prefix: str) -> list[Any]:
        start = prefix.encode()
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            return _under(start, cursor) if cursor.set_range(start) else []

    def close(self) -> None:
        self._env.sync(True)
        self._env.close()


class LmdbMapped(Lmdb):
    """lmdb with sync=False and writemap=True: its fastest mode.

    Pages are changed in place in the mapped file: they survive a killed process, but a stray write
    in the same process may corrupt them. Existing keys are overwritten through a cursor.
    """

    name = "lmdb-writemap"
    writemap = True

    def apply(self, updates: list[Any], cursor: Any) -> None:
        with self._env.begin(write=True) as transaction, transaction.cursor() as at:
            put = at.put
            for key, value in updates:
                put(key.encode(), value)
            put(b"\x00cursor", cursor)


class LmdbSynced(Lmdb):
    """lmdb with its defaults: commits survive a power loss."""

    name = "lmdb-synced"
    sync = True


class Rocksdict(Subject):
    """rocksdict (RocksDB) in raw mode, write-ahead log on, no sync."""

    name = "rocksdict"

    def __init__(self, path: Path) -> None:
        import rocksdict

        self._batch = rocksdict.WriteBatch
        self._db = db = rocksdict.Rdict(os.fspath(path), rocksdict.Options(raw_mode=True))
        lookup = db.get
        self.get = lambda key: lookup(key.encode())

    def apply(self, updates: list[Any], cursor: Any) -> None:
        batch = self._batch(raw_mode=True)
        for key, value in updates:
            batch.put(key.encode(), value)
        batch.put(b"\x00cursor", cursor)
        self._db.write(batch)

    def range(self, prefix: str) -> list[Any]:
        start = prefix.encode()
        return _under(start, self._db.items(from_key=start))

    def close(self) -> None:
        self._db.close()


class Plyvel(Subject):
    """plyvel (LevelDB), write-ahead log on, no sync."""

    name = "plyvel"
    sync = False

    def __init__(self, path: Path) -> None:
        import plyvel

        self._db = db = plyvel.DB(os.fspath(path), create_if_missing=True)
        lookup = db.get
        self.get = lambda key: lookup(key.encode())

    def apply(self, updates: list[Any], cursor: Any) -> None:
        with self._db.write_batch(sync=self.sync) as batch:
            put = batch.put
            for key, value in updates:
                put(key.encode(), value)
            put(b"\x00cursor", cursor)

    def range(self, prefix: str) -> list[Any]:
        with self._db.iterator(prefix=prefix.encode()) as items:
            return [(key.decode(), value) for key, value in items]

    def close(self) -> None:
        self._db.close()


class PlyvelSynced(Plyvel):
    """plyvel with sync=True: LevelDB groups waiting commits."""

    name = "plyvel-synced"
    sync = True


class Diskcache(Subject):
    """diskcache, on top of sqlite3 with WAL and synchronous=NORMAL. Has no ranges."""

    name = "diskcache"

    def __init__(self, path: Path) -> None:
        import diskcache

        self._cache = cache = diskcache.Cache(
            os.fspath(path), eviction_policy="none", size_limit=1 << 40, cull_limit=0
        )
        self.get = cache.get

    def apply(self, updates: list[Any], cursor: Any) -> None:
        put = self._cache.set
        with self._cache.transact():
            for key, value in updates:
                put(key, value)
            put("\x00cursor", cursor)

    def close(self) -> None:
        self._cache.close()


ENGINES = (Foldlog, PlainDict, Lmdb, LmdbMapped, Rocksdict, Plyvel, Sqlite, Diskcache)
"""One thread, no syncs."""
THREADED = (Store, StoreSynced, Lmdb, LmdbSynced, Plyvel, PlyvelSynced, Sqlite, SqliteSynced)
"""Many threads, with and without syncs."""
READ_BY_MANY = (Store, PlainDict, Lmdb, Sqlite)
SUBJECTS: dict[str, type[Subject]] = {subject.name: subject for subject in (*ENGINES, *THREADED)}
PEERS = tuple(name for name in SUBJECTS if not name.startswith("foldlog"))
SLOW = ("diskcache",)
"""Left out for the largest stores: loading one would take ten minutes."""
