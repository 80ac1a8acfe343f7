"""Asynchronous versions of the store, follower and mirror, for programs that run on an event loop.

Reads are plain calls, since they never wait. Calls that wait for the writer are awaited: the
request goes into the writer's mailbox, and the answer comes back through the loop's
`call_soon_threadsafe`, with one wake-up for answers that arrive together. Work that may read or
decode for long (opening, closing, starting and reading a watch) runs on one thread kept for it by
each store. There is no second engine, and no thread per call.

A store may be used from several loops in several threads. A watch belongs to the loop that first
reads it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, NoReturn, ParamSpec, Self, TypeAlias, TypeVar

from foldlog.actors.core import State, Stats
from foldlog.actors.feeds import Buffer, Feeds, Group, Since, Subscription
from foldlog.actors.follower import FollowerState
from foldlog.actors.requests import (
    CompactRequest,
    ExportRequest,
    LocalWrite,
    Request,
    SyncRequest,
)
from foldlog.follow import Follower, FollowerStats
from foldlog.follow import follow as follow_log
from foldlog.mirror import Mirror
from foldlog.mirror import mirror as open_mirror
from foldlog.protocol.errors import Backpressure, FoldlogError, RequestTimeout, StoreClosed
from foldlog.protocol.events import Event
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
from foldlog.protocol.updates import Update
from foldlog.storage.artifacts.artifact import ExportManifest
from foldlog.storage.readable import Reads
from foldlog.store import Store, write_of
from foldlog.store import open as open_store
from foldlog.waiting import WAIT_TIMEOUT_S, Position, SeqLike

__all__ = [
    "AsyncFollower",
    "AsyncMirror",
    "AsyncStore",
    "AsyncWatch",
    "Opening",
    "follow",
    "mirror",
    "open",
    "outcome",
]

P = ParamSpec("P")
S = TypeVar("S", bound=Store | Follower)
F = TypeVar("F", bound="_Face[Any]")
R = TypeVar("R")

Outcome: TypeAlias = Literal["withdrawn", "done", "unknown"]

SETTLE_AT_ONCE = 256
"""Answers delivered before the loop gets a turn."""
CHUNK_EVENTS = 256
"""Events of a watch decoded at a time, off the loop."""
SLICE_S = 0.002
"""How long a watch keeps the loop before it yields."""
ENCODE_ON_LOOP = 4096
"""The largest batch, in updates, that is encoded on the loop's thread: about 2 ms. Larger ones are
encoded off it."""
ROOM_CHECK_S = 0.001
"""Between two checks for room in the mailbox."""

LINK_CHECK_S = 0.02
"""Between two checks of whether a mirror is synced."""


class _Bridge:
    """Lets any thread schedule calls on a loop; calls posted together wake it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # the bridge is a value in `_bridges`, keyed by loop
        self._calls: deque[Callable[[], object]] = deque()
        self._due = False

    def post(self, call: Callable[[], object]) -> None:
        """Schedule `call` on the loop. Never blocks. Does nothing if the loop is closed: nobody
        waits there."""
        self._calls.append(call)  # first: whoever clears `_due` then empties the queue
        if not self._due:
            self._due = True
            self._schedule()

    def _schedule(self) -> None:
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._run)
        except RuntimeError:
            self._calls.clear()  # the loop is closed

    def _run(self) -> None:
        self._due = False
        for _ in range(min(len(self._calls), SETTLE_AT_ONCE)):
            self._calls.popleft()()
        if self._calls and not self._due:
            self._due = True
            self._schedule()


_bridges: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bridge] = (
    weakref.WeakKeyDictionary()
)
_bridges_lock = threading.Lock()


def _bridge() -> _Bridge:
    """The bridge to the running loop."""
    loop = asyncio.get_running_loop()
    with _bridges_lock:
        bridge = _bridges.get(loop)
        if bridge is None:
            bridge = _bridges[loop] = _Bridge(loop)
        return bridge


class _WakingBuffer(Buffer):
    """A buffer whose subscriber waits on a loop. Once armed, it wakes the subscriber once."""

    def __init__(self, bridge: _Bridge, *, keep: bool) -> None:
        super().__init__()
        self._bridge, self._keep = bridge, keep
        self.woken = asyncio.Event()
        self._armed = False

    def arm(self) -> None:
        """Wake the subscriber at the next push or end. Runs on the loop."""
        self.woken.clear()
        self._armed = True

    def push(self, group: Group) -> None:
        if self._keep:
            super().push(group)
        self.wake()

    def end(self, reason: str, *, drop: bool = False) -> None:
        super().end(reason, drop=drop)
        self.wake()

    def wake(self) -> None:
        if self._armed:
            self._armed = False
            self._bridge.post(self.woken.set)


