"""The origin (the identity of the upstream) of a log whose format has no field for it: LOG.origin.

The file holds the origin and nothing else. Before a batch that changes the origin, it is cut to the
upstream's name; after that batch, the new origin is written. A crash in between leaves a name
without an incarnation: the upstream is known, but nobody resumes from its cursor.
"""

from __future__ import annotations

from pathlib import Path

from foldlog.protocol.tokens import MAX_ORIGIN_BYTES
from foldlog.storage.log.files import Files, remove_quietly, write_all
from foldlog.storage.log.sidecars.lock import beside, temporary


def read_origin(files: Files, path: Path) -> bytes:
    """The origin of the log at `path`; empty if there is none, or it is not valid."""
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
    """Remove the origin that a deleted log left at `path`, before a new log takes the name."""
    stale = beside(path, "origin")
    if files.exists(stale) and not files.exists(path):
        remove_quietly(files, stale)


def write_origin(files: Files, path: Path, origin: bytes) -> None:
    """Record `origin` for the log at `path`, atomically and durably. OSError if that fails."""
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
