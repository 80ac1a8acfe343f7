"""The keys that each commit changed, for folds that are older than it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

KEY_OVERHEAD = 41
"""Bytes that a key takes besides its own: the object, and its place in a list."""


class Trail:
    """The keys that one commit changed, and the trail of the next commit.

    The newest trail is empty, except during a commit.
    """

    __slots__ = ("__weakref__", "following", "parts", "start_bytes")

    def __init__(self, start_bytes: int = 0) -> None:
        self.start_bytes = start_bytes
        """Bytes of all keys noted before, since the store was opened."""
        # Written by the engine only. Invariant: names a key before the database holds its change.
        self.parts: tuple[Sequence[bytes], ...] = ()
        """The changed keys, encoded, in one or more sequences."""
        self.following: Trail | None = None

    def next(self) -> Trail:
        """A trail for the next commit, still to be linked as `following`."""
        size = self.start_bytes
        for part in self.parts:
            size += sum(map(len, part)) + KEY_OVERHEAD * len(part)
        return Trail(size)

    def keys(self) -> Iterator[bytes]:
        """The changed keys, encoded."""
        return chain.from_iterable(self.parts)
