"""The seam between a writer and an engine: what stores the fold, and publishes immutable
snapshots of it.

One thread writes; it is the caller who decides which. Snapshots may be read by any thread. The
engines:

    append log    storage/engines/append_log/    the base on disk, the changes since in memory
    RocksDB       storage/engines/rocksdb/       all on disk

`storage/engines/registry.py` has the table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from foldlog.protocol.store import FormatName, StrPath
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Batch, DecodedBatch, Delete, KvEntry, Put


@runtime_checkable
class Snapshot(Protocol):
    """An immutable state of a store, at one batch. Any thread may read it."""

    seq: int
    """The sequence of the last batch in it: 0 for the empty store, +1 for each batch, for ever."""

    def get(self, key: str) -> KvEntry | None:
        """The live entry of `key`, or None if it is absent or deleted."""

    def range(self, prefix: str = "") -> list[KvEntry]:
        """All live entries under `prefix`, ascending by key: by code point."""

    def for_each_in_range(self, prefix: str, f: Callable[[KvEntry], Any]) -> None:
        """`range`, streamed. An error of `f` stops the scan and propagates."""

    def blocks(self, prefix: str = "", after: str | None = None) -> Iterator[list[KvEntry]]:
        """`range` in pieces, none empty; only keys after `after`, if given."""

    def entries_after(self, prefix: str, after: str | None) -> Iterator[KvEntry]:
        """The live entries under `prefix` after the key `after`, one by one."""

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The live keys under `prefix`, ascending."""

    def items(self, prefix: str = "") -> Iterator[tuple[str, bytes]]:
        """(key, value) of the live entries under `prefix`, ascending."""

    def cursor(self) -> WatchCursor:
        """The position in the stream up to which every update is folded in."""

    @property
    def origin(self) -> bytes:
        """Whose position the cursor is; empty where nobody said."""

    def parts(self) -> list[object]:
        """What it is made of, to be let go of piece by piece: freeing it at once may take long."""

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
    """Bytes of the file that hold, after any cut."""
    frames: int = 0
    entries: int = 0
    """Entries of the base."""
    batches: int = 0
    """Batches replayed on top of the base."""
    seq: int = 0
    cursor: WatchCursor = NO_CURSOR
    sealed: bool = False
    """The last writer closed it cleanly."""
    cut_bytes: int = 0
    """Bytes of a torn tail (or, with on_damage="cut", of damage) that were cut off."""
    cut_reason: str = ""
    kept_at: Path | None = None
    """Where the cut bytes are kept; None if nothing was cut, or nothing but zeros."""
    compacted: bool = False
    """Opening compacted the log."""
    compaction_error: str = ""
    """Why it could not (no room, no right to write beside it), in `AppendLogSnapshot.open`. The log is served as it is."""
    rewritten: bool = False
    """An earlier fsync had failed, so the fold was written to a new file."""
    missing_batches: int = 0
    """Batches that were synced to the log of which this is a copy, and that the copy does not hold:
    its directory was copied while it was written to. 0 also where the original's note was not
    copied along."""


class Export(Protocol):
    """An export that was made ready."""

    def __call__(
        self, dest_dir: StrPath, progress: Callable[[int, int], None] | None = None
    ) -> Any:
        """Write the artifact at `dest_dir`, complete or not at all. Returns its manifest."""


class Sizes(NamedTuple):
    """What a store takes on disk, in bytes."""

    log_bytes: int
    """All of it."""
    base_bytes: int
    """Of it, what the last compaction wrote."""
    appended_bytes: int
    """Of it, what was written since."""


class Held(NamedTuple):
    """What readers hold beside the newest state, and what is kept on disk for them."""

    snapshots: int
    """Older snapshots; of an append log, files of earlier compactions that snapshots are read from."""
    oldest_s: float
    """The age of the oldest, in seconds; 0 if there is none."""


class Cancelled(Exception):
    """A compaction was told to stop."""


class Compaction(Protocol):
    """A compaction under way, in one or more passes. Any thread may run a pass; the writer's begins
    the next one, and finishes.
    """

    cancelled: bool
    """Set by anyone to make the pass under way stop soon."""
    outcome: object
    """What whoever runs the passes tells of the last one; None while it is under way."""

    @property
    def seq(self) -> int:
        """The last batch that it holds."""

    @property
    def written(self) -> bool:
        """True once the fold is written, and what is left is to follow what came meanwhile."""

    @property
    def live_bytes(self) -> int:
        """The size of the store when it is compact, as far as that is known."""

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """The pass that is due. The long part."""

    def measure_live(self, progress: Callable[[int, int], None] | None = None) -> None:
        """After a failure: find out `live_bytes`."""

    def discard(self) -> None:
        """Give it up, unless it is finished: the store goes on as it was."""


