"""What a link gives to its store: which updates, in which form, and one batch at a time.

Only one batch is in flight, so no batch can be written after an earlier one was refused. Updates
that arrive meanwhile form the next batch.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from foldlog.actors.link.progress import Progress
from foldlog.actors.link.resuming import may_delete
from foldlog.actors.store.core import Restart
from foldlog.protocol.errors import Backpressure
from foldlog.protocol.logger import log
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    Batch,
    Delete,
    Put,
    Update,
    UpdateColumns,
    encode_batch,
    keys_of,
)
from foldlog.protocol.upstream import Prefixes, ResetHeld, UpstreamOversize
from foldlog.storage.fold.snapshot import FoldSnapshot

LARGE_BATCH = 20_000
"""Batches of more updates than this are encoded off the loop, so that heartbeats are heard."""
UNRESTED = 16
"""Pieces that may be received, or batches written, before the loop is let run."""
FULL_MAILBOX_S = 0.01
"""How long to wait before a batch is offered again."""

Parse: TypeAlias = Callable[[Update], Update | Iterable[Update] | None]
"""Drops (None), renames or transforms an update. Must be a pure function of the update: audits and
resets call it again."""
OnApplied: TypeAlias = Callable[[Sequence[Update], WatchCursor], object]
"""Called with each batch once it is written and published, on the link's thread."""
_T = TypeVar("_T")


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


class _UnderWay(NamedTuple):
    """The batch in flight."""

    written: Future[int]
    updates: Sequence[Update]
    cursor: WatchCursor


