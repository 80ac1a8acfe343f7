"""What the actors of one store share: the published snapshot, the state, the statistics.

Each field says who writes it. All threads read without a lock: fields are replaced whole, never
changed in place.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.store.histogram import GROUP_BOUNDS, LATENCY_BOUNDS_S, Histogram
from foldlog.protocol.engine import Engine, OpenReport, Snapshot
from foldlog.protocol.options import (
    BACKEND,
    CACHE_BYTES,
    COMPACT_THRESHOLD,
    FORMAT,
    MAILBOX_BATCHES,
    MAILBOX_BYTES,
    MAX_RESTARTS,
    ON_DAMAGE,
    READERS,
    RESTART_WINDOW_S,
    STUCK_AFTER_S,
    SYNC,
    SYNC_INTERVAL_S,
    Count,
    OnDamage,
    Seconds,
    Sync,
    check_callable,
)
from foldlog.protocol.store import Backend, FormatName
from foldlog.protocol.tokens import WatchCursor
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.handover import Latch
from foldlog.storage.log.files import OS_FILES, Files, check_files


class State(enum.StrEnum):
    """What a store is doing. It can be read in every state but CLOSED."""

    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    """The writer died; its log is being replayed. Writes wait."""
    FAILED = "failed"
    """The supervisor gave up: writes raise StoreFailed until `reopen`."""
    CLOSING = "closing"
    CLOSED = "closed"
    FORKED = "forked"
    """This process was forked from the store's own: it reads the snapshot published then, and
    writes raise ForkedStore."""


_NUMBERS: tuple[Count | Seconds, ...] = (
    READERS,
    SYNC_INTERVAL_S,
    COMPACT_THRESHOLD,
    CACHE_BYTES,
    MAILBOX_BATCHES,
    MAILBOX_BYTES,
    MAX_RESTARTS,
    RESTART_WINDOW_S,
    STUCK_AFTER_S,
)


def no_step(name: str) -> None:
    """The default of `step`: do nothing. Tests pass a function that observes the steps."""


@dataclass(frozen=True, slots=True)
class Config:
    """How a store was opened."""

    path: Path
    readers: int = READERS.default
    sync: Sync = "interval"
    sync_interval_s: float = SYNC_INTERVAL_S.default
    compact_threshold: int = COMPACT_THRESHOLD.default
    on_damage: OnDamage = "refuse"
    cache_bytes: int = CACHE_BYTES.default
    mailbox_batches: int = MAILBOX_BATCHES.default
    mailbox_bytes: int = MAILBOX_BYTES.default
    max_restarts: int = MAX_RESTARTS.default
    """Restarts of one actor within `restart_window_s` before the store is FAILED."""
    restart_window_s: float = RESTART_WINDOW_S.default
    restart_delay_s: float = 0.05
    """Delay before the second restart in a row; doubled for each further one, up to 5 s. The first
    restart is immediate."""
    stuck_after_s: float = STUCK_AFTER_S.default
    """A writer busy with one task for longer is reported as FAILED. A guess: no healthy disk takes
    that long."""
    format: FormatName | None = None
    """The format of a new log. An existing log must have it, unless this is None."""
    backend: Backend = "append-log"
    """The engine: a row of the table in `storage/engines/registry.py`."""
    files: Files = field(default=OS_FILES, repr=False)
    step: Callable[[str], None] = field(default=no_step, repr=False)
    """Called by each actor at its named steps (`foldlog.testing` crashes there)."""

    def __post_init__(self) -> None:
        """TypeError or ValueError for an option that no store can have. Time spans are capped at
        `FOREVER_S`."""
        BACKEND.check(self.backend)
        FORMAT.check(self.format)
        SYNC.check(self.sync)
        ON_DAMAGE.check(self.on_damage)
        check_files(self.files)
        check_callable("step", self.step)
        for option in _NUMBERS:
            object.__setattr__(self, option.name, option.check(getattr(self, option.name)))


class Restart(NamedTuple):
    """A restart, as reported by `stats()`."""

    actor: str
    reason: str
    at_unix_s: float
    delay_s: float


@dataclass(frozen=True, slots=True)
class Stats:
    """The statistics of a store at one moment."""

    state: State
    reason: str
    """Why it is FAILED; "" otherwise."""
    seq: int
    cursor: WatchCursor
    synced_seq: int
    entries: int
    """Live entries. Counted on request. Cost: O(changes since the last compaction)."""
    log_bytes: int
    base_bytes: int
    """The base's share of the log: live at the last compaction."""
    appended_bytes: int
    """The share appended since: what a compaction may free."""
    mailbox_depth: int
    batches: int
    """Written since the store was opened."""
    groups: int
    """Commit groups that contained them."""
    largest_group: int
    latency_mean_s: float
    """From the call to the answer, over the last 1,024 batches."""
    latency_p99_s: float
    restarts: tuple[Restart, ...]
    """The last 64, oldest first."""
    compactions: int
    last_compaction_s: float | None
    """The duration of the last compaction."""
    last_compaction_unix_s: float | None
    compaction_error: str
    """Why the last compaction failed; "" if it succeeded. A failed one is retried automatically."""
    throttled_s: float
    """How long in total, since the store was opened, the writer has held writes back for a
    compaction because the log had reached its bound."""
    snapshot_age_s: float
    """Since the last batch was published."""
    unsynced_s: float
    """How long the oldest unsynced batch has waited; 0.0 if all are synced."""
    subscriptions: int
    """Watches, deliveries and derived states that receive changes."""
    held_snapshots: int
    """Older states that snapshots keep on disk. See `Held`."""
    oldest_held_s: float
    """How long the oldest of them has been held."""
    held_bytes: int
    """Memory kept for them, as far as it is counted. See `Held`."""
    cached_bytes: int
    """Memory for what was read from disk, at most `cache_bytes`. See `CacheUse`."""


