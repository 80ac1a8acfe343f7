"""Typed views for event loops: reads are plain, writes are awaited."""

from __future__ import annotations

from typing import Any, TypeVar

from foldlog.actors.feeds.subscription import Since
from foldlog.aio.follower import AsyncFollower
from foldlog.aio.store import AsyncStore
from foldlog.aio.watch import AsyncEvents, AsyncWatch
from foldlog.protocol.errors import VersionMismatch
from foldlog.protocol.events import Event
from foldlog.protocol.options import APPLY_TIMEOUT_S
from foldlog.protocol.tokens import VersionToken
from foldlog.views import View, ViewEvent, values_of

T = TypeVar("T")


class AsyncView(View[T]):
    """A mapping of typed values whose writes are awaited. See `aio.view`.

    It is no MutableMapping: an assignment cannot be awaited.
    """

    __slots__ = ()
    _source: AsyncStore | AsyncFollower

    async def put(
        self, key: str, value: T, timeout_s: float | None = APPLY_TIMEOUT_S
    ) -> VersionToken:
        """`AsyncStore.put` of the encoded value. EncodeError if the codec raises; then nothing is
        stored. TypeError if this is a view of a follower."""
        store = self._store()
        return await store.put(key, self._encoded(key, value), timeout_s)

    async def delete(self, key: str, timeout_s: float | None = APPLY_TIMEOUT_S) -> VersionToken:
        """Remove `key`. KeyError if it is absent; TypeError if this is a view of a follower."""
        store = self._store()
        self._check_key(key)
        while (entry := store.get(key)) is not None:
            try:
                return await store.delete(key, expected=entry.version, timeout_s=timeout_s)
            except VersionMismatch:
                continue  # someone wrote it meanwhile
        raise KeyError(key)

    def watch(self, since: Since = None) -> AsyncViewWatch[T]:  # type: ignore[override]
        """`AsyncStore.watch` with decoded changes."""
        return AsyncViewWatch(self._source.watch(self.prefix, since), self)

    def _store(self) -> AsyncStore:
        if not isinstance(self._source, AsyncStore):
            raise TypeError("a view of a follower is read-only")
        return self._source


class AsyncViewWatch(AsyncEvents[ViewEvent[T]]):
    """An `AsyncWatch` whose changes are decoded."""

    def __init__(self, watch: AsyncWatch, view: AsyncView[T]) -> None:
        """Not for callers: use `view.watch`."""
        self._watch, self._view = watch, view
        self._event: Event | None = None
        """Taken and not decoded yet."""

    @property
    def ended(self) -> str | None:
        """Why the watch ended; None while it goes on."""
        return self._watch.ended

    async def next(self, timeout_s: float | None = None) -> ViewEvent[T] | None:
        """See `AsyncWatch.next`."""
        if self._event is None:
            self._event = await self._watch.next(timeout_s)
        decoded = self._view._decoded(self._event)
        self._event = None
        return decoded

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()


def view(store: AsyncStore | AsyncFollower, codec: Any, prefix: str = "") -> AsyncView[Any]:
    """`foldlog.view` over a store or a follower of an event loop: reads are plain calls, `put` and
    `delete` are awaited, and `watch` is an asynchronous iterator.

    `foldlog.view` takes such a store, too, and then only reads.
    """
    if not isinstance(store, (AsyncStore, AsyncFollower)):
        raise TypeError(f"aio.view is of an aio store or follower, not of a {type(store).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
    return AsyncView(store, store._published, values_of(codec), prefix)
