"""Every invariant of a RocksDB store, in code, and facts about a database. Changes nothing.

tables    every block that holds an entry passes its checksum
keys      UTF-8 of at most 65,535 bytes; above them is the state record, and nothing else
entries   what `encode_entry` writes, within the limits of values and versions
state     passes its checksum, and is of a generation that this version reads
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from foldlog.protocol.store import StrPath
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import MAX_KEY_BYTES, MAX_VALUE_BYTES
from foldlog.storage.engines.rocksdb.database.errors import is_rocksdbs, translated, typed
from foldlog.storage.engines.rocksdb.database.opening import binding, property_of, reading
from foldlog.storage.engines.rocksdb.database.record import (
    ENTRIES_END,
    NO_STATE,
    STATE_KEY,
    State,
    decode_entry,
    parse_state,
)
from foldlog.storage.engines.rocksdb.database.scan import scan
from foldlog.storage.engines.rocksdb.database.state import directory_bytes, state_of
from foldlog.storage.formats.format import Progress
from foldlog.storage.log.files import resolve

if TYPE_CHECKING:
    from rocksdict import Rdict, ReadOptions

_REPORTED_EACH = 4096
_MOST_PROBLEMS = 1000


@dataclass(frozen=True, slots=True)
class RocksDbReport:
    """What verifying a RocksDB store found. `ok` sums it up."""

    path: Path
    size: int
    """Bytes of all files."""
    tables: int
    entries: int
    """Valid entries."""
    seq: int
    cursor: WatchCursor
    problems: tuple[str, ...]
    """The first 1000 problems, in key order; with RocksDB's message where it found them."""

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems


class RocksDbFacts(NamedTuple):
    """Facts about a database."""

    path: Path
    size: int
    """Bytes of all files."""
    tables: int
    entries: int
    """RocksDB's estimate: overwritten and removed entries may count."""
    seq: int
    cursor: WatchCursor
    origin: bytes
    store_id: bytes


def verify_database(path: StrPath, progress: Progress | None = None) -> RocksDbReport:
    """Check the store at `path`, which may be open in another process.

    Cost: reads all, about 1 us an entry.

    CorruptLogError or InvalidFormatError if it cannot be opened at all.
    """
    real = resolve(path)
    with reading(real) as db:
        return verify_open(db, real, progress)


def describe(path: StrPath) -> RocksDbFacts:
    """What the store at `path` says of itself; it may be open elsewhere.

    Cost: an open, whatever its size.

    Raises as `verify_database` does.
    """
    real = resolve(path)
    with reading(real) as db:
        state = state_of(db, real) or NO_STATE
        return RocksDbFacts(
            real,
            directory_bytes(real),
            len(db.live_files()),
            max(0, property_of(db, "estimate-num-keys") - 1),
            state.seq,
            state.cursor,
            state.origin,
            state.store_id,
        )


def verify_open(db: Rdict, path: Path, progress: Progress | None = None) -> RocksDbReport:
    """`verify_database`, for a database that this process has open."""
    with translated(partial(typed, path=path)):
        tables = db.live_files()
    total = sum(table["num_entries"] for table in tables)
    starts = sorted({table["start_key"] for table in tables})
    problems: list[str] = []
    entries = 0
    state: State | None = None
    start: bytes | None = b""
    while start is not None and len(problems) < _MOST_PROBLEMS:
        at = start
        start = None
        try:
            for key, raw in scan(db, at, None, _checking_options):
                at = key
                if key == STATE_KEY:
                    state = _checked_state(raw, problems)
                    continue
                fault = _fault_of(key, raw)
                if fault is None:
                    entries += 1
                    if progress is not None and entries % _REPORTED_EACH == 0:
                        progress(entries, max(total, entries))
                else:
                    problems.append(f"key {key[:40]!r}: {fault}")
        except Exception as error:
            if not is_rocksdbs(error):
                raise
            if _is_no_damage(error, path):
                raise typed(error, path) from error
            if str(error) not in problems[-1:]:  # a table is tried twice if its first block is bad
                problems.append(str(error))
            start = next((first for first in starts if first > at), None)  # the next table
    if state is None:  # after damage that stopped the scan
        state = _state_alone(db, path, problems)
    if state is None and (entries or problems):
        problems.append("the record of the state is missing")
    state = state or NO_STATE
    return RocksDbReport(
        path, directory_bytes(path), len(tables), entries, state.seq, state.cursor, tuple(problems)
    )


def _is_no_damage(error: Exception, path: Path) -> bool:
    """True if RocksDB could not read a file, which says nothing of its bytes. A file that is
    missing is damage."""
    return isinstance(typed(error, path, opening=True), OSError)


def _checking_options() -> ReadOptions:
    options: ReadOptions = binding().ReadOptions()
    options.set_verify_checksums(True)
    return options


def _checked_state(raw: bytes, problems: list[str]) -> State | None:
    try:
        return parse_state(raw)
    except ValueError as error:
        problems.append(str(error))
        return NO_STATE


def _state_alone(db: Rdict, path: Path, problems: list[str]) -> State | None:
    try:
        raw = db.get(STATE_KEY)
    except Exception as error:
        if not is_rocksdbs(error):
            raise
        if _is_no_damage(error, path):
            raise typed(error, path) from error
        problems.append(str(error))
        return NO_STATE
    return None if raw is None else _checked_state(raw, problems)


def _fault_of(key: bytes, raw: bytes) -> str | None:
    """What is wrong with an entry, if anything."""
    if key >= ENTRIES_END:
        return "is not a key that foldlog writes"
    try:
        key.decode()
        value, _ = decode_entry(raw)
    except ValueError as error:
        return str(error)
    if len(key) > MAX_KEY_BYTES or len(value) > MAX_VALUE_BYTES:
        return f"a key of {len(key)} bytes with a value of {len(value)}"
    return None
