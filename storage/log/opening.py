"""Opening a log for writing: the lock, the replay, the repair.

Opening never destroys. Damage is refused, with path, offset and reason, and the file stays as it was. A torn tail, which a
stopped writer leaves, is set aside beside the log before it is cut. Only the holder of the writer's lock repairs.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from foldlog.protocol.engine import OpenReport
from foldlog.protocol.errors import (
    InvalidFormatError,
    LogChangedError,
    StoreLocked,
)
from foldlog.protocol.options import FORMAT, ON_DAMAGE, OnDamage
from foldlog.protocol.store import FormatName
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.format import Loaded, LogFile, Progress
from foldlog.storage.formats.registry import (
    MAGICS,
    damage_error,
    diagnose,
    format_named,
    format_of,
    load,
)
from foldlog.storage.formats.rewrite import write_new
from foldlog.storage.log.access import share
from foldlog.storage.log.files import Access, Files, ReadHandle, remove_quietly, write_all
from foldlog.storage.log.lock import WriterLock, beside, lock_log, sweep_temporaries
from foldlog.storage.log.log import Log
from foldlog.storage.log.origins import read_origin
from foldlog.storage.log.recovery import Rest, Verdict
from foldlog.storage.log.regression import regression_error


def open_log(
    path: Path,
    files: Files,
    *,
    format: FormatName | None = None,
    on_damage: OnDamage = "refuse",
    sync_each: bool = False,
    progress: Progress | None = None,
    lock: WriterLock | None = None,
    crashed: Log | None = None,
) -> tuple[Log, FoldSnapshot, OpenReport]:
    """Open or create the log at `path` (absolute, links resolved) for writing.

    `format`: of a new log; one that exists must be of it. `lock`: held already, and kept on an error. `crashed`: the same
    log as it was abandoned before, in this process; what a file does not tell of itself is taken from there.

    StoreLocked, CorruptLogError, InvalidFormatError, LogRegressedError or OSError, with the file as it was.
    """
    FORMAT.check(format)
    ON_DAMAGE.check(on_damage)
    if files.exists(path):
        files.close(
            files.open_read(path)
        )  # OSError for a device or a folder, before a lock file is made beside it
    given_lock, lock = lock, lock or WriterLock(files, path)
    fd = -1
    try:
        created = not files.exists(path)
        if created and crashed is not None:
            raise LogChangedError(path, "was deleted while the writer was down")
        if created:
            write_new(files, path, FoldSnapshot.empty(), format_named(format))
        handle = ReadHandle(files, path)
        found = format_of(handle)
        fd = files.open_write(path)
        if not lock_log(files, fd):
            raise StoreLocked(path, None)  # under another name: a hard link
        stat = files.fstat(fd)
        loaded = load(
            handle, progress, None if crashed is None else crashed.known((stat.st_dev, stat.st_ino))
        )
        if (
            format is not None and found.name != format
        ):  # behind loading, which refuses what is no log at all
            raise InvalidFormatError(
                path, 0, f"is a {found.name} log, but format={format!r} was asked for"
            )
        cut_reason = ""
        if loaded.bad is not None:
            verdict, cut_reason = diagnose(handle, loaded)
            if verdict is Verdict.CORRUPT and (
                on_damage == "refuse" or not loaded.base_end or loaded.bad.unsupported
            ):
                raise damage_error(path, loaded, cut_reason)
        missing = _missing_batches(lock, loaded, refuse=on_damage == "refuse")
        sweep_temporaries(files, path, MAGICS)
        kept_at, cut_bytes = None, 0
        if loaded.bad is not None:
            kept_at, cut_bytes = _set_aside(files, path, fd, handle, loaded)
        file = LogFile(found, loaded.header, fd, handle, loaded.position, loaded.base_end, False)
        log = Log(files, path, lock, file, sync_each=sync_each)
        poisoned = lock.is_poisoned(stat.st_ino)
        lock.keep(fd)
    except BaseException:
        try:
            if fd >= 0:
                files.close(fd)
        finally:
            if given_lock is None:
                lock.release()
        raise
    try:
        if poisoned:
            log.poison = "an fsync failed in an earlier process"
        elif not loaded.sealed and found.may_be_unsynced(loaded):
            log.sync()  # what a killed writer left may stand in the page cache only
    except BaseException:
        log.abandon(keep_lock=given_lock is not None)
        raise
    if not found.keeps_origin:
        loaded.fold.origin = read_origin(files, path)
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
    return log, loaded.fold, report


def _missing_batches(lock: WriterLock, loaded: Loaded, *, refuse: bool) -> int:
    """How many batches that the note remembers as synced the log does not have, where that is told
    and not refused.

    A log that lost them is refused, or accepted for good. A copy of a directory may lack them: each
    file was copied at another moment, and the log before the note.
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
    """Keep what follows the last good frame in a file of its own, durably, and only then cut it
    off.

    Holes stay holes, and nothing but zeros is not kept at all.
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
    files.sync(fd)  # or a later append could mix with what was cut, sector by sector
    return kept_at, size - start


def _kept(files: Files, path: Path, seq: int, rest: Rest, access: Access) -> Path:
    number = 1
    while True:
        kept_at = beside(path, f"torn-{seq}-{number}")
        with contextlib.suppress(FileExistsError):
            copy = files.create(kept_at, exclusive=True, mode=0o600)
            break
        number += 1
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
