"""A watch read by a task of an event loop."""

from __future__ import annotations

import asyncio
import sys
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, Self, TypeVar

from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.feeds.subscription import Since, Subscription
from foldlog.aio.bridge import Wake
from foldlog.protocol.errors import FoldlogError, StoreClosed
from foldlog.protocol.events import Event
from foldlog.protocol.options import check_timeout
from foldlog.storage.handover import Turns

_getframe = sys._getframe
E = TypeVar("E")
CHUNK_EVENTS = 256
"""Events of a watch decoded at a time, off the loop."""
SLICE_S = 0.002
"""How long a watch keeps the loop before it yields."""


class WatchedFace(Protocol):
    """What is watched: a store or a follower."""

    @property
    def _feeds(self) -> Feeds: ...
    def snapshot(self) -> Any: ...
    def _off_loop(self, run: Callable[[], None]) -> Awaitable[None]: ...


class AsyncEvents(AsyncIterator[E]):
    """What asynchronous watches share. `async with` closes one."""

    @abstractmethod
    async def next(self, timeout_s: float | None = None) -> E | None:
        """The next event; None if none comes within `timeout_s`, or the watch has ended."""

    @abstractmethod
    def close(self) -> None:
        """Stop watching."""

    async def __anext__(self) -> E:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()


class AsyncWatch(AsyncEvents[Event]):
    """An asynchronous iterator of events: see `Store.watch`. One task at a time reads it; `close`
    ends it."""

    def __init__(self, face: WatchedFace, prefix: str, since: Since) -> None:
        """Not for callers: use `watch`."""
        self._face, self._prefix, self._since = face, prefix, since
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscription: Subscription | None = None
        self._bookmark: Bookmark | None = None
        self._wake: Wake | None = None
        # Decoded, not delivered yet. Filled on the store's thread, emptied on the loop.
        self._events: deque[Event] = deque()
        self._slice_ends = 0.0
        self._over: str | None = None
        """Why nothing more will be decoded; None while it may be."""
        self._is_closed = False
        self._turn = Turns()
        """Of those who decode: a call that was cancelled may still do so off the loop."""

    @property
    def ended(self) -> str | None:
        """Why the watch ended; None while there may be events."""
        return None if self._events else self._over

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if none comes within `timeout_s`, or the watch has ended (see
        `ended`).

        Cancelling it loses no event: the next call continues.
        """
        if not self._events and self._over is None:
            if timeout_s is None:
                await self._fetch()
            else:
                try:
                    async with asyncio.timeout(check_timeout(timeout_s)) as waiting:
                        await self._fetch()
                except TimeoutError:
                    if not waiting.expired():
                        raise
                    return None
        if not self._events:
            return None
        loop = self._loop_here()
        if loop.time() >= self._slice_ends:
            await asyncio.sleep(0)
            self._slice_ends = loop.time() + SLICE_S
        return self._events.popleft() if self._events else None  # it may have been closed

    async def _fetch(self) -> None:
        """Wait until there are events or the watch has ended."""
        wake, bookmark = self._wake, self._bookmark
        if wake is None or bookmark is None:
            wake = self._wake = Wake()
            bookmark = self._bookmark = Bookmark(self._prefix, wake)
            self._loop = asyncio.get_running_loop()
            weakref.finalize(self, self._face._feeds.remove, bookmark).atexit = False
        self._loop_here()
        while not self._events and self._over is None:
            wake.arm()
            try:
                await self._face._off_loop(self._take)
            except StoreClosed:
                self._take()  # what was buffered at the close is still delivered
            if not self._events and self._over is None:
                await wake.woken.wait()

    def _loop_here(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            raise FoldlogError("a watch belongs to the event loop that first reads it")
        return loop

    def _take(self) -> None:
        """Decode up to a chunk of what is buffered. Runs off the loop; the result is kept even if
        the caller is cancelled."""
        try:
            self._turn.enter(_getframe())
            if not self._is_closed:
                self._decode()
        finally:
            if self._is_closed:  # perhaps meanwhile
                self.close()
            self._turn.leave(_getframe())

    def _decode(self) -> None:
        face, bookmark = self._face, self._bookmark
        assert bookmark is not None
        if self._subscription is None:
            self._subscription = Subscription(
                face._feeds, face.snapshot, self._prefix, self._since, bookmark
            )
            self._since = None  # it may hold a snapshot
        subscription = self._subscription
        bookmark.join()  # first: what comes after the last look wakes the task
        while len(self._events) < CHUNK_EVENTS:
            event = subscription.next(0.0)
            if event is None:
                break
            self._events.append(event)
        else:
            return
        self._over = self._over or subscription.ended

    def close(self) -> None:
        """Stop watching. Buffered events are dropped, and a task that waits for one is woken."""
        over = self._over = self._over or "closed by its subscriber"
        self._is_closed = True
        self._events.clear()
        if self._subscription is not None:
            self._subscription.close(over)
        elif self._bookmark is not None:
            self._bookmark.end(over, drop=True)
