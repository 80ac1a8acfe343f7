"""Derived state: your own data structure (a route trie, an inverted index), kept in step with a
store.

A thread takes each commit group that the store publishes, passes its batches to `update` one by
one, and publishes the result with its snapshot as one immutable pair. Readers load that pair
without a lock or a message.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from foldlog.actors.base.threads import OwnThread
from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.feeds.ring import Group, Lost, Place
from foldlog.follow import Follower
from foldlog.protocol.closing import Closing
from foldlog.protocol.engine import Snapshot
from foldlog.protocol.errors import StoreClosed
from foldlog.protocol.logger import log
from foldlog.protocol.options import check_callable, check_timeout
from foldlog.protocol.tokens import CursorLike
from foldlog.protocol.updates import Update
from foldlog.storage.handover import Bell
from foldlog.store import Store
from foldlog.waiting import WAIT_TIMEOUT_S, Position, SeqLike
from foldlog.watched import Watched

V = TypeVar("V")
Build: TypeAlias = Callable[[Any], V]
ApplyUpdates: TypeAlias = Callable[[V, Sequence[Update]], V]


class DerivedState(NamedTuple, Generic[V]):
    """A derived value and the snapshot it was derived from."""

    value: V
    snapshot: Snapshot


class _Worker(Generic[V]):
    """The thread's side. It holds no reference to the `Derived`, so that a dropped one can be
    detected."""

    def __init__(self, feeds: Feeds, build: Build[V], update: ApplyUpdates[V], prefix: str) -> None:
        self.feeds, self.build, self.update, self.prefix = feeds, build, update, prefix
        self.bookmark = Bookmark()  # of any prefix: each group moves the snapshot on
        # Written only by the thread, replaced whole. Invariant: `value` equals `build(snapshot)`.
        self.state: DerivedState[V]
        self.error: Exception | None = None
        self.rebuilds = 0
        self._advanced = Bell()

    def start(self, current: Callable[[], Snapshot]) -> None:
        """Build the first state, on the caller's thread, and start. Raises what `build` raises. The
        caller then calls `_end`."""
        self.feeds.add(self.bookmark)  # first: nothing published during the build may be missed
        at = current()
        self.state = DerivedState(self.build(at), at)
        self.bookmark.start_at(at)
        OwnThread("foldlog-derive", self._run, self._end).begin()

    def _run(self) -> None:
        while (taken := self.bookmark.first()) is not None or self.bookmark.ended is None:
            if taken is not None:
                self._follow(taken)
                self.bookmark.drop(taken)
                self._advanced.ring()

    def _end(self) -> None:  # also after a SystemExit in the user's functions
        self.feeds.remove(self.bookmark)
        self.bookmark.end("its thread ended", drop=True)
        self._advanced.ring()

    def _follow(self, taken: Group | Lost | Place) -> None:
        fold, at = taken.fold, self.state.snapshot
        if not isinstance(taken, Group) or taken.rewound or self.error is not None:
            self._rebuild(fold)
        elif fold.seq <= at.seq:
            if fold.seq == at.seq:  # same state in a newer file: release the old one
                self.state = DerivedState(self.state.value, fold)
        elif len(taken) and taken.first_seq <= at.seq + 1:
            try:
                value = self._updated(taken, at.seq)
            except Exception:
                log.exception("an update of derived state failed; rebuilding it")
                self._rebuild(fold)
            else:
                self.state = DerivedState(value, fold)
        else:
            self._rebuild(fold)

    def _updated(self, group: Group, seen_seq: int) -> V:
        value, prefix = self.state.value, self.prefix
        if not group.touches(prefix):
            return value
        for seq, changes in group.events:
            if seq > seen_seq:
                updates = [
                    change.update for change in changes if change.update.key.startswith(prefix)
                ]
                if updates:
                    value = self.update(value, updates)
        return value

    def _rebuild(self, fold: Snapshot) -> None:
        self.rebuilds += 1
        try:
            state = DerivedState(self.build(fold), fold)
        except Exception as error:  # keep serving the last value; the next change tries again
            log.exception("derived state could not be built")
            self.error = error
        else:
            self.state, self.error = state, None

    def wait_for(self, position: Position, timeout_s: float) -> None:
        def is_over() -> bool:
            return self.bookmark.ended is not None and not len(self.bookmark)

        def is_reached() -> bool:
            return position.is_reached(self.state.snapshot)

        if not self._advanced.wait_for(lambda: is_reached() or is_over(), timeout_s):
            raise position.timeout(self.state.snapshot, timeout_s)
        if not is_reached():
            raise StoreClosed(str(self.bookmark.ended))


class Derived(Closing, Generic[V]):
    """Derived state, kept in step with its source. Any thread may read it. After `close`, it keeps
    its last value."""

    def __init__(self, worker: _Worker[V], source: Store | Follower) -> None:
        """Not for callers: use `foldlog.derive`."""
        self._worker, self._source = worker, source
        self._finalizer = weakref.finalize(self, _end, worker)
        self._finalizer.atexit = False

    @property
    def state(self) -> DerivedState[V]:
        """The newest value with its snapshot. Loaded at once, so the two always belong together."""
        return self._worker.state

    @property
    def value(self) -> V:
        """The newest value. If you need its snapshot as well, load `state` once and take both from
        it."""
        return self._worker.state.value

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot of the newest value."""
        return self._worker.state.snapshot

    @property
    def error(self) -> Exception | None:
        """What `build` raised, if the last rebuild failed. The last good value is served, and the
        next change tries again."""
        return self._worker.error

    @property
    def rebuilds(self) -> int:
        """Rebuilds so far: after a lag, a rewind, a restart of the writer, or a failed update."""
        return self._worker.rebuilds

    @property
    def ended(self) -> str | None:
        """Why the value is no longer updated; None while it is."""
        return self._worker.bookmark.ended

    def wait_for(
        self,
        cursor: CursorLike | None = None,
        timeout_s: float | None = WAIT_TIMEOUT_S,
        *,
        seq: SeqLike | None = None,
    ) -> None:
        """Wait until the value includes everything up to `cursor` or batch `seq`: see
        `Follower.wait_for`."""
        self._worker.wait_for(Position(cursor, seq), check_timeout(timeout_s))

    def close(self) -> None:
        """Stop updating the value. Closing twice is fine."""
        _end(self._worker)  # can be repeated, if it is interrupted
        self._finalizer.detach()


