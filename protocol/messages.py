"""The messages of a store's actors. Each is an immutable value, and its docstring names the reply.

`store.writer` takes Apply, Compact and Export; `store.reader` takes Get, Range and RangePage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import CursorLike
from foldlog.protocol.updates import KvEntry, Update


class Apply(NamedTuple):
    """Ask the writer to fold `updates` and advance the cursor, atomically. Reply: the batch's
    sequence."""

    updates: Iterable[Update]
    """In upstream order; the last write of a key wins."""
    cursor: CursorLike
    """The position reached once all of `updates` are folded."""


class Compact(NamedTuple):
    """Ask the writer to compact the log while reads and applies continue. Reply: None, when
    done."""


class Export(NamedTuple):
    """Ask the writer to export its state when it takes this message. Reply: the ExportManifest."""

    dest_dir: str
    """Must not exist."""
    format: FormatName | None = None
    """The artifact's format; None means the log's."""


class Get(NamedTuple):
    """Ask a reader for an entry. Reply: the KvEntry, or None."""

    key: str


class Range(NamedTuple):
    """Ask a reader for all live entries under `prefix`. Reply: a list of KvEntry, ascending by
    key."""

    prefix: str = ""


class RangePage(NamedTuple):
    """Ask a reader for one page of a long range. Reply: a Page; ask again with its `next`.

    All pages come from one snapshot, carried in the message. Readers keep no state, so a slow or
    vanished consumer costs them nothing.
    """

    prefix: str = ""
    limit: int = 1000
    """The most entries in a page."""
    after: str | None = None
    """Start after this key."""
    snapshot: Any = None
    """The FoldSnapshot to read; None means the newest."""


class Page(NamedTuple):
    """One page of a range."""

    entries: list[KvEntry]
    next: RangePage | None
    """The request for the next page; None at the end."""


def plain(text: str) -> str:
    """`text` as a str itself: methods of a class of the program's must not run in an actor's
    turn."""
    return str.__str__(text)