# Answers.


def outcome(error: BaseException) -> Outcome | None:
    """What became of a call that was cancelled, or timed out by `asyncio.timeout`, as known at that
    moment.

    "withdrawn": it was not started, and never will be. "done": it was carried out. "unknown": the
    writer is processing it. None: the error does not come from a call on a store.
    """
    seen: BaseException | None = error
    while seen is not None:
        found: Outcome | None = getattr(seen, "_foldlog_outcome", None)
        if found is not None:
            return found
        seen = seen.__cause__ or seen.__context__
    return None


def _note_outcome(error: asyncio.CancelledError, what: Outcome, note: str) -> None:
    error._foldlog_outcome = what  # type: ignore[attr-defined]
    error.add_note(f"foldlog: {note}")


def _withdraw(future: Future[Any], error: asyncio.CancelledError) -> None:
    """The caller was cancelled: withdraw its request if it has not started, and note the
    outcome."""
    if future.cancel():
        _note_outcome(error, "withdrawn", "the request was withdrawn before it started")
    elif future.done() and future.exception() is None:
        _note_outcome(error, "done", "the request had already been carried out")
    elif future.done():
        _note_outcome(error, "withdrawn", f"the request had already failed: {future.exception()}")
    else:
        _note_outcome(
            error, "unknown", "the writer is processing the request and will carry it out"
        )


async def _answer(future: Future[Any], timeout_s: float) -> Any:
    """Await the writer's answer."""
    loop, bridge = asyncio.get_running_loop(), _bridge()
    waiter: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not waiter.done():
            waiter.set_result(None)

    future.add_done_callback(lambda _: bridge.post(settle))
    timer = loop.call_later(check_timeout(timeout_s), settle)
    try:
        await waiter
    except asyncio.CancelledError as error:
        _withdraw(future, error)
        raise
    finally:
        timer.cancel()
    if future.done():
        return future.result()
    if future.cancel():
        raise RequestTimeout(f"no answer within {timeout_s} s; the request was withdrawn")
    if future.done():  # it arrived at the last moment
        return future.result()
    raise RequestTimeout(f"no answer within {timeout_s} s; its outcome is unknown")


# Opening.


class Opening(Generic[F]):
    """What `open`, `follow` and `mirror` return: use it with `async with`, or await it."""

    def __init__(
        self, run: Callable[[], Any], face: Callable[[Any, ThreadPoolExecutor], F]
    ) -> None:
        """Not for callers: use `aio.open` or `aio.follow`."""
        self._run, self._face = run, face
        self._opened: F | None = None

    async def _open(self) -> F:
        executor = ThreadPoolExecutor(1, thread_name_prefix="foldlog-aio")
        opening = executor.submit(self._run)
        try:
            opened = await asyncio.shield(asyncio.wrap_future(opening))
        except BaseException:
            if not opening.cancel():
                opening.add_done_callback(_close_opened)
            executor.shutdown(wait=False)
            raise
        return self._face(opened, executor)

    def __await__(self) -> Generator[Any, None, F]:
        return self._open().__await__()

    async def __aenter__(self) -> F:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._opened is not None:
            await self._opened.close()


def _close_opened(opening: Future[Any]) -> None:
    """Close what was opened after its caller had been cancelled."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _opener(
    run: Callable[P, Any], face: Callable[[Any, ThreadPoolExecutor], F], doc: str
) -> Callable[P, Opening[F]]:
    def opener(*args: P.args, **kwargs: P.kwargs) -> Opening[F]:
        return Opening(lambda: run(*args, **kwargs), face)

    opener.__doc__, opener.__name__, opener.__qualname__ = doc, run.__name__, run.__name__
    return opener


class _Face(Reads, Generic[S]):
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
        buffer = _WakingBuffer(_bridge(), keep=False)
        self._feeds.add(buffer)
        try:
            async with asyncio.timeout(timeout_s) as waiting:
                while True:
                    buffer.arm()
                    if position.is_reached(self.snapshot()):
                        return
                    if buffer.ended is not None:
                        raise StoreClosed(buffer.ended)
                    await buffer.woken.wait()
        except TimeoutError:
            if not waiting.expired():
                raise
            raise position.timeout(self.snapshot(), timeout_s) from None
        finally:
            self._feeds.remove(buffer)

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


class _Line:
    """A loop's tasks that wait for room in the mailbox, in order of arrival."""

    def __init__(self) -> None:
        self.first = asyncio.Lock()
        """Held by the task that polls for room."""
        self.length = 0


