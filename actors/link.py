"""The link: feeds a store from an upstream, on an event loop in a thread of its own.

It survives every error:

| what fails                  | what happens                       | what callers see              |
|-----------------------------|------------------------------------|-------------------------------|
| connection, a gap, silence  | detach; attach at the cursor       | LOST, then ATTACHING          |
| the store refuses a batch   | the same                           | LOST with the store's error   |
| the bucket does not exist   | wait for it                        | LOST, with that reason        |
| credentials, permissions    | nothing: a retry cannot help       | FAILED with UpstreamRefused   |
| new upstream, a mass delete | nothing is written; the link waits | FAILED until `accept_reset()` |
| an update over the limits   | nothing is written, or skipped     | FAILED with UpstreamOversize  |
| a hook, or a bug            | restarted, within a limit          | a Restart, finally FAILED     |

Reads continue throughout. Detaching discards all received state: the store's cursor alone says
where to resume. Only one batch is in flight at a time, so no batch can be written after an earlier
one was refused. Updates that arrive meanwhile form the next batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import os
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from foldlog.actors.adapter import log
from foldlog.actors.core import Restart
from foldlog.actors.resuming import (
    Audit,
    Held,
    Plan,
    Step,
    audit_delay_s,
    mark_of,
    may_delete,
    plan,
    retry_delay_s,
    scoped_origin,
)
from foldlog.protocol.errors import Backpressure, FoldlogError, StoreClosed
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    Batch,
    Delete,
    KvEntry,
    Put,
    Update,
    encode_batch,
)
from foldlog.protocol.upstream import (
    Changes,
    Closable,
    HasMarks,
    HasRevisions,
    HasState,
    Identity,
    Prefixes,
    ResetHeld,
    Upstream,
    UpstreamError,
    UpstreamLost,
    UpstreamMissing,
    UpstreamOversize,
    UpstreamRefused,
)
from foldlog.storage.fold.snapshot import FoldSnapshot

CONFIRM_S = 1.0
"""Delay between the two identity checks that confirm an upstream went back. A deposed leader has
stepped down by then."""
AUDIT_S_PER_KEY = 8e-6
"""Estimated cost of an audit, for its budget: 4.4 us a key measured with NATS, plus comparing."""
CLOSE_S = 5.0
LARGE_BATCH = 20_000
"""Batches of more updates than this are encoded off the loop, so that heartbeats are heard."""

Parse: TypeAlias = Callable[[Update], Update | Iterable[Update] | None]
"""Drops (None), renames or transforms an update. Must be a pure function of the update: audits and
resets call it again."""
OnApplied: TypeAlias = Callable[[Sequence[Update], WatchCursor], object]
"""Called with each batch once it is written and published, on the link's thread."""


class LinkState(enum.StrEnum):
    """What a link is doing."""

    ATTACHING = "attaching"
    CATCHING_UP = "catching up"
    """Attached; missed changes are still to arrive or to be audited."""
    LIVE = "live"
    """Equal to the upstream, as of the last confirmation."""
    LOST = "lost"
    """The upstream or the store is unavailable (`reason`); the link will attach again soon."""
    FAILED = "failed"
    """Given up (`reason`). A held reset resumes with `accept_reset()`."""
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """The options of a link. See `foldlog.mirror`."""

    prefixes: Prefixes = ()
    parse: Parse | None = None
    on_applied: OnApplied | None = None
    skip_oversize: bool = False
    mass_delete: float = 0.5
    audit_interval_s: float = 60.0
    audit_budget: float = 0.01
    max_restarts: int = 5
    restart_window_s: float = 60.0


@dataclass(frozen=True, slots=True)
class LinkStats:
    """The statistics of a link at one moment."""

    state: LinkState
    reason: str
    lag: int | None
    """Updates waiting upstream; None if unknown."""
    staleness_s: float
    """Since the upstream last confirmed that no updates wait; infinite if it never did."""
    updates: int
    """Received and applied since the mirror was opened."""
    attaches: int
    audits: int
    mended: int
    """Entries that audits found wrong and corrected."""
    resets: int
    skipped: int
    """Entries over the limits that the mirror omits."""


