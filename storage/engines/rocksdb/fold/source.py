"""The open database, as folds read it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from foldlog.protocol.errors import FoldlogError, StoreClosed

if TYPE_CHECKING:
    from rocksdict import Rdict, ReadOptions


class View(Protocol):
    """Encoded entries by encoded key: RocksDB's snapshot, or a substitute."""

    def __getitem__(self, raw_key: bytes, /) -> bytes:
        """Raises what the binding raises: for an absent key, an error with the args `ABSENT`."""


_WRITABLE: weakref.WeakValueDictionary[int, Source] = weakref.WeakValueDictionary()
"""The sources opened for writing that somebody still has, by id."""


def is_read_after_its_end(opening: Source) -> bool:
    """True if no engine of this process has the database that `opening` is for open for writing any
    more, but somebody has a source that has ended: a thread may be in the middle of a read from it.
    """
    found = [source() for source in _WRITABLE.valuerefs()]
    here = [s for s in found if s is not None and s is not opening and s.path == opening.path]
    return bool(here) and all(source.db is None for source in here)


class Source:
    """The open database that folds read from.

    Once it has ended, it becomes the view of all of them, and every read raises.
    """

    __slots__ = ("__weakref__", "db", "ended", "path", "read_options")

    def __init__(
        self,
        db: Rdict | None,
        path: Path,
        read_options: Callable[[], ReadOptions],
        *,
        writable: bool = False,
    ) -> None:
        self.db = db
        self.path = path
        self.read_options = read_options
        self.ended: FoldlogError = StoreClosed(f"{path} is closed")
        """What a read raises once `db` is None."""
        if writable:
            _WRITABLE[id(self)] = self

    def opened(self) -> Rdict:
        """The database. Raises `ended` if it was closed."""
        if self.db is None:
            self.refuse()
        return self.db

    def refuse(self) -> NoReturn:
        """Raise the error of a source that has ended."""
        raise copy.copy(self.ended)  # a copy for each: threads would mix their tracebacks

    def __getitem__(self, raw_key: bytes, /) -> NoReturn:
        self.refuse()
