"""The note beside a log: who writes it, and how far it was known to be on disk. This module owns
its bytes.

    note := slot slot                                                1,024 bytes
    slot := magic  body  checksum  zeros  magic                      512 bytes, one sector
    body := counter  pid  pid namespace  boot id  host  inode of the note  flags
            log id  sequence  size  inode of the poisoned log

Little-endian; the checksum is CRC-32C over magic and body. A note is written into the slot whose
turn it is, so that a torn write or damage to one slot leaves the note before it. The valid slot
with the higher counter counts.

A note is a help, not a truth: nothing in it can make a log that is whole be refused, but for a
watermark with a right checksum. A copy of the note, in a copied directory, is told from the note
itself by its inode.
"""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from pathlib import Path
from typing import NamedTuple

from crc32c import crc32c

NOTE_MAGIC = b"foldlog note 1\r\n"
SLOT_BYTES = 512
NOTE_BYTES = 2 * SLOT_BYTES
LOCK_MAGIC = b"foldlog lock 1\r\n"
LOCK_BYTES = 64
"""The lock file holds its magic four times, so that damage to a part of it does not make it a
stranger's.
"""

_BODY = struct.Struct("<16s Q I Q 16s 64s Q B 16s Q Q Q")  # as drawn above, with the magic
_CRC = struct.Struct("<I")
_WATERMARK, _POISONED = 1, 2  # flags
_MAX_BOOT_CHARS = 64


class Watermark(NamedTuple):
    """What was on disk for certain, when the note was written."""

    log_id: bytes
    seq: int
    size: int


class Holder(NamedTuple):
    """Who writes the log."""

    pid: int
    """As its own pid namespace counts."""
    pid_namespace: int
    """Its inode; 0 if the system does not tell."""
    boot: bytes
    """The boot id of its machine, 16 bytes; zeros if the system does not tell."""
    host: str


class Note(NamedTuple):
    """One state of the note."""

    holder: Holder
    inode: int
    """Of the file that the note was written to."""
    watermark: Watermark | None = None
    poisoned: int | None = None
    """The inode of a log file of which an fsync failed."""
    counter: int = 0


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
    """The newest note in `raw` that is valid; None if there is none."""
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
    """Whether a side file that begins with `raw` was made by foldlog: it may be damaged, empty, or
    zeros after a crash.

    `magic`, `size`: of the lock file or of the note. `raw` has one byte more than `size` if the
    file is longer.
    """
    if len(raw) > size:
        return False
    return not raw.strip(b"\0") or magic in raw


def describe_holder(holder: Holder | None, here: Holder) -> tuple[int | None, str]:
    """The pid of `holder` where `here` can use it, and otherwise who it is, in words."""
    if holder is None:
        return None, ""
    if holder.boot != here.boot and any(holder.boot) and any(here.boot):
        return None, f"a process of another machine ({holder.host}, pid {holder.pid} there)"
    if holder.pid_namespace != here.pid_namespace:
        return None, f"another process (pid {holder.pid} in its own pid namespace)"
    return holder.pid, ""


def this_process() -> Holder:
    """The holder that this process is."""
    boot, namespace = bytes(16), 0
    with contextlib.suppress(ValueError):
        boot = uuid.UUID(boot_id()).bytes
    with contextlib.suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return Holder(os.getpid(), namespace, boot, os.uname().nodename)


def boot_id() -> str:
    """What names this run of the machine; "" where the system does not tell, which reads as
    "restarted since".
    """
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
    return text.strip()[:_MAX_BOOT_CHARS]
