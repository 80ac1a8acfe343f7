"""The asynchronous faces: the same stores, for programs that run on an event loop.

Reads are plain calls, for they wait for nothing. What waits for the writer is awaited: the request goes into the writer's
mailbox, and the answer comes back through the loop's `call_soon_threadsafe`, one call for all that are answered together. What
may read or decode for long (opening, closing, the start of a watch, its changes) runs on one thread that the store keeps for
this. There is no second engine, and no thread for a call.

A store may be used from several loops, in several threads; a watch belongs to the loop that first reads it.
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
"""Answers that are handed over before the loop gets to do something else."""
CHUNK_EVENTS = 256
"""Events of a watch that are decoded at a time, off the loop."""
SLICE_S = 0.002
"""How long a watch goes on without letting the loop do something else."""
ENCODE_ON_LOOP = 4096
"""Updates of a batch that are encoded on the loop's own thread: about 2 ms. More are encoded off it."""
ROOM_CHECK_S = 0.001
"""Between two looks at whether the mailbox has room again."""

LINK_CHECK_S = 0.02
"""Between two looks at whether a mirror's link is in step."""


class _Bridge:
    """Lets any thread call something on a loop; many calls wake the loop once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # it is kept by loop
        self._calls: deque[Callable[[], object]] = deque()
        self._due = False

    def post(self, call: Callable[[], object]) -> None:
        """Call it on the loop, soon. Never blocks; does nothing for a loop that is closed, where nobody waits any more."""
        self._calls.append(call)  # first: whoever clears `_due` empties the queue after that
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
    """A buffer whose subscriber waits on a loop. Armed, it wakes it once."""

    def __init__(self, bridge: _Bridge, *, keep: bool) -> None:
        super().__init__()
        self._bridge, self._keep = bridge, keep
        self.woken = asyncio.Event()
        self._armed = False

    def arm(self) -> None:
        """Wake the subscriber at what comes from now on. On the loop."""
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
    """What became of a call that was cancelled, or timed out by `asyncio.timeout`, as far as was known at that moment.

    "withdrawn": it was not begun, and will not be. "done": it was carried out. "unknown": the writer has it in hand. None: the
    error did not come out of a call of a store.
    """
    seen: BaseException | None = error
    while seen is not None:
        found: Outcome | None = getattr(seen, "_foldlog_outcome", None)
        if found is not None:
            return found
        seen = seen.__cause__ or seen.__context__
    return None


def _tell(error: asyncio.CancelledError, what: Outcome, note: str) -> None:
    error._foldlog_outcome = what  # type: ignore[attr-defined]
    error.add_note(f"foldlog: {note}")


def _withdraw(future: Future[Any], error: asyncio.CancelledError) -> None:
    """The caller was cancelled: take its request back if it was not begun, and say what is known."""
    if future.cancel():
        _tell(error, "withdrawn", "the request was withdrawn before it was begun")
    elif future.done() and future.exception() is None:
        _tell(error, "done", "the request had been carried out already")
    elif future.done():
        _tell(error, "withdrawn", f"the request had failed already: {future.exception()}")
    else:
        _tell(error, "unknown", "the writer has the request in hand, and will carry it out")


async def _answer(future: Future[Any], timeout_s: float) -> Any:
    """The answer of the writer, awaited."""
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
    if future.done():  # it came in the last moment
        return future.result()
    raise RequestTimeout(f"no answer within {timeout_s} s; its outcome is unknown")


# Opening.


class Opening(Generic[F]):
    """What `open` and `follow` return: `async with` it, or await it."""

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
    """Whoever opened it was cancelled meanwhile."""
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
    """What the asynchronous faces share: the reads, watches, waiting."""

    def __init__(self, opened: S, executor: ThreadPoolExecutor | None = None) -> None:
        self._opened: S = opened
        self._published = opened._published
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="foldlog-aio")

    @property
    def _feeds(self) -> Feeds:
        raise NotImplementedError

    @property
    def path(self) -> Path:
        """The log, absolute, links resolved."""
        return self._opened.path

    def watch(self, prefix: str = "", since: Since = None) -> AsyncWatch:
        """An asynchronous iterator of events, as `Store.watch`: it begins when it is first awaited.

        The bounds are the same, and so is Lagged. It is read by one task at a time.
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
        """Return once reads see everything up to `cursor`, or up to the batch `seq`: see `Follower.wait_for`."""
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
        """Before something that is told by others."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close it, off the loop, as the plain one closes. Closing twice is fine; cancelled, it closes all the same."""
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
        """Run it on the store's own thread for such."""
        try:
            running = self._executor.submit(run)
        except RuntimeError:
            raise StoreClosed(f"{self.path} is closed") from None
        return await asyncio.wrap_future(running)


class _Line:
    """The tasks of a loop that wait for room in the mailbox, in the order in which they came."""

    def __init__(self) -> None:
        self.first = asyncio.Lock()
        """Held by the one that looks for room."""
        self.length = 0


