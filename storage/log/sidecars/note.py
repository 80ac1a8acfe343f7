"""The note beside a log: its writer, and how far it is known to be synced. Owns the note's bytes.

    note := slot slot                                                1,024 bytes
    slot := magic  body  checksum  zeros  magic                      512 bytes, one sector
    body := counter  pid  pid namespace  boot id  host  inode of the note  flags
            log id  sequence  size  inode of the poisoned log

Little-endian; the checksum is CRC-32C over magic and body. Notes go to the two slots in turn, so
that a torn write or damage to one slot leaves the previous note. The valid slot with the higher
counter wins.

Only a watermark with a valid checksum can make foldlog refuse an undamaged log. A copy of the note,
in a copied directory, differs from the note itself by its inode.
"""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from pathlib import Path
from typing import NamedTuple

from crc32c import crc32c

from foldlog.protocol.errors import drop_system_errors

NOTE_MAGIC = b"foldlog note 1\r\n"
SLOT_BYTES = 512
NOTE_BYTES = 2 * SLOT_BYTES
LOCK_MAGIC = b"foldlog lock 1\r\n"
LOCK_BYTES = 64
"""The lock file holds its magic four times, so that it is recognized even if a part is damaged."""

_BODY = struct.Struct("<16s Q I Q 16s 64s Q B 16s Q Q Q")  # as drawn above, with the magic
_CRC = struct.Struct("<I")
_WATERMARK, _POISONED = 1, 2  # flags
_MAX_BOOT_CHARS = 64


class Watermark(NamedTuple):
    """What was known to be synced when the note was written."""

    log_id: bytes
    seq: int
    size: int


class Holder(NamedTuple):
    """The process that writes the log."""

    pid: int
    """In its own pid namespace."""
    pid_namespace: int
    """The inode of that namespace; 0 if unknown."""
    boot: bytes
    """The boot id of its machine, 16 bytes; zeros if unknown."""
    host: str


class Note(NamedTuple):
    """The content of a note."""

    holder: Holder
    inode: int
    """Of the file that the note was written to."""
    watermark: Watermark | None = None
    poisoned: int | None = None
    """The inode of a log file whose fsync failed."""
    counter: int = 0
    """+1 each time the note is written."""


def pack_slot(note: Note) -> bytes:
    """The slot that holds `note`."""
    holder = note.holder
    mark = note.watermark or Watermark(b"", 0, 0)
    flags = (note.watermark is not None) * _WATERMARK | (note.poisoned is not None) * _POISONED
    body = _BODY.pack(
        NOTE_MAGIC,
        note.counter,
        holder.pid,
        holder.pid_namespace,
        holder.boot,
        holder.host.encode(errors="replace")[:64],
        note.inode,
        flags,
        mark.log_id,
        mark.seq,
        mark.size,
        note.poisoned or 0,
    )
    slot = body + _CRC.pack(crc32c(body))
    return slot.ljust(SLOT_BYTES - len(NOTE_MAGIC), b"\0") + NOTE_MAGIC


def parse_note(raw: bytes) -> Note | None:
    """The newest valid note in `raw`; None if there is none."""
    slots = (_parse_slot(raw[:SLOT_BYTES]), _parse_slot(raw[SLOT_BYTES:NOTE_BYTES]))
    return max((slot for slot in slots if slot), key=lambda note: note.counter, default=None)


def _parse_slot(slot: bytes) -> Note | None:
    if len(slot) != SLOT_BYTES or not slot.startswith(NOTE_MAGIC):
        return None
    body = slot[: _BODY.size]
    if _CRC.unpack_from(slot, _BODY.size)[0] != crc32c(body):
        return None
    _, counter, pid, namespace, boot, host, inode, flags, log_id, seq, size, poisoned = (
        _BODY.unpack(body)
    )
    return Note(
        Holder(pid, namespace, boot, host.rstrip(b"\0").decode(errors="replace")),
        inode,
        Watermark(log_id, seq, size) if flags & _WATERMARK else None,
        poisoned if flags & _POISONED else None,
        counter,
    )


def is_own(raw: bytes, magic: bytes, size: int) -> bool:
    """True if a side file that begins with `raw` was created by foldlog, even if it is damaged, or
    empty or zeros after a crash.

    `magic`, `size`: those of the lock file or the note. `raw` has one byte more than `size` if the
    file is longer.
    """
    if len(raw) > size:
        return False
    return not raw.strip(b"\0") or magic in raw


def describe_holder(holder: Holder | None, here: Holder) -> tuple[int | None, str]:
    """The pid of `holder` if it means the same process to `here`; otherwise None, and `holder` in
    words."""
    if holder is None:
        return None, ""
    if holder.boot != here.boot and any(holder.boot) and any(here.boot):
        return None, f"a process on another machine ({holder.host}, pid {holder.pid} there)"
    if holder.pid_namespace != here.pid_namespace:
        return None, f"another process (pid {holder.pid} in its own pid namespace)"
    return holder.pid, ""


def this_process() -> Holder:
    """This process as a holder."""
    boot, namespace = bytes(16), 0
    with contextlib.suppress(ValueError):
        boot = uuid.UUID(boot_id()).bytes
    with drop_system_errors():
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return Holder(os.getpid(), namespace, boot, os.uname().nodename)


_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_boot = ""  # once it was read: a process does not outlive its boot


def boot_id() -> str:
    """The id of the machine's current boot; "" if the system has none, which counts as restarted
    since. OSError if it cannot be read just now, for want of a descriptor, say."""
    global _boot
    if not _boot:
        try:
            _boot = _BOOT_ID.read_text(encoding="ascii").strip()[:_MAX_BOOT_CHARS]
        except (FileNotFoundError, NotADirectoryError, PermissionError, UnicodeDecodeError):
            return ""
    return _boot
