"""What actors are asked and told. Messages are frozen values; each says what its reply is.

`store.writer` takes Apply, Compact and Export; `store.reader` takes Get, Range and RangePage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import CursorLike
from foldlog.protocol.updates import KvEntry, Update


class Apply(NamedTuple):
    """Ask the writer to fold `updates` and move the cursor, as one. Reply: the batch's sequence number."""

    updates: Iterable[Update]
    """In upstream order; the last write of a key wins."""
    cursor: CursorLike
    """The position that holds once all of `updates` are folded."""


class Compact(NamedTuple):
    """Ask the writer to rewrite the log as its fold, behind the readers and between applies. Reply: None, when it is done."""


class Export(NamedTuple):
    """Ask the writer for an artifact of the state as it is when this is taken from the mailbox. Reply: the ExportManifest."""

    dest_dir: str
    """Must not exist."""
    format: FormatName | None = None
    """Of the artifact; that of the log, if None."""


class Get(NamedTuple):
    """Ask a reader for an entry. Reply: the KvEntry, or None."""

    key: str


class Range(NamedTuple):
    """Ask a reader for all live entries under `prefix`. Reply: a list of KvEntry, ascending by key."""

    prefix: str = ""


class RangePage(NamedTuple):
    """Ask a reader for a long range in pieces. Reply: a Page; ask again with its `next`.

    All pages of a range come from one snapshot, which travels in the message: readers keep nothing, and a consumer that
    is slow or gone costs nothing.
    """

    prefix: str = ""
    limit: int = 1000
    """Entries in a page, at most."""
    after: str | None = None
    """Start behind this key."""
    snapshot: Any = None
    """The FoldSnapshot to read from; None is the newest."""


class Page(NamedTuple):
    """A piece of a range."""

    entries: list[KvEntry]
    next: RangePage | None
    """What to ask for the following piece; None at the end."""
