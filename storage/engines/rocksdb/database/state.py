"""Reading the state record of a database, and the size of its files."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from foldlog.protocol.errors import CorruptLogError, InvalidFormatError
from foldlog.storage.engines.rocksdb.database.errors import translated, typed
from foldlog.storage.engines.rocksdb.database.opening import binding
from foldlog.storage.engines.rocksdb.database.record import (
    STATE_KEY,
    NewerGeneration,
    State,
    parse_state,
)
from foldlog.storage.engines.rocksdb.database.scan import scan

if TYPE_CHECKING:
    from rocksdict import Rdict


def state_of(db: Rdict, path: Path) -> State | None:
    """The state record of a database; None if the database is empty.

    CorruptLogError if the record is damaged, InvalidFormatError if foldlog did not write the
    database or a newer foldlog did.
    """
    with translated(partial(typed, path=path, opening=True)):
        raw = db.get(STATE_KEY)
        if raw is None:
            if next(scan(db, b"", None, binding().ReadOptions), None) is None:
                return None
            raise InvalidFormatError(path, 0, "is a RocksDB database that foldlog did not write")
    try:
        return parse_state(raw)
    except NewerGeneration as error:
        raise InvalidFormatError(path, 0, str(error)) from None
    except ValueError as error:
        raise CorruptLogError(path, 0, str(error)) from None


def directory_bytes(path: Path) -> int:
    """Bytes of all files in a directory. RocksDB may remove some meanwhile."""
    total = 0
    with os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
    return total
