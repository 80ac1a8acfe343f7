"""What the asynchronous stores and followers share: reads, watches, waiting and closing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NoReturn, Self, TypeVar

from foldlog.actors.base.answers import Answer
from foldlog.actors.feeds.feeds import Feeds, Waiter
from foldlog.actors.feeds.subscription import Since
from foldlog.aio.answers import settled
from foldlog.aio.bridge import Wake
from foldlog.aio.off_loop import OffLoop
from foldlog.aio.watch import AsyncWatch
from foldlog.follow import Follower
from foldlog.protocol.engine import Snapshot
from foldlog.protocol.errors import StoreClosed
from foldlog.protocol.options import check_timeout
from foldlog.protocol.tokens import CursorLike
from foldlog.storage.forks import Rank, tell_after_fork
from foldlog.storage.readable import Reads
from foldlog.store import Store
from foldlog.waiting import WAIT_TIMEOUT_S, Position, SeqLike, check_coming

S = TypeVar("S", bound=Store | Follower)
R = TypeVar("R")


class Face(Reads, Generic[S]):
    """What the asynchronous stores and followers share: reads, watches and waiting."""

    def __init__(self, opened: S, thread: OffLoop | None = None) -> None:
        self._opened: S = opened
        self._published = opened._published
        self._thread = thread or OffLoop()
        self._closing: Answer[None] | None = None
        tell_after_fork(self, Rank.STORE)

    @property
    def _feeds(self) -> Feeds:
        return self._opened._feeds

    @property
    def path(self) -> Path:
        """The log's absolute path, with symbolic links resolved."""
        return self._opened.path

    def watch(self, prefix: str = "", since: Since = None) -> AsyncWatch:
        """An asynchronous iterator of events, like `Store.watch`. It starts when first awaited.

        The bounds on memory and Lagged are the same. Only one task at a time may read it.
        """
        self._opened._enter()
        return AsyncWatch(self, prefix, since)

    async def wait_for(
        self,
        cursor: CursorLike | None = None,
        timeout_s: float | None = WAIT_TIMEOUT_S,
        *,
        seq: SeqLike | None = None,
    ) -> None:
        """Wait until reads see everything up to `cursor` or batch `seq`: see
        `Follower.wait_for`."""
        position = Position(cursor, seq)
        timeout_s = check_timeout(timeout_s)
        self._opened._enter()
        if not await reached(self._feeds, self.snapshot, position.is_reached, timeout_s):
            raise position.timeout(self.snapshot(), timeout_s)

    async def close(self) -> None:
        """Close it, off the loop. Closing twice is fine. If cancelled, it still closes."""
        await self._close(self._opened.close)

    async def _close(self, close: Callable[[], None]) -> None:
        closing, thread = self._closing, self._thread
        if closing is None:
            try:
                closing = self._closing = thread.submit(close)
            except (RuntimeError, MemoryError):
                closing = self._closing
                if closing is None:  # else another loop's thread came first
                    close()  # no thread can be started: better on the loop than not at all
                    return
            thread.end()
        await settled(closing)
        if closing.exception() is not None and self._closing is closing:
            self._thread, self._closing = OffLoop(), None  # it can be called again
        closing.result()

    def after_fork(self) -> None:
        """In a forked child, where the thread is not."""
        self._thread, self._closing = OffLoop(), None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def __enter__(self) -> NoReturn:
        raise TypeError("use `async with`, or the plain foldlog.open")

    def __exit__(self, *error: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"<foldlog.aio of {self._opened!r}>"

    async def _off_loop(self, run: Callable[[], R]) -> R:
        """Run it on the thread kept for work off the loop."""
        answer = self._submit_off_loop(run)
        try:
            await settled(answer)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        return answer.result()

    def _submit_off_loop(self, run: Callable[[], R]) -> Answer[R]:
        try:
            return self._thread.submit(run)
        except RuntimeError:
            if self._closing is None:
                raise  # no thread can be started
            raise StoreClosed(f"{self.path} is closed") from None


async def reached(
    feeds: Feeds,
    current: Callable[[], Snapshot],
    is_reached: Callable[[Snapshot], bool],
    timeout_s: float,
) -> bool:
    """Wait until the published state satisfies `is_reached`. False after `timeout_s`; raises if
    `check_coming` does."""
    wake = Wake()
    waiter = Waiter(is_reached, wake)
    feeds.add_waiter(waiter)
    try:
        async with asyncio.timeout(timeout_s) as waiting:
            while True:
                wake.arm()  # before looking: what is published later wakes us
                if is_reached(current()):
                    return True
                check_coming(feeds)
                await wake.woken.wait()
    except TimeoutError:
        if not waiting.expired():
            raise
        return False
