"""Opening a RocksDB database with the options that foldlog's promises need.

`rocksdict` is imported here only, when used.

Three options differ from RocksDB's defaults for a reason. Recovery refuses a damaged write-ahead
log, where the default would silently drop everything after the damage; the torn tail that a power
loss leaves is dropped. Index and filter blocks count against the cache, so that `cache_bytes`
bounds memory. And a write that RocksDB would stall is refused and retried by `commit`, since the
binding holds the interpreter lock while it waits.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from foldlog.protocol.errors import (
    CorruptLogError,
    FoldlogError,
    InvalidFormatError,
    drop_system_errors,
)
from foldlog.protocol.frames import FILE_MAGIC
from foldlog.protocol.options import CACHE_BYTES, OnDamage
from foldlog.storage.engines.rocksdb.database.errors import is_rocksdbs, translated, typed
from foldlog.storage.formats.registry import MAGICS

if TYPE_CHECKING:
    from rocksdict import AccessType, Options, Rdict

WRITE_BUFFER_BYTES = 64 * 1024 * 1024
"""Size of one memtable. RocksDB holds two, and briefly a third.

With a small cache, they are smaller.
"""
READ_ATTEMPTS = 100
"""How often to open a database for reading whose files a writer replaces meanwhile."""
_BLOOM_BITS = 10
_SURELY_OLD = (9, 8)
"""RocksDB's version in the oldest rocksdict that the extra allows.

