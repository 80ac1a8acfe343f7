"""What the asynchronous stores and followers share: reads, watches, waiting and closing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Generic, NoReturn, Self, TypeVar

from foldlog.actors.feeds import Feeds, Waiter
from foldlog.actors.subscription import Since
from foldlog.aio.bridge import Wake
from foldlog.aio.watch import AsyncWatch
from foldlog.follow import Follower
from foldlog.protocol.engine import Snapshot
from foldlog.protocol.errors import StoreClosed
from foldlog.protocol.options import check_timeout
from foldlog.protocol.tokens import CursorLike
from foldlog.storage.readable import Reads
from foldlog.store import Store
from foldlog.waiting import WAIT_TIMEOUT_S, Position, SeqLike

S = TypeVar("S", bound=Store | Follower)
R = TypeVar("R")


class Face(Reads, Generic[S]):
    """What the asynchronous stores and followers share: reads, watches and waiting."""

    def __init__(self, opened: S, executor: ThreadPoolExecutor | None = None) -> None:
        self._opened: S = opened
        self._published = opened._published
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="foldlog-aio")

    @property
    def _feeds(self) -> Feeds:
        raise NotImplementedError

    @property
    def path(self) -> Path:
        """The log's absolute path, with symbolic links resolved."""
        return self._opened.path

    def watch(self, prefix: str = "", since: Since = None) -> AsyncWatch:
        """An asynchronous iterator of events, like `Store.watch`. It starts when first awaited.

        The bounds on memory and Lagged are the same. Only one task at a time may read it.
        """
        self._enter()
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
        self._enter()
        if not await reached(self._feeds, self.snapshot, position.is_reached, timeout_s):
            raise position.timeout(self.snapshot(), timeout_s)

    def _enter(self) -> None:
        """Prepare for waiting on published changes."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close it, off the loop. Closing twice is fine. If cancelled, it still closes."""
        await self._close(self._opened.close)

    async def _close(self, close: Callable[[], None]) -> None:
        try:
            closing = self._executor.submit(close)
        except RuntimeError:  # closed already
            return
        self._executor.shutdown(wait=False)
        await asyncio.shield(asyncio.wrap_future(closing))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __enter__(self) -> NoReturn:
        raise TypeError("use `async with`, or the plain foldlog.open")

    def __exit__(self, *error: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"<foldlog.aio of {self._opened!r}>"

    async def _off_loop(self, run: Callable[[], R]) -> R:
        """Run it on the thread kept for work off the loop."""
        try:
            running = self._executor.submit(run)
        except RuntimeError:
            raise StoreClosed(f"{self.path} is closed") from None
        return await asyncio.wrap_future(running)


async def reached(
    feeds: Feeds,
    current: Callable[[], Snapshot],
    is_reached: Callable[[Snapshot], bool],
    timeout_s: float,
) -> bool:
    """Wait until the published state satisfies `is_reached`. False after `timeout_s`; StoreClosed
    if it closes."""
    wake = Wake()
    waiter = Waiter(is_reached, wake)
    feeds.add_waiter(waiter)
    try:
        async with asyncio.timeout(timeout_s) as waiting:
            while True:
                wake.arm()  # before looking: what is published later wakes us
                if is_reached(current()):
                    return True
                if feeds.ended is not None:
                    raise StoreClosed(feeds.ended)
                await wake.woken.wait()
    except TimeoutError:
        if not waiting.expired():
            raise
        return False
    finally:
        feeds.remove_waiter(waiter)