def _end(worker: _Worker[V]) -> None:
    worker.feeds.remove(worker.bookmark)
    worker.bookmark.end("closed by its owner", drop=True)


def derive(
    store: Store | Follower, build: Build[V], update: ApplyUpdates[V], *, prefix: str = ""
) -> Derived[V]:
    """Keep your own data structure in step with `store`, batch by batch.

    `build(snapshot)` creates the value from a state; an error from the first call is raised here.
    `update(value, updates)` returns the next value, given the last one and the updates of one batch
    under `prefix`, in upstream order: a non-empty sequence of Put, Delete and Purge. It must not
    change `value` in place, because readers hold it: copy what changes. Except for the first
    `build`, both run on a thread of their own, which publishes the value with its snapshot after
    each commit group.

    After a lag, a rewind, a restart of the writer, or an error in `update`, the value is rebuilt
    from the state.

    >>> with foldlog.open("names.log") as names:
    ...     with foldlog.derive(
    ...         names,
    ...         build=lambda state: frozenset(state),
    ...         update=lambda known, updates: known | {update.key for update in updates},
    ...     ) as ever_seen:
    ...         version = names.put("ada", b"1815")
    ...         ever_seen.wait_for(seq=version)
    ...         sorted(ever_seen.value)
    ['ada']
    """
    if not isinstance(prefix, str):
        raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
    if not isinstance(store, Watched):
        raise TypeError(
            f"state is derived from a store or a follower, not from a {type(store).__name__}"
        )
    check_callable("build", build)
    check_callable("update", update)
    store._enter()
    worker = _Worker(store._feeds, build, update, prefix)
    try:
        worker.start(store.snapshot)
        return Derived(worker, store)
    except BaseException:
        _end(worker)  # its thread may have begun
        raise
