"""The keys that each commit changed, for folds that are older than it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain


class Trail:
    """The keys that one commit changed, and the trail of the next commit.

    The newest trail is empty, except during a commit.
    """

    __slots__ = ("__weakref__", "following", "parts")

    def __init__(self) -> None:
        # Written by the engine only. Invariant: names a key before the database holds its change.
        self.parts: tuple[Sequence[bytes], ...] = ()
        """The changed keys, encoded, in one or more sequences."""
        self.following: Trail | None = None

    def keys(self) -> Iterator[bytes]:
        """The changed keys, encoded."""
        return chain.from_iterable(self.parts)