class Intake:
    """See the module. Used on the link's loop alone."""

    def __init__(self, sink: Sink, config: LinkConfig, progress: Progress) -> None:
        self._sink, self._config, self._progress = sink, config, progress
        self.turn = asyncio.Lock()
        """Held while giving a batch to the store. Who holds it sees all that was received before
        applied."""
        self.origin = self.mark = b""
        self.position = WatchCursor.none()
        """What the store's cursor is, once the batch in flight is written."""
        self.in_doubt = False
        """True while held values may be those of another past of the upstream. Then no mark is
        written: it would vouch for them, in case the link attaches again before they are
        audited."""
        self.accepted = False
        """True if the owner has accepted a reset that is still to come."""
        self._skipped: set[str] = set()
        self._under_way: _UnderWay | None = None
        self._unrested = 0  # pieces and batches since the loop was let run

    def wanted(self, updates: Sequence[Update]) -> Sequence[Update]:
        """Those under the prefixes, as `parse` makes them."""
        prefixes, parse = self._config.prefixes, self._config.parse
        if prefixes and type(updates) is UpdateColumns:
            updates = updates.under(prefixes)
        elif prefixes:
            updates = [update for update in updates if update.key.startswith(prefixes)]
        if parse is None:
            return updates
        wanted: list[Update] = []
        for update in updates:
            _called(_parse, parse, update, wanted)
        return wanted

    def check_deletes(self, deleted: int, live: int) -> None:
        """ResetHeld if `deleted` of `live` keys may not be removed without consent."""
        if not self.accepted and not may_delete(deleted, live, self._config.mass_delete):
            raise ResetHeld(f"{deleted} of {live} keys would be deleted")

    @property
    def skipped(self) -> Iterable[str]:
        """The keys of entries over the limits."""
        return self._skipped

    async def apply(
        self, updates: Sequence[Update], cursor: WatchCursor, mark: bytes, rewound: str = ""
    ) -> None:
        """Give the batch to the store. Returns once it is written and published."""
        self.mark = mark
        if len(updates) > LARGE_BATCH:
            batch, updates = await asyncio.to_thread(self._encode, updates, cursor)
        else:
            batch, updates = self._encode(updates, cursor)
        while True:
            try:
                written = self._sink.feed(batch, rewound)
                break
            except Backpressure:
                await asyncio.sleep(FULL_MAILBOX_S)
        self._under_way = _UnderWay(written, updates, cursor)
        if not written.done():
            # Shielded: cancelling this batch while a later one is written would lose updates.
            await asyncio.shield(asyncio.wrap_future(written))
            self._unrested = 0
        written.result()
        self._settled()
        await self.rest()

    async def rest(self) -> None:
        """Let the loop run, once in a while. Call it for each piece received: an upstream whose
        pieces are always ready would otherwise keep the loop from hearing anything else."""
        self._unrested += 1
        if self._unrested >= UNRESTED:
            self._unrested = 0
            await asyncio.sleep(0)

    async def settle(self) -> None:
        """Wait for the batch in flight, if there is one: until then the store's cursor does not
        say where to resume. Its own failure is not raised, but that of the hook is."""
        if self._under_way is not None:
            try:
                await asyncio.shield(asyncio.wrap_future(self._under_way.written))
            except Exception:
                self._under_way = None  # the next attachment starts before it
            else:
                self._settled()

    def _settled(self) -> None:
        assert self._under_way is not None
        _, updates, self.position = self._under_way
        self._under_way = None
        self._progress.updates += len(updates)
        if self._config.on_applied is not None:
            _called(self._config.on_applied, updates, self.position)

    def _encode(
        self, updates: Sequence[Update], cursor: WatchCursor
    ) -> tuple[Batch, Sequence[Update]]:
        origin = self.origin
        if self._sink.keeps_marks and not self.in_doubt:
            origin += self.mark
        try:
            batch = encode_batch(updates, cursor, origin)
        except ValueError:
            updates = self._within_limits(updates)
            batch = encode_batch(updates, cursor, origin)
        else:
            if self._skipped:
                self._skipped.difference_update(keys_of(updates))
        self._progress.skipped = len(self._skipped)
        return batch, updates

    def _within_limits(self, updates: Sequence[Update]) -> list[Update]:
        """The updates without those over the limits. UpstreamOversize unless these are skipped. The
        log can say nothing of a key over the limit, and never held it."""
        within: list[Update] = []
        for update in updates:
            key_bytes = len(update.key.encode(errors="surrogatepass"))
            value_bytes = len(update.value) if isinstance(update, Put) else 0
            if key_bytes <= MAX_KEY_BYTES and value_bytes <= MAX_VALUE_BYTES:
                within.append(update)
                self._skipped.discard(update.key)
            elif not isinstance(update, Put):
                self._skipped.discard(update.key)
            else:
                is_key = key_bytes > MAX_KEY_BYTES
                what = f"it takes {key_bytes}" if is_key else f"its value takes {value_bytes}"
                reason = f"key {update.key[:80]!r} cannot be held: {what} bytes"
                if not self._config.skip_oversize:
                    raise UpstreamOversize(reason, update.key)
                log.warning("%s: skipped: %s", self._progress.name, reason)
                self._skipped.add(update.key)
                if not is_key:  # an older value is no longer the upstream's
                    within.append(Delete(update.key, update.version))
        return within


def _parse(parse: Parse, update: Update, wanted: list[Update]) -> None:
    """Add to `wanted` what `parse` makes of the update: perhaps a generator, which runs here."""
    parsed = _plain(parse, parse(update))
    if isinstance(parsed, (Put, Delete)) or hasattr(parsed, "version"):
        wanted.append(parsed)  # type: ignore[arg-type]
    elif parsed is not None:
        wanted += parsed


class HookFailed(Exception):
    """A hook of the program raised `error`: the link's own failure, whatever kind of error it
    is."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def _called(hook: Callable[..., object], *arguments: object) -> None:
    try:
        _plain(hook, hook(*arguments))
    except BaseException as error:  # an exit, too: it would end the event loop
        raise HookFailed(error) from error


def _plain(hook: Callable[..., object], answer: _T) -> _T:
    """What a hook answers. TypeError if that is a coroutine, which nobody would run."""
    if inspect.iscoroutine(answer):
        answer.close()
        raise TypeError(f"{hook!r} is asynchronous: a hook is a plain function")
    return answer