class AsyncStore(_Face[Store]):
    """A store for event loops. Reads are plain calls; calls that wait for the writer are awaited.

    An answered call means what it means for `foldlog.Store`. Cancelling a call withdraws its
    request if it has not started; `aio.outcome(error)` says whether it was.
    """

    def __init__(self, store: Store, executor: ThreadPoolExecutor | None = None) -> None:
        """Wrap an open store; `close` closes it. To open one, use `aio.open`."""
        super().__init__(store, executor)
        self._lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def store(self) -> Store:
        """The synchronous store, with everything it offers. Any thread may use it."""
        return self._opened

    @property
    def _feeds(self) -> Feeds:
        return self._opened._core.feeds

    def _enter(self) -> None:
        self._opened._check_process()

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
            request = await self._off_loop(lambda: write_of(updates, cursor, forward_only))
        else:
            request = write_of(updates, cursor, forward_only)
        seq: int = await self._ask(request, timeout_s)
        return seq

    async def put(
        self, key: str, value: bytes, timeout_s: float | None = APPLY_TIMEOUT_S
    ) -> VersionToken:
        """`Store.put`, awaited."""
        return await self._write(LocalWrite(key, value), timeout_s)

    async def create(
        self, key: str, value: bytes, timeout_s: float | None = APPLY_TIMEOUT_S
    ) -> VersionToken:
        """`Store.create`, awaited."""
        return await self._write(LocalWrite(key, value, must_be_new=True), timeout_s)

    async def update(
        self,
        key: str,
        value: bytes,
        *,
        expected: VersionToken,
        timeout_s: float | None = APPLY_TIMEOUT_S,
    ) -> VersionToken:
        """`Store.update`, awaited."""
        return await self._write(LocalWrite(key, value, expected=expected), timeout_s)

    async def delete(
        self,
        key: str,
        *,
        expected: VersionToken | Unset = UNSET,
        timeout_s: float | None = APPLY_TIMEOUT_S,
    ) -> VersionToken:
        """`Store.delete`, awaited."""
        return await self._write(LocalWrite(key, UNSET, expected=expected), timeout_s)

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
        request = ExportRequest(os.path.abspath(os.fspath(dest_dir)), format)
        manifest: ExportManifest = await self._ask(request, timeout_s)
        return manifest

    async def reopen(self, timeout_s: float | None = JOB_TIMEOUT_S) -> None:
        """`Store.reopen`, off the loop."""
        await self._off_loop(lambda: self._opened.reopen(timeout_s))

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
        return await _answer(request.future, max(deadline - loop.time(), 0.0))

    async def _wait_for_room(self, request: Request, line: _Line, deadline: float) -> None:
        """Submit the request as soon as the mailbox has room. Backpressure if it has none by the
        deadline."""
        full: Backpressure | None = None
        line.length += 1
        try:
            async with asyncio.timeout_at(deadline) as waiting, line.first:
                while True:
                    try:
                        self._opened._submit(request)
                        return
                    except Backpressure as error:
                        full = error
                    await asyncio.sleep(ROOM_CHECK_S)
        except asyncio.CancelledError as error:
            _note_outcome(error, "withdrawn", "the request was not yet in the mailbox")
            raise
        except TimeoutError:
            if not waiting.expired():
                raise
            raise full or Backpressure(
                "other tasks are already waiting for room in the mailbox"
            ) from None
        finally:
            line.length -= 1


