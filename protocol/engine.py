"""The seam between the writer and an engine, which stores the fold and publishes immutable
snapshots.

One thread at a time writes; the caller decides which. Any thread may read a snapshot. The engines:

    append log    storage/engines/append_log/    base on disk, later changes in memory
    RocksDB       storage/engines/rocksdb/       everything on disk

`storage/engines/registry.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from foldlog.protocol.errors import LogPoisonedError
from foldlog.protocol.store import FormatName, StrPath
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Batch, DecodedBatch, Delete, KvEntry, Put


@runtime_checkable
class Snapshot(Protocol):
    """The immutable state of a store after one batch. Any thread may read it."""

    seq: int
    """The sequence of the last batch in it: 0 for the empty store, then +1 per batch, never
    reset."""

    def get(self, key: str) -> KvEntry | None:
        """The live entry of `key`, or None if it is absent or deleted."""

    def range(self, prefix: str = "") -> list[KvEntry]:
        """All live entries under `prefix`, ascending by key: by code point."""

    def for_each_in_range(self, prefix: str, f: Callable[[KvEntry], Any]) -> None:
        """`range`, streamed: calls `f` for each entry. An error from `f` stops the scan and
        propagates."""

    def blocks(self, prefix: str = "", after: str | None = None) -> Iterator[list[KvEntry]]:
        """`range` in pieces, none empty; only keys after `after`, if given."""

    def entries_after(self, prefix: str, after: str | None) -> Iterator[KvEntry]:
        """The live entries under `prefix` after the key `after`, one by one."""

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The live keys under `prefix`, ascending."""

    def items(self, prefix: str = "") -> Iterator[tuple[str, bytes]]:
        """(key, value) of the live entries under `prefix`, ascending."""

    def cursor(self) -> WatchCursor:
        """The position in the upstream; every update up to it is folded in."""

    @property
    def origin(self) -> bytes:
        """The identity of the upstream that the cursor belongs to; empty if unknown."""

    def parts(self) -> list[object]:
        """Its parts, to be released one by one, because freeing a large snapshot at once takes
        long."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...


NO_CURSOR = WatchCursor.none()


@dataclass(frozen=True, slots=True)
class OpenReport:
    """What opening a log found and did."""

    path: Path
    created: bool = False
    """There was no file; an empty log was made."""
    size: int = 0
    """Valid bytes of the file, after any cut."""
    frames: int = 0
    entries: int = 0
    """Entries in the base."""
    batches: int = 0
    """Batches replayed on top of the base."""
    seq: int = 0
    cursor: WatchCursor = NO_CURSOR
    sealed: bool = False
    """The last writer closed it cleanly."""
    cut_bytes: int = 0
    """Bytes cut off: a torn tail or, with on_damage="cut", damage."""
    cut_reason: str = ""
    kept_at: Path | None = None
    """Where the cut bytes are kept; None if nothing was cut, or nothing but zeros."""
    compacted: bool = False
    """Opening compacted the log."""
    compaction_error: str = ""
    """Why `AppendLogSnapshot.open` could not compact (disk full, directory not writable). The log
    is served as it is."""
    rewritten: bool = False
    """An earlier fsync had failed, so the fold was written to a new file."""
    missing_batches: int = 0
    """Batches synced to the original log that this copy lacks, because the directory was copied
    during writes. Also 0 if the original's note was not copied."""


class Export(Protocol):
    """A prepared export."""

    def __call__(
        self, dest_dir: StrPath, progress: Callable[[int, int], None] | None = None
    ) -> Any:
        """Write the artifact at `dest_dir`, complete or not at all. Returns its manifest."""


class Sizes(NamedTuple):
    """Disk space used by a store, in bytes."""

    log_bytes: int
    """The total."""
    base_bytes: int
    """The part written by the last compaction."""
    appended_bytes: int
    """The part written since."""


class Held(NamedTuple):
    """The older snapshots that readers still hold, and the files kept for them."""

    snapshots: int
    """The number of older snapshots. For an append log: of files from earlier compactions that
    snapshots still read."""
    oldest_s: float
    """Age of the oldest, in seconds; 0 if there are none."""
    memory_bytes: int = 0
    """Memory kept for them. RocksDB: the keys that were changed since the oldest. For an append
    log: not counted, and bounded by the changes since the compaction before."""


class CacheUse(NamedTuple):
    """The memory for what was read from disk, in bytes."""

    held_bytes: int
    """In use. Snapshots from before the last compaction may hold what they read until then.

    For an append log, without the newest snapshot's hottest entries, which take up to 6 MB."""
    limit_bytes: int
    """The most: `cache_bytes`."""


class Cancelled(Exception):
    """A compaction was cancelled."""


class Compaction(Protocol):
    """A running compaction of one or more passes. Any thread may run a pass; the writer's thread
    starts the next one and finishes the compaction.
    """

    cancelled: bool
    """Any thread sets it to make the current pass stop soon."""
    outcome: object
    """The outcome of the last pass, set by whoever runs it; None while it runs."""

    @property
    def seq(self) -> int:
        """The sequence of the last batch in it."""

    @property
    def written(self) -> bool:
        """True once the fold is written, so that only batches committed meanwhile remain."""

    @property
    def live_bytes(self) -> int:
        """The size in bytes of the compacted store, as far as known."""

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Run the current pass: the part that takes long."""

    def measure_live(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Determine `live_bytes` after a failure."""

    def discard(self) -> None:
        """Abandon it, unless it is finished; the store is unchanged."""


