"""The tail of an attachment: applies the changes after the store's cursor as they come, and knows
how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Callable

from foldlog.actors.link.checking import check_changes
from foldlog.actors.link.intake import Intake
from foldlog.actors.link.progress import LinkState, Progress
from foldlog.protocol.updates import keys_of
from foldlog.protocol.upstream import Changes, Prefixes, Upstream, UpstreamLost


class Tail:
    """See the module. Used on the link's loop alone."""

    def __init__(
        self, upstream: Upstream, prefixes: Prefixes, intake: Intake, progress: Progress
    ) -> None:
        self._upstream, self._prefixes = upstream, prefixes
        self._intake, self._progress = intake, progress
        self.touched: set[str] | None = None
        """Keys that changed since an audit began; None while there is no audit."""
        self.is_caught_up = False
        self.is_audited = False
        self.drained_at = -float("inf")
        """The latest time of which it is known that all that the upstream had sent by then is
        applied, and that no more was waiting."""
        self._moved = asyncio.Event()

    async def run(self) -> None:
        """Apply changes for as long as the upstream sends them."""
        changes = self._upstream.changes(self._intake.position, self._prefixes)
        async with contextlib.AsyncExitStack() as stack:
            if inspect.isasyncgen(changes):
                stack.push_async_callback(changes.aclose)
            pieces: AsyncIterator[Changes] = aiter(changes)
            while True:
                asked = time.monotonic()
                try:
                    piece = await anext(pieces)
                except StopAsyncIteration:
                    return
                await self._take(check_changes(piece), asked)
                await self._intake.rest()

    async def _take(self, piece: Changes, asked: float) -> None:
        """Apply a piece that was asked for at `asked`: it says what waited then, not what waits
        once it is applied."""
        received = time.monotonic()
        intake, progress = self._intake, self._progress
        if piece.position < intake.position:
            raise UpstreamLost(
                f"the upstream went back from position {intake.position.hex()} to "
                f"{piece.position.hex() or 'none'}"
            )
        updates = intake.wanted(piece.updates)
        if self.touched is not None:
            self.touched.update(keys_of(updates))
        async with intake.turn:
            if updates or piece.position != intake.position:
                await intake.apply(updates, piece.position, piece.mark)
        progress.behind = piece.behind
        if piece.behind == 0:
            progress.confirmed_at, self.drained_at = received, asked
            self.is_caught_up = True
            self.show_live()
        self._moved.set()

    def show_live(self) -> None:
        """Enter LIVE, if the fold is audited. Call it only once the tail is caught up."""
        if self.is_audited:
            self._progress.set(LinkState.LIVE)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds that only the tail can make true."""
        while not condition():
            self._moved.clear()
            await self._moved.wait()
