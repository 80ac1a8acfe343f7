"""A mirror: an exact copy of an upstream, kept in step by a link that recovers by itself."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pykka

from foldlog.actors.base.adapter import Mail, Place, SharedActor
from foldlog.actors.link.progress import LinkState, LinkStats
from foldlog.actors.store.core import Core, Restart, Stats
from foldlog.actors.store.requests import LocalWrite, Request, WriteRequest
from foldlog.protocol.errors import FoldlogError, ForkedStore, RequestTimeout, StoreClosed
from foldlog.protocol.options import (
    APPLY_TIMEOUT_S,
    AUDIT_INTERVAL_S,
    CLOSE_TIMEOUT_S,
    MASS_DELETE,
    ON_OVERSIZE,
    OnOversize,
    check_text,
    check_timeout,
)
from foldlog.protocol.store import StrPath
from foldlog.protocol.tokens import CursorLike, VersionToken
from foldlog.protocol.updates import Batch, Update
from foldlog.protocol.upstream import MirrorReadOnly, Upstream
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.store import Store, open

if TYPE_CHECKING:
    from foldlog.actors.link.intake import LinkConfig, OnApplied, Parse
    from foldlog.actors.link.link import Link

# The link is imported on first use: it needs asyncio, which a store does not.

SYNC_TIMEOUT_S = 30.0
TURN_BYTES = 16 * 1024
TURN_UPDATES = 16
"""The link's thread writes a batch of up to this size itself, if the writer is idle. While a larger
one is written, it receives the next, which is larger still if many updates wait."""


def mirror(
    path: StrPath,
    upstream: Upstream,
    *,
    prefix: str | Sequence[str] = "",
    parse: Parse | None = None,
    on_applied: OnApplied | None = None,
    on_oversize: OnOversize = "fail",
    mass_delete: float = MASS_DELETE.default,
    audit_interval_s: float = AUDIT_INTERVAL_S.default,
    **store_options: Any,
) -> Mirror:
    """Keep a copy of `upstream` in the log at `path`. The stored state is served at once, and
    updated from then on.

    `prefix`: one or several; only keys that start with one of them are copied. `parse`: drops (by
    returning None), renames or transforms each update. It must be a pure function and keep the
    version. Dropped updates still advance the cursor. `on_applied`: called on the link's thread
    with the updates and the cursor of each batch written. An error in either fails the link.

    `on_oversize`: with "fail", an entry over foldlog's limits fails the link, and the reason names
    the key; with "skip", the mirror skips and counts it. `mass_delete`: a reset or an audit that
    would delete more than this fraction of the keys (and at least 100) waits for `accept_reset()`.
    `audit_interval_s`: the minimum time between audits, which use at most 1 % of a core.

    `store_options`: as for `foldlog.open`, whose errors are raised as well.
    """
    if not isinstance(upstream, Upstream):
        raise TypeError(
            f"{type(upstream).__name__} is not an upstream: it has no identify and changes"
        )
    for name, hook in (("parse", parse), ("on_applied", on_applied)):
        if hook is not None and (not callable(hook) or iscoroutinefunction(hook)):
            raise TypeError(f"{name} is a plain function or None, not {hook!r:.80}")
    ON_OVERSIZE.check(on_oversize)
    mass_delete = MASS_DELETE.check(mass_delete)
    audit_interval_s = AUDIT_INTERVAL_S.check(audit_interval_s)
    prefixes = _prefixes(prefix)
    from foldlog.actors.link.intake import LinkConfig

    config = LinkConfig(
        prefixes=() if "" in prefixes else prefixes,
        parse=parse,
        on_applied=on_applied,
        skip_oversize=on_oversize == "skip",
        mass_delete=mass_delete,
        audit_interval_s=audit_interval_s,
    )
    return Mirror(open(path, **store_options), upstream, config)


def _prefixes(prefix: object) -> tuple[str, ...]:
    several = (prefix,) if isinstance(prefix, (str, bytes)) else prefix
    if not isinstance(several, Iterable):
        raise TypeError(f"prefix is text, or several, not {type(prefix).__name__}")
    prefixes = tuple(check_text("prefix", each) for each in several)
    if not prefixes:
        raise ValueError(
            "an empty sequence of prefixes selects nothing; leave prefix out to select everything"
        )
    return prefixes


@dataclass(frozen=True, slots=True)
class MirrorStats(Stats):
    """The statistics of a mirror: those of its store, and of its link."""

    link: LinkStats


class _Sink:
    """The link's access to the store. It does not hold the store itself, so that a dropped one can
    be detected."""

    def __init__(self, core: Core, writer: SharedActor) -> None:
        self._core, self._writer = core, writer

    @property
    def keeps_marks(self) -> bool:
        engine = self._core.engine
        return engine is None or engine.keeps_origin

    def snapshot(self) -> FoldSnapshot:
        snapshot = self._core.snapshot
        snapshot.seq  # noqa: B018 - raises StoreClosed here, not later
        return cast(FoldSnapshot, snapshot)

    def feed(self, batch: Batch, rewound: str) -> Future[int]:
        """See `Sink.feed`. The link's thread writes a small batch itself while the writer is idle:
        handing it over and hearing of its end takes twice the processor time. It never waits for an
        fsync, during which no heartbeat would be heard.
        """
        request = WriteRequest(batch, rewound)
        mail, may_write = Mail(request), self._core.config.sync != "always" and fits_in_turn(batch)
        if not (may_write and self._write(mail)):
            self._writer.inbox.offer(mail, 0.0)
        return request.future

    def _write(self, mail: Mail) -> bool:
        """Write it in the writer's turn. False if the writer is busy. If the writer dies of it, the
        restart answers it."""
        try:
            return self._writer.work_in_turn(mail)
        except BaseException as error:
            # Withdrawn, it will not be written. One that was begun is the writer's to settle.
            if not self._writer.is_own_fault(error) and mail.message.future.cancel():
                raise
            return True

    def note_restart(self, restart: Restart) -> None:
        self._core.statistics.restarts.append(restart)


def fits_in_turn(batch: Batch) -> bool:
    """True if a link's thread may write it: in less time than a hand-over takes."""
    return batch.length <= TURN_UPDATES and len(batch.item) <= TURN_BYTES