class Past(Protocol):
    """What leads from one snapshot to another. Any thread may ask."""

    def batches_since(
        self, snapshot: Any, cursor: WatchCursor
    ) -> Iterator[tuple[int, DecodedBatch]] | None:
        """The batches that follow the first one at `cursor`, up to `snapshot`, with their
        sequences.

        None if they are no longer stored.
        """

    def difference(self, old: Any, new: Any, prefix: str = "") -> Iterator[Put | Delete]:
        """The updates that turn `old` into `new`: one for each key under `prefix` that differs,
        ascending by key.
        """


class Engine(Past, Protocol):
    """A store that is open for writing, and its fold. Methods marked so may be called on any
    thread, the others only on the writer's.

    Invariant: `snapshot` holds everything committed, or `failure` says why that is unknown.
    """

    path: Path
    report: OpenReport
    """What opening found and did."""
    snapshot: Any
    """The newest Snapshot. After `close`, a stand-in on which every call raises StoreClosed.
    """

    @property
    def failure(self) -> str | None:
        """Why writes are refused until `heal` succeeds: an fsync failed, or a write could not be
        undone. None if writes are allowed.
        """

    @property
    def closed(self) -> bool:
        """True once it is closed or abandoned. Any thread."""

    @property
    def keeps_origin(self) -> bool:
        """True if a batch is stored with its cursor and the cursor's origin, atomically."""

    @property
    def is_compact(self) -> bool:
        """True if a compaction would free nothing."""

    def should_compact(self, threshold_bytes: int) -> bool:
        """True if the bytes written since the last compaction justify another."""

    @property
    def size_bytes(self) -> int:
        """The size that `limit_bytes` bounds. Cost: constant."""

    def limit_bytes(self, live_bytes: int, threshold_bytes: int) -> int | None:
        """The limit on `size_bytes`, exceeded by at most one batch. None if the engine limits
        itself."""

    def has_room(self, size: int) -> bool:
        """False if the disk is known to have no room for `size` bytes."""

    @property
    def synced(self) -> tuple[int, WatchCursor]:
        """The sequence and cursor up to which every batch survives a power loss."""

    def stage(self, batches: Sequence[Batch], on: Any = None) -> Snapshot:
        """The newest snapshot (or `on`, staged earlier) with `batches` on top; nothing is written.
        For writes whose outcome depends on the current state.
        """

    def commit(self, batches: Sequence[Batch], staged: Any = None) -> Snapshot:
        """Write the batches as one commit group: all or nothing.

        Returns the new snapshot, which is `staged` if the caller has already built it.

        On return they survive a killed process, and a power loss if the engine syncs each commit.
        On an error, `snapshot` contains none of them; if `failure` is set as well, `heal` decides
        whether they are in the store.
        """

    def sync(self) -> None:
        """Make everything committed so far survive a power loss. An error sets `failure`.

        Any thread, concurrently with the writer.
        """

    def check_file(self) -> None:
        """Raise LogChangedError if someone else replaced or removed the store's files. Any
        thread."""

    def confirm_file(self) -> None:
        """`check_file` for the writer's thread; also repairs what can be repaired."""

    def mark_deleted(self, reason: str) -> bool:
        """If the store's file is gone and `heal` can restore it, set `failure` and return True."""

    def heal(self) -> Snapshot:
        """Make the store writable again after a `failure`.

        Returns the snapshot, which may include batches whose outcome was unknown.
        """

    def begin_compaction(self) -> Compaction:
        """Start compacting the current fold. Commits may continue; then finish or drop it."""

    def next_pass(self, job: Any) -> bool:
        """Start another pass if one is worthwhile before `finish_compaction`. False if not."""

    def allowed_bytes(self, job: Any, threshold_bytes: int) -> float:
        """The `size_bytes` at which the writer has to wait for the current pass. Any thread."""

    def finish_compaction(self, job: Any) -> Snapshot:
        """Replace the old files with what the job wrote.

        Returns the snapshot: same state, same batch.
        """

    def drop_compaction(self, job: Any) -> None:
        """Abandon a compaction; the store is unchanged."""

    def begin_export(self, format: FormatName | None) -> Export:
        """Prepare to export the current state or a newer one. Any thread may call the export
        returned. ValueError if the engine cannot write `format`.
        """

    def verify(self) -> Any:
        """Check every invariant of the stored data. Reports every problem and changes nothing."""

    def sizes(self) -> Sizes:
        """The store's size on disk."""

    def held(self) -> Held:
        """The older snapshots that readers still hold, counted."""

    def cache(self) -> CacheUse:
        """The memory for what was read from disk."""

    def close(self) -> None:
        """Sync, release everything, and end any snapshot that cannot outlive the engine.

        Closing twice is fine.
        """

    def abandon(self) -> None:
        """Release everything without writing, as if the process had been killed. Calling it twice
        is fine."""


class Seat(Protocol):
    """The exclusive right to open one store. A writer keeps it across restarts."""

    def open(self, crashed: Any = None) -> Engine:
        """Open or create the store. `crashed`: the engine opened here before; it is abandoned.

        StoreLocked, CorruptLogError, InvalidFormatError, LogRegressedError, LogChangedError or
        OSError. The new engine holds everything that `crashed` had published.
        """

    def release(self) -> None:
        """Let others open the store. Releasing twice is fine."""


def check_failure(engine: Engine) -> None:
    """LogPoisonedError if the engine refuses to write."""
    if engine.failure is not None:
        raise LogPoisonedError(engine.path, engine.failure)
