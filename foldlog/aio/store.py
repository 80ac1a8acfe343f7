"""The store for event loops."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sized
from math import inf
from typing import Any

from foldlog.actors.base.adapter import Place
from foldlog.actors.store.core import State, Stats
from foldlog.actors.store.requests import (
    CompactRequest,
    ExportRequest,
    LocalWrite,
    Request,
    SyncRequest,
    WriteRequest,
    check_version,
)
from foldlog.aio.answers import answer, note_outcome
from foldlog.aio.face import Face, R
from foldlog.aio.off_loop import OffLoop
from foldlog.health import Health
from foldlog.protocol.errors import Backpressure, RequestTimeout, StoreFailed
from foldlog.protocol.options import (
    APPLY_TIMEOUT_S,
    CLOSE_TIMEOUT_S,
    FORMAT,
    JOB_TIMEOUT_S,
    UNSET,
    Unset,
    check_timeout,
)
from foldlog.protocol.store import FormatName, StrPath
from foldlog.protocol.tokens import CursorLike, VersionToken, WatchCursor
from foldlog.protocol.updates import Delete, Put, Update
from foldlog.storage.artifacts.artifact import ExportManifest
from foldlog.storage.log.files import path_text
from foldlog.store import Store, write_of

ENCODE_ON_LOOP = 4096
"""The largest batch, in updates, that is encoded on the loop's thread: about 2 ms. Larger ones are
encoded off it."""
ROOM_CHECK_S = 0.001
"""Between two checks for room in the mailbox."""


class _Line:
    """A loop's tasks that wait for room in the mailbox, in order of arrival."""

    def __init__(self) -> None:
        self.first = asyncio.Lock()
        """Held by the task that polls for room."""
        self.length = 0