class Statistics:
    """Counters. The writer and the supervisor write them, each its own."""

    def __init__(self) -> None:
        self.batches = 0
        self.groups = 0
        self.largest_group = 0
        self.latencies_s: deque[float] = deque(maxlen=1024)
        self.latency = Histogram(LATENCY_BOUNDS_S)
        self.group_size = Histogram(GROUP_BOUNDS)
        self.restarts: deque[Restart] = deque(maxlen=64)
        self.restarts_by_cause: dict[tuple[str, str], int] = {}
        """(actor, type of the error) -> restarts. Replaced whole."""
        self.compactions = 0
        self.last_compaction_s: float | None = None
        self.last_compaction_unix_s: float | None = None
        self.compaction_error = ""
        self.throttled_s = 0.0

    def note_group(self, latencies_s: Sequence[float]) -> None:
        """Count a commit group of as many batches, each answered so long after the call."""
        size = len(latencies_s)
        self.batches += size
        self.groups += 1
        if size > self.largest_group:
            self.largest_group = size
        self.latencies_s += latencies_s
        self.group_size.add(size)
        self.latency.add(*latencies_s)

    def note_restart(self, restart: Restart, error: BaseException) -> None:
        """Count the restart of an actor because of `error`."""
        self.restarts.append(restart)
        cause = (restart.actor, type(error).__name__)
        counts = self.restarts_by_cause
        self.restarts_by_cause = {**counts, cause: counts.get(cause, 0) + 1}


class Core:
    """The state shared within a store. Every actor and the face hold it; it does not hold the
    face."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # Written by the writer, after each commit group; by the face at close. Readers load it once
        # and keep the object.
        # Invariant: its sequence never falls, and every batch in it is in the log.
        self.snapshot: Any = FoldSnapshot.empty()
        self.published_at = time.monotonic()
        # What is known to be on disk: one slot each for the writer and the syncer, so that neither
        # can undo what the other wrote. Each slot is replaced whole.
        self._synced = [(0, WatchCursor.none())] * 2
        self.unsynced_since: float | None = None
        """When the first batch not covered by a sync was published (time.monotonic())."""
        # Written by the supervisor.
        self.state = State.STARTING
        self.reason = ""
        # Written by the writer at each (re)start, for the syncer and the statistics.
        self.engine: Engine | None = None
        self.report: OpenReport | None = None
        self.statistics = Statistics()
        self.feeds = Feeds()
        self.ended = Latch()
        """Set when the store is CLOSED and its threads have ended."""

    def publish(self, fold: Snapshot) -> float:
        """Make `fold` visible to all readers. Returns when (time.monotonic()). Only the writer
        calls it."""
        self.snapshot = fold
        now = self.published_at = time.monotonic()
        if self.unsynced_since is None and fold.seq > self.synced[0]:
            self.unsynced_since = now
        return now

    @property
    def synced(self) -> tuple[int, WatchCursor]:
        """The last batch that survives a power loss, and its cursor: read as one, never falling."""
        writer, syncer = self._synced
        return writer if writer[0] >= syncer[0] else syncer

    def note_synced(self, fold: Snapshot, *, by_syncer: bool = False) -> None:
        """Record that all of `fold` survives a power loss. Only the writer and the syncer call
        it."""
        if fold.seq >= self._synced[by_syncer][0]:
            self._synced[by_syncer] = fold.seq, fold.cursor()
            is_all = fold.seq >= self.snapshot.seq
            self.unsynced_since = None if is_all else time.monotonic()
