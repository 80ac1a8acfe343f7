"""The origin (the identity of the upstream) of a log whose format has no field for it.

Owns the bytes of LOG.foldlog-origin:

    file := magic  length of the origin (u8)  origin  checksum  zeros  magic        128 bytes

Little-endian; the checksum is CRC-32C over all before it. Before a batch that changes the origin,
the file is replaced by one with the upstream's name alone; after that batch, by one with the new
origin. A crash in between leaves a name without an incarnation: the upstream is known, but nobody
resumes from its cursor.
"""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

from crc32c import crc32c

from foldlog.storage.log.access import share
from foldlog.storage.log.files import Access, Files, remove_quietly, write_all
from foldlog.storage.log.sidecars.lock import beside, open_own, temporary

ORIGIN_MAGIC = b"foldlog origin 1"
ORIGIN_BYTES = 128
_LENGTH_AT = len(ORIGIN_MAGIC)
_CRC = struct.Struct("<I")


def origin_path(path: Path) -> Path:
    """The origin beside the log at `path`."""
    return beside(path, "foldlog-origin")


def pack_origin(origin: bytes) -> bytes:
    """The content of the file for `origin`."""
    body = ORIGIN_MAGIC + bytes((len(origin),)) + origin
    body += _CRC.pack(crc32c(body))
    return body.ljust(ORIGIN_BYTES - len(ORIGIN_MAGIC), b"\0") + ORIGIN_MAGIC


def parse_origin(raw: bytes) -> bytes:
    """The origin that was packed; empty if `raw` is not valid."""
    if len(raw) != ORIGIN_BYTES:
        return b""
    start = _LENGTH_AT + 1
    origin = raw[start : start + raw[_LENGTH_AT]]
    return origin if pack_origin(origin) == raw else b""


def read_origin(files: Files, path: Path, source: Access | None = None) -> bytes:
    """The origin of the log at `path`; empty if there is none, or it is not valid.

    `source`: the access of the log, which the file is then given, as far as permitted.
    ForeignFileError if another program's file has its name.
    """
    try:
        fd = open_own(files, origin_path(path), ORIGIN_MAGIC, ORIGIN_BYTES)
    except FileNotFoundError:
        return b""
    try:
        if source is not None:
            with contextlib.suppress(PermissionError):
                share(files, fd, source, writers_only=False)
        return parse_origin(files.read(fd, ORIGIN_BYTES, 0))
    finally:
        files.close(fd)


def drop_stale_origin(files: Files, path: Path) -> None:
    """Remove the origin that a deleted log left at `path`, before a new log takes the name.

    ForeignFileError if another program's file has its name.
    """
    read_origin(files, path)
    if not files.exists(path):
        remove_quietly(files, origin_path(path))


def write_origin(files: Files, path: Path, origin: bytes, source: Access) -> None:
    """Record `origin` for the log at `path`, atomically and durably.

    `source`: the access of the log. ForeignFileError if another program's file has the name;
    OSError.
    """
    read_origin(files, path)
    new = temporary(path)
    fd = files.create(new, exclusive=True, mode=0o600)
    try:
        share(files, fd, source, writers_only=False)
        write_all(files, fd, pack_origin(origin), 0)
        files.sync(fd)
    except BaseException:
        remove_quietly(files, new)
        raise
    finally:
        files.close(fd)
    files.replace(new, origin_path(path))
    files.sync_dir(path.parent)