class AsyncStore(_Face[Store]):
    """A store for event loops. Reads are plain calls; what waits for the writer is awaited.

    What an answered call means is what it means for `foldlog.Store`. A call that is cancelled withdraws its request if that was
    not begun; `aio.outcome(error)` tells which.
    """

    def __init__(self, store: Store, executor: ThreadPoolExecutor | None = None) -> None:
        """The face of a store that is open already; `close` closes it. Or use `aio.open`."""
        super().__init__(store, executor)
        self._lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def store(self) -> Store:
        """The plain store: any thread may use it, and what it offers beyond this."""
        return self._opened

    @property
    def _feeds(self) -> Feeds:
        return self._opened._core.feeds

    def _enter(self) -> None:
        self._opened._check_process()

    @property
    def state(self) -> State:
        """What the store is doing."""
        return self._opened.state

    @property
    def synced_cursor(self) -> WatchCursor:
        """The position up to which every update survives a power loss."""
        return self._opened.synced_cursor

    def stats(self) -> Stats:
        """The figures. Cost: microseconds, and counting the entries the first time after a batch."""
        return self._opened.stats()

    async def apply(
        self,
        updates: Iterable[Update],
        cursor: CursorLike,
        timeout_s: float | None = APPLY_TIMEOUT_S,
        *,
        forward_only: bool = False,
    ) -> int:
        """`Store.apply`, awaited: returns the batch's sequence, once written and published.

        Many in flight make one commit group. A full mailbox is waited for, within `timeout_s`.
        """
        self._opened._core.snapshot.seq  # noqa: B018 - StoreClosed comes before complaints about the arguments
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
        """`Store.close`, off the loop. Closing twice is fine; cancelled, it closes all the same."""
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
        """Submit it as soon as the mailbox has room. Backpressure if it has none by the deadline."""
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
            _tell(error, "withdrawn", "the request had not entered the mailbox")
            raise
        except TimeoutError:
            if not waiting.expired():
                raise
            raise full or Backpressure("others wait for room in the mailbox already") from None
        finally:
            line.length -= 1


class AsyncMirror(AsyncStore):
    """A mirror for event loops: an `AsyncStore` that its upstream writes, and nobody else (MirrorReadOnly)."""

    def __init__(self, mirror: Mirror, executor: ThreadPoolExecutor | None = None) -> None:
        """The face of a mirror that is open already; `close` closes it. Or use `aio.mirror`."""
        super().__init__(mirror, executor)
        self._mirror = mirror

    @property
    def mirror(self) -> Mirror:
        """The plain mirror: its link, and what else it tells."""
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
        """The face of a follower that is open already; `close` closes it. Or use `aio.follow`."""
        super().__init__(follower, executor)

    @property
    def follower(self) -> Follower:
        """The plain follower."""
        return self._opened

    @property
    def _feeds(self) -> Feeds:
        return self._opened._thread.feeds

    @property
    def state(self) -> FollowerState:
        """What the follower sees of the log."""
        return self._opened.state

    def stats(self) -> FollowerStats:
        """The figures."""
        return self._opened.stats()

    def _enter(self) -> None:
        self._opened._thread.wake()
        self._opened._thread.woken.set()  # a look at the log, in case its event is late or lost


class AsyncWatch(AsyncIterator[Event]):
    """An asynchronous iterator of events: see `Store.watch`. One task reads it; `close` ends it."""

    def __init__(self, face: _Face[Any], prefix: str, since: Since) -> None:
        """Not for callers: use `watch`."""
        self._face, self._prefix, self._since = face, prefix, since
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscription: Subscription | None = None
        self._buffer: _WakingBuffer | None = None
        # Decoded, and not told yet. Filled on the store's thread, emptied on the loop.
        self._events: deque[Event] = deque()
        self._slice_ends = 0.0
        self.ended: str | None = None
        """Why it is over; None while there may be events."""

    async def __anext__(self) -> Event:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if there is none within `timeout_s`, or if it is over (`ended`).

        Cancelled, it loses nothing: the next call goes on.
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
        return self._events.popleft()

    async def _fetch(self) -> None:
        """Wait until there are events, or it is over."""
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
                self._take()  # what waited when it was closed is still told
            if not self._events and self.ended is None:
                await self._buffer.woken.wait()

    def _loop_here(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            raise FoldlogError("a watch belongs to the event loop that first reads it")
        return loop

    def _take(self) -> None:
        """What waits, decoded, up to a chunk of it. Runs off the loop; what it takes is kept, whoever is cancelled."""
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
        """Listen no more. Events that wait are dropped; a task that waits for one is let go."""
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
    """`foldlog.open`, off the loop: `async with aio.open(path) as store`, or `store = await aio.open(path)`.

    Cancelled, it leaves nothing open.
    """,
)
follow = _opener(
    follow_log,
    AsyncFollower,
    """`foldlog.follow`, off the loop: `async with aio.follow(path) as follower`, or await it.

    Cancelled, it leaves nothing open.
    """,
)
mirror = _opener(
    open_mirror,
    AsyncMirror,
    """`foldlog.mirror`, off the loop: `async with aio.mirror(path, upstream) as mirror`, or await it.

    Cancelled, it leaves nothing open.
    """,
)
