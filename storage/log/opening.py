"""Opening a log for writing: the lock, the replay, the repair.

Opening never destroys. Damage is refused, with path, offset and reason, and the file is left as it
was. A torn tail, which a stopped writer leaves, is copied to a file beside the log before it is
cut. Only the holder of the writer's lock repairs.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from foldlog.protocol.engine import OpenReport
from foldlog.protocol.errors import InvalidFormatError, LogChangedError, StoreLocked
from foldlog.protocol.options import FORMAT, ON_DAMAGE, OnDamage
from foldlog.protocol.store import FormatName
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.format import Known, Loaded, LogFile, Progress, Verdict
from foldlog.storage.formats.registry import MAGICS, damage_error, format_named, load
from foldlog.storage.formats.rewrite import write_new
from foldlog.storage.log.access import share
from foldlog.storage.log.files import Access, Files, ReadHandle, remove_quietly, write_all
from foldlog.storage.log.log import Log
from foldlog.storage.log.recovery import Rest
from foldlog.storage.log.sidecars.lock import WriterLock, beside, lock_log, sweep_temporaries
from foldlog.storage.log.sidecars.origins import ORIGIN_MAGIC, read_origin
from foldlog.storage.log.sidecars.regression import regression_error


def open_log(
    path: Path,
    files: Files,
    *,
    format: FormatName | None = None,
    on_damage: OnDamage = "refuse",
    sync_each: bool = False,
    cache_bytes: int,
    progress: Progress | None = None,
    lock: WriterLock | None = None,
    crashed: Log | None = None,
) -> tuple[Log, FoldSnapshot, OpenReport]:
    """Open or create the log at `path` (absolute, links resolved) for writing.

    `format`: of a new log; an existing log must have it. `lock`: held already; it stays held on an
    error. `crashed`: this log, as its writer in this process abandoned it; it supplies what the
    file does not record.

    StoreLocked, CorruptLogError, InvalidFormatError, LogRegressedError or OSError: the file is left
    as it was.
    """
    FORMAT.check(format)
    ON_DAMAGE.check(on_damage)
    if files.exists(path):
        _check_regular(files, path)
    given_lock, lock = lock, lock or WriterLock(files, path)
    try:
        log, loaded, report = _open_locked(
            path, files, lock, crashed, format, on_damage, progress, sync_each
        )
    except BaseException:
        if given_lock is None:
            lock.release()
        raise
    try:
        if log.poison is None and not loaded.sealed and loaded.format.may_be_unsynced(loaded):
            log.sync()  # what a killed writer left may be in the page cache only
        loaded.fold.limit_cache(cache_bytes)
    except BaseException:
        log.discard(keep_lock=given_lock is not None)
        raise
    return log, loaded.fold, report


def _check_regular(files: Files, path: Path) -> None:
    """InvalidFormatError for a RocksDB database, OSError for any other directory or a device,
    before a lock file is created beside it."""
    try:
        files.close(files.open_read(path))
    except OSError:
        if (path / "CURRENT").is_file():
            reason = "is a RocksDB database: open it with backend='rocksdb'"
            raise InvalidFormatError(path, 0, reason) from None
        raise


def _open_locked(
    path: Path,
    files: Files,
    lock: WriterLock,
    crashed: Log | None,
    format: FormatName | None,
    on_damage: OnDamage,
    progress: Progress | None,
    sync_each: bool,
) -> tuple[Log, Loaded, OpenReport]:
    """Read the log, after creating it if it does not exist, and set a torn tail aside."""
    fd, handle = -1, None
    try:
        created = not files.exists(path)
        if created and crashed is not None:
            raise LogChangedError(path, "was deleted while the writer was down")
        if created:
            write_new(files, path, FoldSnapshot.empty(), format_named(format))
        handle = ReadHandle(files, path)
        fd = files.open_write(path)
        if not lock_log(files, fd):
            raise StoreLocked(path, None)  # under another name: a hard link
        stat = files.fstat(fd)
        known = None if crashed is None else crashed.known((stat.st_dev, stat.st_ino))
        loaded, cut_reason = _load(handle, format, on_damage, known, progress)
        if not loaded.format.keeps_origin:
            loaded.fold.origin = read_origin(files, path, files.access(fd))
        missing = _missing_batches(lock, loaded, refuse=on_damage == "refuse")
        sweep_temporaries(files, path, (*MAGICS, ORIGIN_MAGIC))
        kept_at, cut_bytes = None, 0
        if loaded.bad is not None:
            kept_at, cut_bytes = _set_aside(files, path, fd, handle, loaded)
        report = OpenReport(
            path,
            created,
            loaded.position.offset,
            loaded.parts,
            loaded.base_entries,
            loaded.position.seq - loaded.header.base_seq,
            loaded.position.seq,
            loaded.fold.cursor(),
            loaded.sealed,
            cut_bytes,
            cut_reason,
            kept_at,
            missing_batches=missing,
        )
        file = LogFile(
            loaded.format, loaded.header, fd, handle, loaded.position, loaded.base_end, False
        )
        log = Log(files, path, lock, file, sync_each=sync_each)
        if lock.is_poisoned(stat.st_ino):
            log.poison = "an fsync failed in an earlier process"
        lock.keep(fd)
        log.owns_file = True
    except BaseException:
        if handle is not None:
            handle.close()
        if fd >= 0:
            files.close(fd)
        raise
    return log, loaded, report


def _load(
    handle: ReadHandle,
    format: FormatName | None,
    on_damage: OnDamage,
    known: Known | None,
    progress: Progress | None,
) -> tuple[Loaded, str]:
    """Read the log, and refuse another format, or damage that is not to be cut.

    Returns also why its tail is to be cut; "" if it has no bad bytes.
    """
    loaded = load(handle, progress, known)
    found = loaded.format.name
    if format is not None and found != format:  # after loading, which refuses what is not a log
        raise InvalidFormatError(
            handle.path, 0, f"is a {found} log, but format={format!r} was asked for"
        )
    if loaded.bad is None:
        return loaded, ""
    verdict, reason = loaded.format.diagnose(handle, loaded)
    if verdict is Verdict.CORRUPT and (
        on_damage == "refuse" or not loaded.base_end or loaded.bad.unsupported
    ):
        raise damage_error(handle.path, loaded, reason)
    return loaded, reason


def _missing_batches(lock: WriterLock, loaded: Loaded, *, refuse: bool) -> int:
    """How many batches that were synced according to the note are missing from the log.

    LogRegressedError if there are any; without `refuse`, the loss is accepted for good and 0
    returned. They are counted only in a copied directory, where the log may have been copied before
    the note.
    """
    mark = lock.watermark
    if mark is None or mark.log_id != loaded.header.log_id or mark.seq <= loaded.position.seq:
        return 0
    if lock.copied:
        return mark.seq - loaded.position.seq
    if refuse:
        raise regression_error(lock.path, loaded.position.seq, mark)
    lock.write(None)
    return 0


def _set_aside(
    files: Files, path: Path, fd: int, handle: ReadHandle, loaded: Loaded
) -> tuple[Path | None, int]:
    """Copy what follows the last good frame to a file beside the log, durably; then cut it off.

    Holes stay holes. Nothing is copied if all of it is zeros. Returns the path of the copy, and the
    number of bytes cut.
    """
    start = loaded.position.offset
    size = files.fstat(fd).st_size
    rest = Rest(handle, start, size - start)
    kept_at = (
        None
        if rest.is_zero(0, rest.size)
        else _kept(files, path, loaded.position.seq, rest, files.access(fd))
    )
    files.truncate(fd, start)
    files.sync(fd)  # otherwise a later append could mix with what was cut, sector by sector
    return kept_at, size - start


def _kept(files: Files, path: Path, seq: int, rest: Rest, access: Access) -> Path:
    for number in itertools.count(1):
        kept_at = beside(path, f"torn-{seq}-{number}")
        with contextlib.suppress(FileExistsError):
            copy = files.create(kept_at, exclusive=True, mode=0o600)
            break
    try:
        share(files, copy, access, writers_only=False)
        for at, piece in rest.pieces(0, rest.size):
            if piece.strip(b"\0"):
                write_all(files, copy, piece, at)
        files.truncate(copy, rest.size)
        files.sync(copy)
    except BaseException:
        files.close(copy)
        remove_quietly(files, kept_at)
        raise
    files.close(copy)
    files.sync_dir(path.parent)
    return kept_at
