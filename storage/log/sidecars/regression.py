"""Whether a log ends before what was synced to it. Only the note beside the log can show that."""

from __future__ import annotations

import os
from pathlib import Path

from foldlog.protocol.errors import LogRegressedError
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.sidecars.lock import note_path, read_note
from foldlog.storage.log.sidecars.note import Watermark


def lost_since(handle: ReadHandle, log_id: bytes, seq: int, size: int) -> Watermark | None:
    """The note's watermark, if it is ahead of the log, which was read up to `size` and ends with
    batch `seq`.

    None if nothing is missing, or if that is not known. Every reader checks this, so that nobody
    serves a log whose last batches were lost. Cost: reads the note; two more system calls if it is
    ahead.
    """
    note = read_note(handle.files, handle.path)
    mark = None if note is None else note.watermark
    if mark is None or mark.log_id != log_id or mark.seq <= seq:
        return None
    # The note was read last, and may be newer: the writer may have appended meanwhile, or moved on
    # to another file.
    here = handle.files.fstat(handle.fd)
    try:
        there = handle.files.stat(handle.path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return mark if os.path.samestat(here, there) and here.st_size == size else None


def regression_text(seq: int, mark: Watermark) -> str:
    """What is wrong with a log that ends with batch `seq`, without its path."""
    return f"ends with batch {seq}, but batch {mark.seq} was synced to it"


def regression_error(path: Path, seq: int, mark: Watermark) -> LogRegressedError:
    """The error for a log that ends with batch `seq`, with the remedy."""
    note = note_path(path).name
    return LogRegressedError(
        path,
        f"{regression_text(seq, mark)}, according to {note}. If an older copy was put there on"
        ' purpose, accept it: open it with on_damage="cut" (--on-damage cut), or move'
        f" {note} away",
    )
