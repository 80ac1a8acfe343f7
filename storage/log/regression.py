"""Whether a log ends before what was synced to it. Nothing inside a log shows that; the note beside
it does."""

from __future__ import annotations

from pathlib import Path

from foldlog.protocol.errors import LogRegressedError
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.lock import note_path, read_note
from foldlog.storage.log.note import Watermark


def lost_since(handle: ReadHandle, log_id: bytes, seq: int, size: int) -> Watermark | None:
    """What the note remembers as synced, if the log, which was read up to `size` and ends with
    batch `seq`, lost some of it.

    None if it lost nothing, or if that cannot be told. Every reader asks this: a log that has
    regressed is not served as if its last batches had never been. Cost: a read of the note; two
    calls to the system more if it is ahead.
    """
    note = read_note(handle.files, handle.path)
    mark = None if note is None else note.watermark
    if mark is None or mark.log_id != log_id or mark.seq <= seq:
        return None
    # The note is read last, and may be newer: a writer has appended meanwhile, or goes on in
    # another file.
    here = handle.files.fstat(handle.fd)
    try:
        there = handle.files.stat(handle.path)
    except OSError:
        return None
    same_file = (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
    return mark if same_file and here.st_size == size else None


def regression_text(seq: int, mark: Watermark) -> str:
    """What is wrong with a log that ends with batch `seq`, in words."""
    return f"ends with batch {seq}, but batch {mark.seq} was synced to it"


def regression_error(path: Path, seq: int, mark: Watermark) -> LogRegressedError:
    """The error for it, with what to do about it."""
    note = note_path(path).name
    return LogRegressedError(
        path,
        f"{regression_text(seq, mark)}, as {note} remembers. If an older copy was put there on"
        ' purpose, accept it: open it with on_damage="cut" (--on-damage cut), or move'
        f" {note} away",
    )