A database that this version or an older one wrote needs no further check.
"""

_FAMILY = "default"
"""The column family that holds all keys."""
_COMPARATOR = "leveldb.BytewiseComparator"
_OPTIONS_CHARS = 1024 * 1024

# The files that RocksDB creates before the database exists: a killed open leaves them.
_BEFORE_CURRENT = re.compile(
    r"LOCK|LOG(\.old\.\d+)?|IDENTITY|MANIFEST-\d+|OPTIONS-\d+(\.dbtmp)?|\d+\.dbtmp"
    r"|rocksdict-config\.json"
)


def binding() -> ModuleType:
    """The module `rocksdict`. If it is missing, the ImportError says what to install."""
    try:
        import rocksdict
    except ImportError as error:
        raise ImportError(
            "the RocksDB engine needs the package rocksdict: pip install 'foldlog[rocksdb]'",
            name="rocksdict",
        ) from error
    return rocksdict


def open_database(
    path: Path,
    *,
    create: bool = False,
    cache_bytes: int = CACHE_BYTES.default,
    on_damage: OnDamage = "refuse",
) -> Rdict:
    """Open the database at `path` for writing.

    `create`: create it if `path` is absent or an empty directory.

    Raises StoreLocked, CorruptLogError, InvalidFormatError or OSError. Anything that is not a
    database is left as it is.
    """
    rocksdict = binding()
    exists = look_at(path, create=create)
    options = _options(rocksdict, cache_bytes, on_damage)
    options.create_if_missing(not exists)
    if not exists:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
    with translated(partial(typed, path=path, opening=True)):
        return _rdict(rocksdict, path, options)


@contextlib.contextmanager
def reading(path: Path, cache_bytes: int = CACHE_BYTES.least):  # type: ignore[no-untyped-def]
    """The database at `path`, opened read-only.

    Works while a writer has it open, and leaves its state as it is. FoldlogError if that writer
    replaces files faster than they can be opened.
    """
    rocksdict = binding()
    look_at(path, create=False)
    with tempfile.TemporaryDirectory(prefix="foldlog-") as logs:
        options = _options(rocksdict, cache_bytes, "refuse")
        options.set_db_log_dir(logs)  # RocksDB would write its own log into the database
        access = rocksdict.AccessType.read_only(False)
        for _ in range(READ_ATTEMPTS):
            names = set(os.listdir(path))
            try:
                db = _rdict(rocksdict, path, options, access_type=access)
            except Exception as error:
                if not is_rocksdbs(error):
                    raise
                if set(os.listdir(path)) == names:
                    raise typed(error, path, opening=True) from error
                continue  # a writer removed a file that was about to be opened
            if set(os.listdir(path)) == names:
                break
            db.close()  # it may lack what was in a file that a writer removed
        else:
            raise FoldlogError(f"{path}: its files are replaced faster than they can be opened")
        try:
            yield db
        finally:
            db.close()


def _rdict(rocksdict: ModuleType, path: Path, options: Options, **how: AccessType) -> Rdict:
    """Open with these options also for the keys.

    Left to itself, the binding takes those of an existing database from its options file, where no
    cache is recorded: RocksDB's default of 8 MiB would be used.
    """
    families = {_FAMILY: options}
    return rocksdict.Rdict(os.fspath(path), options, families, **how)  # type: ignore[no-any-return]


def _options(rocksdict: ModuleType, cache_bytes: int, on_damage: OnDamage) -> Options:
    options = rocksdict.Options(raw_mode=True)
    recovery = rocksdict.DBRecoveryMode
    options.set_wal_recovery_mode(
        recovery.point_in_time()
        if on_damage == "cut"
        else recovery.tolerate_corrupted_tail_records()
    )
    options.set_paranoid_checks(True)
    blocks = rocksdict.BlockBasedOptions()
    blocks.set_block_cache(rocksdict.Cache(cache_bytes))
    blocks.set_cache_index_and_filter_blocks(True)
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(True)
    blocks.set_bloom_filter(_BLOOM_BITS, False)
    options.set_block_based_table_factory(blocks)
    options.set_write_buffer_size(min(WRITE_BUFFER_BYTES, cache_bytes // 4))
    options.set_max_open_files(512)
    options.set_bytes_per_sync(1024 * 1024)
    options.set_keep_log_file_num(4)
    options.set_max_log_file_size(1024 * 1024)
    options.set_stats_dump_period_sec(0)
    return options  # type: ignore[no-any-return]


def look_at(path: Path, *, create: bool) -> bool:
    """True if a database is at `path`, False if one may be created there. Changes nothing.

    InvalidFormatError for a file, a directory of other files, or a database of a newer RocksDB;
    FileNotFoundError if nothing is there and `create` is False.
    """
    try:
        info = os.stat(path)
    except FileNotFoundError:
        if create:
            return False
        raise
    if not stat.S_ISDIR(info.st_mode):
        raise InvalidFormatError(path, 0, _what_file(path))
    names = os.listdir(path)
    if "CURRENT" in names:
        _refuse_foreign(path, names)
        return True
    tables = sorted(name for name in names if name.endswith((".sst", ".log")))
    if tables and any(name.startswith("MANIFEST-") for name in names):
        raise CorruptLogError(path / "CURRENT", 0, f"is missing, where {tables[0]} is not")
    if create and all(map(_BEFORE_CURRENT.fullmatch, names)):
        return False
    raise InvalidFormatError(path, 0, "is a directory, but not a RocksDB database")


def _what_file(path: Path) -> str:
    first = b""
    with drop_system_errors():
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            first = os.read(fd, len(FILE_MAGIC))
        finally:
            os.close(fd)
    if first.startswith(MAGICS):
        return "is a log, which the append-log engine opens; a RocksDB database is a directory"
    return "is not a directory, as a RocksDB database is"


def _refuse_foreign(path: Path, names: list[str]) -> None:
    """InvalidFormatError for a database that this binding must not try to open.

    Its options file decides. A newer RocksDB may have written data that ours would drop. And if its
    keys have another order, the binding fails only after overwriting a file of its own there.
    """
    numbers = [int(m[1]) for m in map(re.compile(r"OPTIONS-(\d+)").fullmatch, names) if m]
    if not numbers:
        return
    options = _read_options(path / f"OPTIONS-{max(numbers):06}")
    comparator = re.search(r"^\s*comparator=(\S+)", options, re.MULTILINE)
    if comparator and comparator[1] != _COMPARATOR:
        raise InvalidFormatError(
            path,
            0,
            f"is another program's RocksDB database: its keys are in the order {comparator[1]!r}",
        )
    theirs = version_in(options)
    if theirs is None or theirs <= _SURELY_OLD:
        return
    ours = own_version()
    if ours is not None and theirs > ours:
        shown = [".".join(map(str, version)) for version in (theirs, ours)]
        raise InvalidFormatError(
            path, 0, f"was written by RocksDB {shown[0]}, this rocksdict carries {shown[1]}"
        )


def _read_options(file: Path) -> str:
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            return opened.read(_OPTIONS_CHARS)
    except FileNotFoundError:  # a writer has replaced it meanwhile
        return ""


def version_in(options: str) -> tuple[int, int] | None:
    """RocksDB's version (major, minor) in the text of an options file; None if it has none."""
    found = re.search(r"^\s*rocksdb_version=(\d{1,9})\.(\d{1,9})", options, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


@cache
def own_version() -> tuple[int, int] | None:
    """The version (major, minor) of the binding's RocksDB; None if unknown.

    RocksDB states it only in the files of a database.
    """
    rocksdict = binding()
    with tempfile.TemporaryDirectory(prefix="foldlog-") as directory:
        rocksdict.Rdict(directory, rocksdict.Options(raw_mode=True)).close()
        found = [version_in(_read_options(file)) for file in Path(directory).glob("OPTIONS-*")]
    return next((version for version in found if version is not None), None)


def property_of(db: Rdict, name: str) -> int:
    """One of RocksDB's counters; 0 if it has no value."""
    with translated(lambda error: FoldlogError(f"{name}: {error}")):
        return db.property_int_value(f"rocksdb.{name}") or 0
