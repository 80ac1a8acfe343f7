"""A fold as the writer of a new file takes it: segment by segment, in key order.

A segment is a span of keys. If it is a whole leaf that did not change, or changed in a few values
only, the leaf can be carried over, without a decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Change
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.leaf import Columns, patched_leaf

PATCHED_CHANGES = 32
"""Up to this many changes, patching a leaf is faster than decoding it."""


class Segment(Protocol):
    """The live entries of one span of keys."""

    @property
    def is_leaf(self) -> bool:
        """True if the span is that of a whole leaf, which `carried` may return."""

    @property
    def unchanged_leaf(self) -> int | None:
        """The number of the leaf that holds just these entries; None if none does."""

    def carried(self) -> tuple[bytes, int | None] | None:
        """The body of the leaf, with its checksum if it is unchanged.

        None if the entries must be encoded. Cost: a read, and 4 us a change.
        """

    def columns(self) -> Columns:
        """The entries, in key order."""

    def live_changes(self) -> list[Change] | None:
        """The entries, in key order, as the fold has them in memory; None if some are in a leaf."""


class Writable(Protocol):
    """What can be written to a new file: a fold, or another engine's state in its place."""

    @property
    def seq(self) -> int:
        """The sequence of its last batch."""

    @property
    def origin(self) -> bytes:
        """The upstream of its cursor."""

    @property
    def base_entries(self) -> int:
        """Entries of its base, for progress."""

    @property
    def is_in_memory(self) -> bool:
        """True if all entries are in memory."""

    def cursor(self) -> WatchCursor:
        """The cursor of its last batch."""

    def segments(self) -> Iterator[Segment]:
        """All of it, in key order."""


def carried_leaf(
    base: Base, number: int, changes: dict[str, Change]
) -> tuple[bytes, int | None] | None:
    """See `Segment.carried`."""
    if len(changes) > PATCHED_CHANGES:
        return None
    body = base.body(number)
    if not changes:
        return body, base.crc(number)
    patched = patched_leaf(body, changes)
    return None if patched is None else (patched, None)


def live_of(changes: dict[str, Change]) -> list[Change]:
    """The changes that leave an entry, in key order."""
    return [change for _, change in sorted(changes.items()) if change[1] is not None]