class Sink(Protocol):
    """What a link needs of its store."""

    @property
    def keeps_marks(self) -> bool:
        """True if the log stores the mark next to each cursor; False if the origin is kept in a
        file beside the log."""

    def snapshot(self) -> FoldSnapshot:
        """The published state."""

    def feed(self, batch: Batch, rewound: str) -> Future[int]:
        """Give the batch to the writer. A non-empty `rewound` is passed on to watchers. Raises
        Backpressure, StoreFailed and the like."""

    def note_restart(self, restart: Restart) -> None:
        """Count a restart."""


class Link:
    """See the module. Call `start` once; any thread may query it and stop it."""

    def __init__(self, name: str, sink: Sink, upstream: Upstream, config: LinkConfig) -> None:
        self._name, self._sink, self._upstream, self._config = name, sink, upstream, config
        self.changed = threading.Condition()
        """Notified of each change of state."""
        # All below: written by the link's thread, replaced whole, read by any thread.
        self.state = LinkState.ATTACHING
        self.reason = ""
        self.error: Exception | None = None
        """Why it is FAILED."""
        self.behind: int | None = None
        self.confirmed_at = -float("inf")
        self.updates = self.attaches = self.audits = self.mended = self.resets = 0
        self._skipped: dict[str, bytes] = {}
        self._restarts_s: list[float] = []
        self._logged = ""
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._accepted = False
        self._accept: asyncio.Event | None = None
        # State of one attachment.
        self._turn = asyncio.Lock()  # held while giving a batch to the store
        self._under_way: Future[int] | None = None
        self._origin = self._mark = b""
        self._values_in_doubt = False
        self._position = WatchCursor.none()
        self._touched: set[str] | None = None
        self._audited = self._caught_up = False
        self._moved = asyncio.Event()
        """Set whenever the tail has received an update or a sign of life."""
        self.thread = threading.Thread(target=self._run, name="foldlog-link", daemon=True)

    # Called from any thread.

    def start(self) -> None:
        """Start the thread. RuntimeError if no thread can be started."""
        self.thread.start()

    def ask_to_stop(self) -> None:
        """Tell the thread to end. Never blocks."""
        self._stopping = True
        self._on_loop(lambda: self._task.cancel() if self._task is not None else None)

    def stop(self, timeout_s: float = CLOSE_S) -> None:
        """Stop and wait for the thread to end; from the link's own thread, returns at once."""
        self.ask_to_stop()
        if threading.current_thread() is self.thread or self._pid != os.getpid():
            return
        deadline = time.monotonic() + timeout_s
        while self.thread.is_alive() and time.monotonic() < deadline:
            self.thread.join(0.25)
            # Ask again: a client library may have swallowed the cancellation.
            self.ask_to_stop()

    def accept_reset(self) -> None:
        """Accept the held reset. Does nothing if no reset is held."""
        if isinstance(self.error, ResetHeld):
            self._accepted = True
            self._on_loop(lambda: self._accept.set() if self._accept is not None else None)

    @property
    def staleness_s(self) -> float:
        """Seconds since the upstream last confirmed that no updates wait; infinite if it never
        did."""
        return time.monotonic() - self.confirmed_at

    def stats(self) -> LinkStats:
        """The link's current statistics."""
        return LinkStats(
            self.state,
            self.reason,
            self.behind,
            self.staleness_s,
            self.updates,
            self.attaches,
            self.audits,
            self.mended,
            self.resets,
            len(self._skipped),
        )

    def __repr__(self) -> str:
        return f"<foldlog link {self.state}>"

    def _on_loop(self, call: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None and self._pid == os.getpid():
            with contextlib.suppress(RuntimeError):  # the loop is closed: the thread has ended
                loop.call_soon_threadsafe(call)

    # Runs on the link's thread.

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except (asyncio.CancelledError, KeyboardInterrupt):
            pass
        except BaseException as error:
            log.critical("%s: the link died", self._name, exc_info=True)
            self._fail(error if isinstance(error, Exception) else FoldlogError(repr(error)))
            return
        self._set(LinkState.CLOSED)

    def _set(self, state: LinkState, reason: str = "") -> None:
        if state is self.state and reason == self.reason:
            return
        level = log.warning if state in (LinkState.LOST, LinkState.FAILED) else log.info
        if not reason or reason != self._logged:  # log a repeated failure once, not each retry
            level("%s: link %s%s", self._name, state, f": {reason}" if reason else "")
        self._logged = reason
        with self.changed:
            self.state, self.reason = state, reason
            self.changed.notify_all()

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._set(LinkState.FAILED, str(error))

    async def _main(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._accept = asyncio.Event()
        attempt = 0
        while not self._stopping:
            confirmed = self.confirmed_at
            try:
                await self._attach()
                error: BaseException = UpstreamLost("the upstream ended its changes")
            except BaseException as raised:
                error = raised
            finally:
                await self._let_go()
            if isinstance(error, (asyncio.CancelledError, StoreClosed)) or self._stopping:
                return
            attempt = 0 if self.confirmed_at > confirmed else attempt + 1
            await self._after(error, attempt)

    async def _let_go(self) -> None:
        self._touched, self._audited, self._caught_up, self.behind = None, False, False, None
        if isinstance(self._upstream, Closable):
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await self._upstream.close()
        under_way, self._under_way = self._under_way, None
        if under_way is not None and not self._stopping:  # else the cursor is read too early
            with contextlib.suppress(Exception):
                await asyncio.shield(asyncio.wrap_future(under_way))

    async def _after(self, error: BaseException, attempt: int) -> None:
        """Wait before the next attempt, as `error` requires."""
        if isinstance(error, ResetHeld):
            assert self._accept is not None
            self._accept.clear()
            self._fail(error)
            await self._accept.wait()
            self.error = None
        elif isinstance(error, (UpstreamRefused, UpstreamOversize)):
            self._fail(error)
            await asyncio.Event().wait()
        elif isinstance(error, (UpstreamError, FoldlogError, OSError)):
            self._set(LinkState.LOST, str(error) or type(error).__name__)
            missing = isinstance(error, UpstreamMissing)
            await asyncio.sleep(retry_delay_s(5 if missing else attempt, random.random()))
        else:
            await self._restart(error)

    async def _restart(self, error: BaseException) -> None:
        now, config = time.monotonic(), self._config
        recent = [at for at in self._restarts_s if now - at < config.restart_window_s]
        reason = f"{type(error).__name__}: {error}"
        if len(recent) >= config.max_restarts:
            self._fail(error if isinstance(error, Exception) else FoldlogError(reason))
            await asyncio.Event().wait()
        self._restarts_s = [*recent, now]
        delay_s = 0.05 * 2.0 ** len(recent) * random.uniform(0.5, 1.0) if recent else 0.0
        self._sink.note_restart(Restart("link", reason, time.time(), delay_s))
        log.warning("%s: the link died (%s)", self._name, reason, exc_info=error)
        self._set(LinkState.LOST, reason)
        await asyncio.sleep(delay_s)

    # One attachment.

    async def _attach(self) -> None:
        self._set(LinkState.ATTACHING, self.reason if self.state is LinkState.LOST else "")
        self.attaches += 1
        found, decided = await self._decide()
        self._origin, self._mark = found.origin, mark_of(self._sink.snapshot().origin, found.origin)
        if decided.step is Step.LOAD:
            await self._load(found)
        elif decided.step is Step.REPLACE:
            await self._replace(found, decided)
        self._set(LinkState.CATCHING_UP)
        self._position = self._sink.snapshot().cursor()
        tasks = {asyncio.create_task(self._tail(self._position))}
        if self._can_audit:
            audits = self._keep_auditing(at_once=decided.step is Step.RESUME)
            tasks.add(asyncio.create_task(audits))
        else:
            self._audited = True
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _end(tasks)

    async def _decide(self) -> tuple[Identity, Plan]:
        found = await self._identify()
        decided = await self._recalled(self._plan(found), found)
        if decided.step is Step.HOLD:
            raise ResetHeld(decided.reason)
        if decided.rewound:
            await asyncio.sleep(CONFIRM_S)
            again = await self._identify()
            if again.origin != found.origin or (
                await self._recalled(self._plan(again), again) != decided
            ):
                raise UpstreamLost("the upstream is not sure who it is")
            found = again
        return found, decided

    async def _recalled(self, decided: Plan, found: Identity) -> Plan:
        """The plan; another one if it is to resume and the upstream says that the position belongs
        to different changes."""
        self._values_in_doubt = False
        if decided.step is not Step.RESUME or not isinstance(self._upstream, HasMarks):
            return decided
        fold = self._sink.snapshot()
        mark = mark_of(fold.origin, found.origin)
        known = await self._upstream.recalls(fold.cursor(), mark) if mark else None
        self._values_in_doubt = known is None
        if known is False:
            return Plan(Step.REPLACE, "the upstream was restored from a copy", rewound=True)
        return decided

    async def _identify(self) -> Identity:
        found = await self._upstream.identify()
        if not 1 <= len(found.origin) <= 32:
            raise UpstreamRefused(f"an origin has 1 to 32 bytes, not {len(found.origin)}")
        return found._replace(origin=scoped_origin(found.origin, self._config.prefixes))

    def _plan(self, found: Identity) -> Plan:
        fold = self._sink.snapshot()
        held = Held(fold.origin, fold.cursor(), len(fold) == 0)
        return plan(held, found, accepted=self._accepted)

    async def _state(self, found: Identity) -> AsyncGenerator[Changes, None]:
        """All live entries, by whichever means the upstream offers."""
        upstream, prefixes = self._upstream, self._config.prefixes
        if isinstance(upstream, HasState):
            pieces = upstream.state(prefixes)
        elif found.first.is_none:
            pieces = upstream.changes(WatchCursor.none(), prefixes)
        else:
            raise UpstreamRefused("the upstream no longer reaches back, and tells no state")
        async with contextlib.AsyncExitStack() as stack:
            if inspect.isasyncgen(pieces):
                stack.push_async_callback(pieces.aclose)
            if not isinstance(upstream, HasState) and found.last.is_none:
                return
            async for piece in pieces:
                yield piece
                if not isinstance(upstream, HasState) and piece.position >= found.last:
                    return

    async def _load(self, found: Identity) -> None:
        """Load the state into a store that is empty or partly loaded. The cursor is written
        last."""
        self._set(LinkState.CATCHING_UP, "loading")
        none, position = WatchCursor.none(), found.last
        held = dict(_versions(self._sink.snapshot()))
        live = len(held)
        async with contextlib.aclosing(self._state(found)) as pieces:
            async for piece in pieces:
                updates = self._wanted(piece.updates)
                position, self._mark = piece.position, piece.mark
                if held:
                    updates = [u for u in updates if held.pop(u.key, None) != u.version]
                if updates:
                    await self._apply(updates, none)
        self._check_deletes(len(held), live)
        await self._apply([Delete(key) for key in held], position)
        self._accepted = False

    async def _replace(self, found: Identity, decided: Plan) -> None:
        """Fold the difference to the whole state as one batch."""
        self._set(LinkState.CATCHING_UP, decided.reason)
        state: dict[str, Put] = {}
        position = found.last
        async with contextlib.aclosing(self._state(found)) as pieces:
            async for piece in pieces:
                for update in self._wanted(piece.updates):
                    if isinstance(update, Put):
                        state[update.key] = update
                    else:
                        state.pop(update.key, None)
                position, self._mark = piece.position, piece.mark
        fold = self._sink.snapshot()
        updates = await asyncio.to_thread(_difference, fold, state)
        self._check_deletes(sum(type(update) is Delete for update in updates), len(fold))
        rewound = decided.reason if decided.rewound else ""
        await self._apply(updates, position, rewound)
        self.resets += 1
        self._accepted = False

    def _check_deletes(self, deleted: int, live: int) -> None:
        if not self._accepted and not may_delete(deleted, live, self._config.mass_delete):
            raise ResetHeld(f"{deleted} of {live} keys would be deleted")

    async def _tail(self, cursor: WatchCursor) -> None:
        changes = self._upstream.changes(cursor, self._config.prefixes)
        async with contextlib.AsyncExitStack() as stack:
            if inspect.isasyncgen(changes):
                stack.push_async_callback(changes.aclose)
            async for piece in changes:
                await self._take(piece)

    async def _take(self, piece: Changes) -> None:
        updates = self._wanted(piece.updates)
        if self._touched is not None:
            self._touched.update(update.key for update in updates)
        async with self._turn:
            if updates or piece.position != self._position:
                self._mark = piece.mark
                await self._apply(updates, piece.position)
        self.behind = piece.behind
        self._moved.set()
        if piece.behind == 0:
            self.confirmed_at = time.monotonic()
            self._caught_up = True
            self._set_live()

    def _set_live(self) -> None:
        if self._caught_up and self._audited:
            self._set(LinkState.LIVE)

    # Applying updates.

    def _wanted(self, updates: Sequence[Update]) -> Sequence[Update]:
        prefixes, parse = self._config.prefixes, self._config.parse
        if prefixes:
            updates = [update for update in updates if update.key.startswith(prefixes)]
        if parse is None:
            return updates
        wanted: list[Update] = []
        for update in updates:
            parsed = parse(update)
            if isinstance(parsed, (Put, Delete)) or hasattr(parsed, "version"):
                wanted.append(parsed)  # type: ignore[arg-type]
            elif parsed is not None:
                wanted += parsed
        return wanted

    async def _apply(
        self, updates: Sequence[Update], cursor: WatchCursor, rewound: str = ""
    ) -> None:
        """Give the batch to the store. Returns once it is written and published."""
        if len(updates) > LARGE_BATCH:
            batch, updates = await asyncio.to_thread(self._encode, updates, cursor)
        else:
            batch, updates = self._encode(updates, cursor)
        while True:
            try:
                self._under_way = self._sink.feed(batch, rewound)
                break
            except Backpressure:
                await asyncio.sleep(0.01)
        # Shielded: cancelling this batch while a later one is written would lose updates.
        await asyncio.shield(asyncio.wrap_future(self._under_way))
        self._under_way = None
        self._position = cursor
        self.updates += len(updates)
        if self._config.on_applied is not None:
            self._config.on_applied(updates, cursor)

    def _encode(
        self, updates: Sequence[Update], cursor: WatchCursor
    ) -> tuple[Batch, Sequence[Update]]:
        origin = self._origin + self._mark if self._sink.keeps_marks else self._origin
        try:
            batch = encode_batch(updates, cursor, origin)
        except ValueError:
            updates = [self._held(update) for update in updates]
            batch = encode_batch(updates, cursor, origin)
        if self._skipped:
            for update in updates:
                if isinstance(update, Put):
                    self._skipped.pop(update.key, None)
        return batch, updates

    def _held(self, update: Update) -> Update:
        """The update; or a delete of its key, if it is over the limits and those are skipped."""
        size = len(update.key.encode(errors="surrogatepass"))
        value = len(update.value) if isinstance(update, Put) else 0
        if size <= MAX_KEY_BYTES and value <= MAX_VALUE_BYTES:
            return update
        what = f"its value takes {value} bytes" if value else f"it takes {size} bytes"
        if size > MAX_KEY_BYTES or not self._config.skip_oversize:
            raise UpstreamOversize(f"key {update.key[:80]!r} cannot be held: {what}", update.key)
        log.warning("%s: key %r is skipped: %s", self._name, update.key[:80], what)
        self._skipped[update.key] = bytes(update.version)
        return Delete(update.key, update.version)

    # Audits.

    @property
    def _can_audit(self) -> bool:
        upstream = self._upstream
        return isinstance(upstream, HasRevisions) and isinstance(upstream, HasState)

    async def _keep_auditing(self, *, at_once: bool) -> None:
        config, delay_s = self._config, 0.0
        if not at_once:
            self._audited, delay_s = True, config.audit_interval_s
        while True:
            await asyncio.sleep(delay_s)
            await self._until(lambda: self._caught_up)
            clean = await self._audit()
            self.audits += 1
            cost_s = AUDIT_S_PER_KEY * len(self._sink.snapshot())
            delay_s = audit_delay_s(cost_s, config.audit_budget, config.audit_interval_s)
            if clean:
                self._audited, self._accepted = True, False
                self._set_live()
            else:
                delay_s = 0.0  # check what was corrected

    async def _audit(self) -> bool:
        """Compare the fold with the upstream and correct it. True if nothing was wrong."""
        self._touched = set()
        try:
            with_values, self._values_in_doubt = self._values_in_doubt, False
            version_of = _with_value if with_values else _version
            found, position = await self._revisions(version_of)
            audit = Audit(found, self._touched)
            asked = time.monotonic()
            # Changes that the audit saw and the tail has yet to receive would count as missing.
            await self._until(lambda: self._position >= position or self.confirmed_at > asked)
            async with self._turn:  # everything received is applied
                fold = self._sink.snapshot()
            for number, block in enumerate(fold.blocks()):
                audit.compare((entry.key, version_of(entry)) for entry in block)
                if number % 8 == 7:
                    await asyncio.sleep(0)
            suspects = audit.end().difference(self._skipped)
            return not suspects or not await self._mend(suspects)
        finally:
            self._touched = None

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._moved.clear()
            await self._moved.wait()

    async def _revisions(
        self, version_of: Callable[[Put | KvEntry], bytes]
    ) -> tuple[dict[str, bytes], WatchCursor]:
        config, upstream = self._config, self._upstream
        if config.parse is not None or version_of is _with_value:
            # Versions that are not the upstream's own, or that may have been assigned twice.
            assert isinstance(upstream, HasState)
            return await self._state_versions(upstream, version_of)
        assert isinstance(upstream, HasRevisions)
        found = await upstream.revisions(config.prefixes)
        versions = dict(found.versions)
        if config.prefixes:
            versions = {k: v for k, v in versions.items() if k.startswith(config.prefixes)}
        return versions, found.position

    async def _state_versions(
        self, upstream: HasState, version_of: Callable[[Put | KvEntry], bytes]
    ) -> tuple[dict[str, bytes], WatchCursor]:
        versions: dict[str, bytes] = {}
        position = WatchCursor.none()
        async for piece in upstream.state(self._config.prefixes):
            for update in self._wanted(piece.updates):
                if isinstance(update, Put):
                    versions[update.key] = version_of(update)
                else:
                    versions.pop(update.key, None)
            position = piece.position
        return versions, position

    async def _mend(self, suspects: set[str]) -> bool:
        """Read the suspects again and fold what differs. True if anything did."""
        upstream = self._upstream
        assert isinstance(upstream, HasState)
        entries: dict[str, Put] = {}
        async for piece in upstream.state(self._config.prefixes):
            for update in self._wanted(piece.updates):
                if update.key in suspects:
                    if isinstance(update, Put):
                        entries[update.key] = update
                    else:
                        entries.pop(update.key, None)
        async with self._turn:
            fold, touched = self._sink.snapshot(), self._touched or ()
            updates: list[Update] = []
            rewound = ""
            for key in sorted(suspects.difference(touched)):
                held, true = fold.get(key), entries.get(key)
                if true is None:
                    if held is not None:
                        updates.append(Delete(key))
                elif held != KvEntry(*true):
                    updates.append(true)
                    if held is not None and bytes(true.version) < bytes(held.version):
                        rewound = "the upstream went back: an audit found older entries"
            deleted = sum(type(update) is Delete for update in updates)
            self._check_deletes(deleted, len(fold))
            if updates:
                log.info("%s: an audit mends %d entries", self._name, len(updates))
                await self._apply(updates, self._position, rewound)
                self.mended += len(updates)
                self._accepted = False
        return bool(updates)


def _version(entry: Put | KvEntry) -> bytes:
    return bytes(entry.version)


def _with_value(entry: Put | KvEntry) -> bytes:
    return entry.version + hash(entry.value).to_bytes(8, "big", signed=True)


def _versions(fold: FoldSnapshot) -> Iterable[tuple[str, bytes]]:
    return ((entry.key, bytes(entry.version)) for block in fold.blocks() for entry in block)


def _difference(fold: FoldSnapshot, state: dict[str, Put]) -> list[Update]:
    updates: list[Update] = []
    for block in fold.blocks():
        for entry in block:
            true = state.pop(entry.key, None)
            if true is None:
                updates.append(Delete(entry.key))
            elif entry != KvEntry(*true):
                updates.append(true)
    updates += state.values()
    return updates


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel the tasks and wait until they have ended. Repeats, since a client library may swallow
    a cancellation."""
    rest = {task for task in tasks if not task.done()}
    while rest:
        for task in rest:
            task.cancel()
        _, rest = await asyncio.wait(rest, timeout=0.5)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # mark it as retrieved