class AsyncMirror(AsyncStore):
    """A mirror for event loops: an `AsyncStore` that only its upstream writes. Other writes raise
    MirrorReadOnly."""

    def __init__(self, mirror: Mirror, executor: ThreadPoolExecutor | None = None) -> None:
        """Wrap an open mirror; `close` closes it. To open one, use `aio.mirror`."""
        super().__init__(mirror, executor)
        self._mirror = mirror

    @property
    def mirror(self) -> Mirror:
        """The synchronous mirror, with its link and statistics."""
        return self._mirror

    async def wait_synced(self, timeout_s: float | None = WAIT_TIMEOUT_S) -> None:
        """`Mirror.wait_synced`, awaited."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + check_timeout(timeout_s)
        while True:
            try:
                self._mirror.wait_synced(0.0)
                return
            except RequestTimeout:
                if loop.time() >= deadline:
                    raise
            await asyncio.sleep(LINK_CHECK_S)


class AsyncFollower(_Face[Follower]):
    """A follower for event loops. Reads are plain calls."""

    def __init__(self, follower: Follower, executor: ThreadPoolExecutor | None = None) -> None:
        """Wrap an open follower; `close` closes it. To open one, use `aio.follow`."""
        super().__init__(follower, executor)

    @property
    def follower(self) -> Follower:
        """The synchronous follower."""
        return self._opened

    @property
    def _feeds(self) -> Feeds:
        return self._opened._thread.feeds

    @property
    def state(self) -> FollowerState:
        """The state of the log as the follower sees it."""
        return self._opened.state

    def stats(self) -> FollowerStats:
        """The follower's statistics. Cost: as `Follower.stats`."""
        return self._opened.stats()

    def _enter(self) -> None:
        self._opened._thread.wake()
        self._opened._thread.woken.set()  # check the log now: its file event may be late or lost


class AsyncWatch(AsyncIterator[Event]):
    """An asynchronous iterator of events: see `Store.watch`. One task at a time reads it; `close`
    ends it."""

    def __init__(self, face: _Face[Any], prefix: str, since: Since) -> None:
        """Not for callers: use `watch`."""
        self._face, self._prefix, self._since = face, prefix, since
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscription: Subscription | None = None
        self._buffer: _WakingBuffer | None = None
        # Decoded, not delivered yet. Filled on the store's thread, emptied on the loop.
        self._events: deque[Event] = deque()
        self._slice_ends = 0.0
        self.ended: str | None = None
        """Why the watch ended; None while it goes on."""

    async def __anext__(self) -> Event:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if none comes within `timeout_s`, or the watch has ended (see
        `ended`).

        Cancelling it loses no event: the next call continues.
        """
        if not self._events and self.ended is None:
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
        if self._buffer is None:
            self._buffer = _WakingBuffer(_bridge(), keep=True)
            self._loop = asyncio.get_running_loop()
            weakref.finalize(self, self._face._feeds.remove, self._buffer).atexit = False
        self._loop_here()
        while not self._events and self.ended is None:
            self._buffer.arm()
            try:
                await self._face._off_loop(self._take)
            except StoreClosed:
                self._take()  # what was buffered at the close is still delivered
            if not self._events and self.ended is None:
                await self._buffer.woken.wait()

    def _loop_here(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            raise FoldlogError("a watch belongs to the event loop that first reads it")
        return loop

    def _take(self) -> None:
        """Decode up to a chunk of what is buffered. Runs off the loop; the result is kept even if
        the caller is cancelled."""
        face, buffer = self._face, self._buffer
        assert buffer is not None
        if self._subscription is None:
            self._subscription = Subscription(
                face._feeds, face.snapshot, self._prefix, self._since, buffer
            )
            self._since = None  # it may hold a snapshot
        subscription = self._subscription
        while len(self._events) < CHUNK_EVENTS:
            event = subscription.next(0.0)
            if event is None:
                break
            self._events.append(event)
        else:
            return
        self.ended = self.ended or subscription.ended

    def close(self) -> None:
        """Stop watching. Buffered events are dropped, and a task that waits for one is woken."""
        self.ended = self.ended or "closed by its subscriber"
        self._events.clear()
        if self._buffer is not None:
            self._face._feeds.remove(self._buffer)
            self._buffer.end(self.ended, drop=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


open = _opener(
    open_store,
    AsyncStore,
    """`foldlog.open`, off the loop.

    Use `async with aio.open(path) as store`, or `store = await aio.open(path)`.
    If cancelled, it leaves nothing open.
    """,
)
follow = _opener(
    follow_log,
    AsyncFollower,
    """`foldlog.follow`, off the loop.

    Use `async with aio.follow(path) as follower`, or await it.
    If cancelled, it leaves nothing open.
    """,
)
mirror = _opener(
    open_mirror,
    AsyncMirror,
    """`foldlog.mirror`, off the loop.

    Use `async with aio.mirror(path, upstream) as mirror`, or await it.
    If cancelled, it leaves nothing open.
    """,
)
