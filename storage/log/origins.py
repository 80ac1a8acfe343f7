"""The origin of a log whose format has no place for it: in a file of its own, LOG.origin.

The file holds the origin and nothing else. It is written after the batch that changes the origin,
and before that batch it is cut to the upstream's name, so that a crash between the two leaves a
name without an incarnation: an upstream that is known, and from whose cursor nobody resumes.
"""

from __future__ import annotations

from pathlib import Path

from foldlog.protocol.tokens import MAX_ORIGIN_BYTES
from foldlog.storage.log.files import Files, remove_quietly, write_all
from foldlog.storage.log.lock import beside, temporary


def read_origin(files: Files, path: Path) -> bytes:
    """The origin of the log at `path`; empty if nobody noted one, or if what was noted is none."""
    noted = beside(path, "origin")
    if not files.exists(noted):
        return b""
    fd = files.open_read(noted)
    try:
        origin = files.read(fd, MAX_ORIGIN_BYTES + 1, 0)
    finally:
        files.close(fd)
    return origin if len(origin) <= MAX_ORIGIN_BYTES else b""


def drop_stale_origin(files: Files, path: Path) -> None:
    """Remove what a log that was deleted left at `path`, before another takes the name."""
    stale = beside(path, "origin")
    if files.exists(stale) and not files.exists(path):
        remove_quietly(files, stale)


def write_origin(files: Files, path: Path, origin: bytes) -> None:
    """Note `origin` for the log at `path`, durably, whole or not at all. OSError if that fails."""
    new = temporary(path)
    fd = files.create(new)
    try:
        write_all(files, fd, origin, 0)
        files.sync(fd)
    except BaseException:
        remove_quietly(files, new)
        raise
    finally:
        files.close(fd)
    files.replace(new, beside(path, "origin"))
    files.sync_dir(path.parent)