class Engine(Protocol):
    """A store that is open for writing, and its fold.

    Invariant: `snapshot` holds all that was committed, or `failure` says why that cannot be told.
    """

    path: Path
    report: OpenReport
    """What opening found and did."""
    snapshot: Any
    """The newest Snapshot; once the engine is closed, something that raises StoreClosed whatever
    it is asked.
    """

    @property
    def failure(self) -> str | None:
        """Why nothing may be written until `heal` has succeeded: an fsync failed, or a write could
        not be undone. Else None.
        """

    @property
    def closed(self) -> bool:
        """True once it is closed or abandoned. Any thread may ask."""

    @property
    def keeps_origin(self) -> bool:
        """True if a batch, its cursor and whose cursor it is are written as one."""

    @property
    def is_compact(self) -> bool:
        """True if a compaction would free nothing."""

    def should_compact(self, threshold_bytes: int) -> bool:
        """True if what was written since the last compaction justifies one."""

    @property
    def size_bytes(self) -> int:
        """What `limit_bytes` is a limit of. Cost: nothing."""

    def limit_bytes(self, live_bytes: int, threshold_bytes: int) -> int | None:
        """What a store with so many live bytes is kept below, but for one batch. None: it bounds itself."""

    @property
    def synced(self) -> tuple[int, WatchCursor]:
        """The sequence and the cursor up to which every batch survives a power loss."""

    def stage(self, batches: Sequence[Batch], on: Any = None) -> Snapshot:
        """The newest snapshot (or `on`, which was staged before) with `batches` on top, of which
        nothing is written: for writes that depend on what they find.
        """

    def commit(self, batches: Sequence[Batch], staged: Any = None) -> Snapshot:
        """Write the batches as one commit group: all or nothing.

        Returns the new snapshot; `staged` is its content, if made already.

        On return they survive a killed process, and a power loss if the engine syncs each commit.
        On an error none of them is in `snapshot`; if `failure` is then set, whether they are in
        the store is open until `heal`.
        """

    def sync(self) -> None:
        """Make all that was committed survive a power loss. An error sets `failure`.

        Any thread may call it, beside the writer.
        """

    def check_file(self) -> None:
        """LogChangedError if somebody else replaced or removed what the store is in. Any thread."""

    def confirm_file(self) -> None:
        """`check_file`, for the writer's thread, which also puts right what can be."""

    def mark_deleted(self, reason: str) -> bool:
        """Where nothing has the store's name any more and `heal` can put it back: set `failure`, and return True."""

    def heal(self) -> Snapshot:
        """Make the store writable again after a `failure`.

        Returns the snapshot, which may hold batches that were in doubt.
        """

    def begin_compaction(self) -> Compaction:
        """Start a compaction of the fold as it is now. `commit` may go on; then finish or drop it."""

    def next_pass(self, job: Any) -> bool:
        """Begin another pass, if one is worth it before `finish_compaction`. False if none is."""

    def allowed_bytes(self, job: Any, threshold_bytes: int) -> float:
        """What `size_bytes` may become before the writer has to wait for the pass under way. Any thread."""

    def finish_compaction(self, job: Any) -> Snapshot:
        """Let what the job wrote take the place of the old files.

        The same state, at the same batch.
        """

    def drop_compaction(self, job: Any) -> None:
        """Give a compaction up: the store goes on as it was."""

    def begin_export(self, format: FormatName | None) -> Export:
        """Make ready to export the state as it is now, or a newer one; any thread may call what is
        returned. ValueError for a format that the engine does not write.
        """

    def verify(self) -> Any:
        """Check every invariant of what is stored. Tells all that is wrong, and changes nothing."""

    def sizes(self) -> Sizes:
        """What the store takes on disk."""

    def held(self) -> Held:
        """Which snapshots readers hold."""

    def batches_since(
        self, snapshot: Any, cursor: WatchCursor
    ) -> Iterator[tuple[int, DecodedBatch]] | None:
        """The batches after the first one at `cursor`, up to `snapshot`, with their sequences. Any thread.

        None if they are gone.
        """

    def difference(self, old: Any, new: Any, prefix: str = "") -> Iterator[Put | Delete]:
        """What leads from one snapshot to another: an update for each key under `prefix` that
        differs, ascending.
        """

    def close(self) -> None:
        """Sync, release everything and end the snapshots that cannot outlive it.

        Closing twice is fine.
        """

    def abandon(self) -> None:
        """Release everything as a killed process would: nothing more is written. Twice is fine."""


class Seat(Protocol):
    """The right to open one store, which a writer keeps from start to start, so that nobody steps in between."""

    def open(self, crashed: Any = None) -> Engine:
        """Open or create the store. `crashed`: the engine that was open here before; it is abandoned.

        StoreLocked, CorruptLogError, InvalidFormatError, LogRegressedError, LogChangedError or
        OSError. What is opened holds all that `crashed` had published.
        """

    def release(self) -> None:
        """Let others open it. Twice is fine."""