class Mirror(Store):
    """A store that only its upstream writes; otherwise used like any store. Any thread may call any
    method."""

    def __init__(self, store: Store, upstream: Upstream, config: LinkConfig) -> None:
        """Not for callers: use `foldlog.mirror`."""
        from foldlog.actors.link.link import Link

        super().__init__(store._core, store._supervisor)
        store._finalizer.detach()  # now that this one is responsible
        sink = _Sink(store._core, store._supervisor.writer)
        self.link = Link(str(store.path), sink, upstream, config)
        """The connection to the upstream: see `link.state`, `link.reason`, `link.stats()`."""
        _links.add(self.link)
        self._link_finalizer = weakref.finalize(self, self.link.ask_to_stop)
        self._link_finalizer.atexit = False
        try:
            self.link.start()
        except BaseException:
            self.link.ask_to_stop()
            super().close()
            raise

    def wait_synced(self, timeout_s: float | None = SYNC_TIMEOUT_S) -> bool:
        """Wait until the mirror matches its upstream; returns True. From then on it matches the
        upstream as of `staleness_s` ago.

        RequestTimeout after `timeout_s`, with the link's state and reason. Raises the link's error
        if it has FAILED.
        """
        if os.getpid() != self.link._pid:
            raise ForkedStore(f"{self.path} was opened before this process was forked")
        timeout_s = check_timeout(timeout_s)
        link, ends = self.link, (LinkState.LIVE, LinkState.FAILED, LinkState.CLOSED)
        if not link.progress.changed.wait_for(lambda: link.state in ends, timeout_s):
            reason = f": {link.reason}" if link.reason else ""
            raise RequestTimeout(
                f"not synced within {timeout_s} s; the link is {link.state}{reason}"
            )
        state = link.state
        if state is LinkState.FAILED:
            raise link.error or FoldlogError(link.reason)
        if state is LinkState.CLOSED:
            raise StoreClosed(f"{self.path} is closed")
        return True

    def lag(self) -> int | None:
        """Updates still waiting upstream, as last reported; 0 means in step. None if the link is
        not attached or the upstream cannot tell."""
        return self.link.progress.behind

    @property
    def staleness_s(self) -> float:
        """Seconds since the upstream last confirmed that the mirror is in step; infinite if it has
        not since the mirror was opened."""
        return self.link.progress.staleness_s

    def accept_reset(self) -> None:
        """Allow the reset that the link is holding: to delete most of the keys, or to take over the
        state of another upstream."""
        self.link.accept_reset()

    def stats(self) -> MirrorStats:
        """The statistics of the store and of its link."""
        stats = super().stats()
        values = {field.name: getattr(stats, field.name) for field in fields(Stats)}
        return MirrorStats(**values, link=self.link.stats())

    def close(self, timeout_s: float | None = CLOSE_TIMEOUT_S) -> None:
        """Disconnect from the upstream, then close as `Store.close` does."""
        self._link_finalizer.detach()
        self.link.stop()
        super().close(timeout_s)

    # Writes are refused.

    def apply(
        self,
        updates: Iterable[Update],
        cursor: CursorLike,
        timeout_s: float | None = APPLY_TIMEOUT_S,
        *,
        forward_only: bool = False,
    ) -> NoReturn:
        """MirrorReadOnly: the upstream alone writes a mirror."""
        self._refuse()

    def apply_async(
        self,
        updates: Iterable[Update],
        cursor: CursorLike,
        timeout_s: float | None = 0.0,
        *,
        forward_only: bool = False,
    ) -> NoReturn:
        """MirrorReadOnly: the upstream alone writes a mirror."""
        self._refuse()

    def _submit(
        self, request: Request, timeout_s: float = 0.0, place: Place | None = None
    ) -> Future[Any]:
        if isinstance(request, WriteRequest):
            self._refuse()
        return super()._submit(request, timeout_s, place)

    def _write(self, request: LocalWrite, timeout_s: float | None) -> VersionToken:
        self._refuse()

    @property
    def writer(self) -> pykka.ActorRef[Any]:
        """MirrorReadOnly: the upstream alone writes a mirror."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise MirrorReadOnly(f"{self.path} is a mirror: write to its upstream")

    def __repr__(self) -> str:
        return f"<foldlog.Mirror {str(self.path)!r} {self.state}, link {self.link.state}>"


_links: weakref.WeakSet[Link] = weakref.WeakSet()


@atexit.register
def _stop_links_at_exit() -> None:
    """Stop links before stores are closed, which would end the links with an error."""
    for link in list(_links):
        if link.thread.is_alive():
            with contextlib.suppress(Exception):
                link.stop(1.0)