class AsyncStore(Face[Store]):
    """A store for event loops. Reads are plain calls; calls that wait for the writer are awaited.

    An answered call means what it means for `foldlog.Store`. Cancelling a call withdraws its
    request if it has not started; `aio.outcome(error)` says whether it was.
    """

    def __init__(self, store: Store, thread: OffLoop | None = None) -> None:
        """Wrap an open store; `close` closes it. To open one, use `aio.open`."""
        super().__init__(store, thread)
        self._lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def store(self) -> Store:
        """The synchronous store, with everything it offers. Any thread may use it."""
        return self._opened

    @property
    def state(self) -> State:
        """The state of the store."""
        return self._opened.state

    @property
    def synced_cursor(self) -> WatchCursor:
        """The position up to which every update survives a power loss."""
        return self._opened.synced_cursor

    def stats(self) -> Stats:
        """The store's statistics. Cost: microseconds, plus counting the entries on the first call
        after a batch."""
        return self._opened.stats()

    def health(self) -> Health:
        """Ready, degraded or failed, with reasons. Cost: that of `stats`. Never raises."""
        return self._opened.health()

    async def apply(
        self,
        updates: Iterable[Update],
        cursor: CursorLike,
        timeout_s: float | None = APPLY_TIMEOUT_S,
        *,
        forward_only: bool = False,
    ) -> int:
        """`Store.apply`, awaited. Returns the batch's sequence once it is written and published.

        Calls in flight share commit groups. Waits for room in a full mailbox, within `timeout_s`.
        """
        self._opened._core.snapshot.seq  # noqa: B018 - StoreClosed before TypeError or ValueError
        timeout_s = check_timeout(timeout_s)
        if isinstance(updates, Sized) and len(updates) > ENCODE_ON_LOOP:
            began = time.monotonic()
            request = await self._encoded(
                lambda: write_of(updates, cursor, forward_only), timeout_s
            )
            timeout_s = max(timeout_s - (time.monotonic() - began), 0.0)
        else:
            request = write_of(updates, cursor, forward_only)
        seq: int = await self._ask(request, timeout_s)
        return seq

    async def _encoded(self, encode: Callable[[], WriteRequest], timeout_s: float) -> WriteRequest:
        """The request, encoded off the loop."""
        try:
            async with asyncio.timeout(timeout_s) as waiting:
                return await self._off_loop(encode)
        except asyncio.CancelledError as error:
            note_outcome(error, "withdrawn", "the request was not yet in the mailbox")
            raise
        except TimeoutError:
            if not waiting.expired():
                raise
            raise RequestTimeout(
                f"the batch was not encoded within {timeout_s} s; it was withdrawn"
            ) from None

    async def put(
        self, key: str, value: bytes, timeout_s: float | None = APPLY_TIMEOUT_S
    ) -> VersionToken:
        """`Store.put`, awaited."""
        return await self._write(LocalWrite(Put(key, value)), timeout_s)

    async def create(
        self, key: str, value: bytes, timeout_s: float | None = APPLY_TIMEOUT_S
    ) -> VersionToken:
        """`Store.create`, awaited."""
        return await self._write(LocalWrite(Put(key, value), must_be_new=True), timeout_s)

    async def update(
        self,
        key: str,
        value: bytes,
        *,
        expected: VersionToken,
        timeout_s: float | None = APPLY_TIMEOUT_S,
    ) -> VersionToken:
        """`Store.update`, awaited."""
        check_version(expected)
        return await self._write(LocalWrite(Put(key, value), expected=expected), timeout_s)

    async def delete(
        self,
        key: str,
        *,
        expected: VersionToken | Unset = UNSET,
        timeout_s: float | None = APPLY_TIMEOUT_S,
    ) -> VersionToken:
        """`Store.delete`, awaited."""
        return await self._write(LocalWrite(Delete(key), expected=expected), timeout_s)

    async def sync(self, timeout_s: float | None = APPLY_TIMEOUT_S) -> None:
        """`Store.sync`, awaited."""
        await self._ask(SyncRequest(), timeout_s)

    async def compact(self, timeout_s: float | None = JOB_TIMEOUT_S) -> None:
        """`Store.compact`, awaited."""
        await self._ask(CompactRequest(), timeout_s)

    async def export_to(
        self,
        dest_dir: StrPath,
        timeout_s: float | None = JOB_TIMEOUT_S,
        *,
        format: FormatName | None = None,
    ) -> ExportManifest:
        """`Store.export_to`, awaited."""
        FORMAT.check(format)
        dest = os.path.abspath(path_text(dest_dir))
        manifest: ExportManifest
        try:
            manifest = await self._ask(ExportRequest(dest, format), timeout_s)
        except StoreFailed:
            manifest = await self._finish_off_loop(
                lambda: self._opened.export_to(dest, timeout_s, format=format)
            )
        return manifest

    async def reopen(self, timeout_s: float | None = JOB_TIMEOUT_S) -> None:
        """`Store.reopen`, off the loop."""
        await self._finish_off_loop(lambda: self._opened.reopen(timeout_s))

    async def _finish_off_loop(self, run: Callable[[], R]) -> R:
        """Run it off the loop, to its end: a cancellation withdraws it only before it has
        started."""
        return await answer(self._submit_off_loop(run), inf)  # type: ignore[no-any-return]

    async def close(self, timeout_s: float | None = CLOSE_TIMEOUT_S) -> None:
        """`Store.close`, off the loop. Closing twice is fine. If cancelled, it still closes."""
        await self._close(lambda: self._opened.close(timeout_s))

    async def _write(self, request: LocalWrite, timeout_s: float | None) -> VersionToken:
        return VersionToken.from_u64(await self._ask(request, timeout_s))

    async def _ask(self, request: Request, timeout_s: float | None) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + check_timeout(timeout_s)
        line = self._lines.get(loop)
        if line is None:
            line = self._lines.setdefault(loop, _Line())
        if line.length:
            await self._wait_for_room(request, line, deadline)
        else:
            try:
                self._opened._submit(request)
            except Backpressure:
                await self._wait_for_room(request, line, deadline)
        return await answer(request.future, max(deadline - loop.time(), 0.0))

    async def _wait_for_room(self, request: Request, line: _Line, deadline: float) -> None:
        """Submit the request in its turn, once the mailbox has room. Backpressure if it has none by
        the deadline."""
        full: Backpressure | None = None
        place = Place()
        line.length += 1
        try:
            async with asyncio.timeout_at(deadline) as waiting, line.first:
                while True:
                    try:
                        self._opened._submit(request, place=place)
                        return
                    except Backpressure as error:
                        full = error
                    await asyncio.sleep(ROOM_CHECK_S)
        except asyncio.CancelledError as error:
            note_outcome(error, "withdrawn", "the request was not yet in the mailbox")
            raise
        except TimeoutError:
            if not waiting.expired():
                raise
            raise full or Backpressure(
                "other tasks are already waiting for room in the mailbox"
            ) from None
        finally:
            line.length -= 1
            self._opened._leave(place)
