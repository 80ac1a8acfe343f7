"""Log files for tests: written by the engine, split into frames, and reassembled by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crc32c import crc32c

from foldlog import CorruptLogError, Delete, FoldlogError, Put, VersionToken, WatchCursor
from foldlog.protocol.frames import (
    FILE_HEADER,
    FRAME_HEADER,
    FRAME_MAGIC,
    TRAILER,
    FileHeader,
    FrameHeader,
    parse_file_header,
    parse_frame_header,
)
from foldlog.protocol.updates import Update, encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.log.sidecars.lock import lock_path, note_path
from foldlog.testing import UnsyncedFiles

UNSYNCED = UnsyncedFiles()
Batches = Sequence[Iterable[Update]]


class State(NamedTuple):
    """What a log folds to."""

    seq: int
    cursor: bytes
    entries: dict[str, tuple[bytes, bytes]]


class Frame(NamedTuple):
    """A frame in a file."""

    start: int
    end: int
    header: FrameHeader
    raw: bytes

    @property
    def body(self) -> bytes:
        return self.raw[FRAME_HEADER.size : -len(TRAILER)]


def some_batches(count: int = 3, size: int = 20) -> list[list[Update]]:
    """Batches whose every prefix folds to another state, with removals and overwrites in them."""
    return [
        [
            Put(
                f"key{n}",
                bytes(ord("a") + (n + i) % 26 for i in range(size)),
                VersionToken.from_u64(n),
            ),
            Put("last", b"%d" % n),
            Delete(f"key{n - 2}"),
        ]
        for n in range(1, count + 1)
    ]


def write_log(
    path: Path,
    batches: Batches,
    *,
    base: Batches = (),
    sealed: bool = False,
    sync_each: bool = False,
) -> bytes:
    """A log with `base` as its base, then `batches`. Its lock note is removed: no history."""
    if base:
        engine = Engine(path)
        commit_all(engine, base)
        engine.compact()
        engine.close()
    engine = Engine(path, sync_each=sync_each)
    commit_all(engine, batches)
    if sealed:
        engine.close()
    else:
        engine.log.abandon()
    forget_the_watermark(path)
    return path.read_bytes()


def commit_all(engine: Engine, batches: Batches) -> None:
    for updates in batches:
        engine.commit([encode_batch(updates, WatchCursor.from_u64(engine.fold.seq + 1))])


def forget_the_watermark(path: Path) -> None:
    note_path(path).unlink(missing_ok=True)


def tear(path: Path) -> None:
    """Leave a batch without its last byte at the end of the log, as a killed writer may."""
    engine = Engine(path)
    engine.commit([encode_batch([Put("torn", b"away")], WatchCursor.from_u64(99))])
    engine.log.abandon()
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


def damage(path: Path, offset: int) -> None:
    """Flip a bit of a byte of the file in place; a second time, repair it."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes((byte[0] ^ 0x40,)))


def companions(path: Path) -> set[str]:
    """The names of what an open log has beside it."""
    return {lock_path(path).name, note_path(path).name}


def state_of(engine: Engine) -> State:
    fold = engine.fold
    return State(
        fold.seq,
        bytes(fold.cursor()),
        {entry.key: (entry.value, bytes(entry.version)) for entry in fold.range("")},
    )


def read_state(path: Path, **options: Any) -> State:
    """The state of a log, opened for writing (which repairs), then dropped as if killed."""
    engine = Engine(path, **options)
    try:
        return state_of(engine)
    finally:
        engine.log.abandon()


def outcome(path: Path, raw: bytes, **options: Any) -> State | FoldlogError:
    """Open a file of these bytes: a state or a typed error. An error must leave it as it was."""
    path.write_bytes(raw)
    forget_the_watermark(path)
    try:
        return read_state(path, files=UNSYNCED, **options)
    except FoldlogError as error:
        assert path.read_bytes() == raw, "a file that was refused was changed"
        return error


def opened(path: Path, raw: bytes, **options: Any) -> State:
    """The state that a file of these bytes opens with."""
    found = outcome(path, raw, **options)
    assert isinstance(found, State), found
    return found


def refused(path: Path, raw: bytes, kind: Any = CorruptLogError, **options: Any) -> Any:
    """The error of this `kind` (or one of these) with which a file of these bytes is refused."""
    found = outcome(path, raw, **options)
    assert isinstance(found, kind), f"read as {found}"
    return found


def prefix_states(raw: bytes, path: Path) -> dict[int, State]:
    """The state at the end of each frame from the end of the base on."""
    frames = frames_of(raw)
    base_end = next(index for index, frame in enumerate(frames) if frame.header.kind == 4)
    states = {}
    for frame in frames[base_end:]:
        states[frame.end] = opened(path, raw[: frame.end])
    return states


def header_of(raw: bytes) -> FileHeader:
    return parse_file_header(raw[: FILE_HEADER.size])


def frames_of(raw: bytes) -> list[Frame]:
    """The frames of an intact log."""
    seed = header_of(raw).seed
    frames = []
    at = FILE_HEADER.size
    while at < len(raw):
        header = parse_frame_header(raw, at, seed)
        assert header is not None
        frames.append(Frame(at, at + header.size, header, raw[at : at + header.size]))
        at += header.size
    return frames


def forge(raw: bytes, kind: int, body: bytes, **lies: int) -> bytes:
    """A frame that follows the intact log `raw`, checksums valid; `lies` replace header fields."""
    last = frames_of(raw)[-1].header
    fields = {
        "body_len": len(body),
        "body_crc": crc32c(body),
        "seq": last.seq + lies.get("batches", 0),
        "synced_seq": last.synced_seq,
        "offset": len(raw),
        "link": last.crc,
        "kind": kind,
        "flags": last.flags,
        "batches": 0,
    } | lies
    checked = struct.pack("<IIQQQIBBH", *(fields[name] for name in FrameHeader._fields[1:]))
    crc = crc32c(checked, header_of(raw).seed)
    return FRAME_MAGIC + crc.to_bytes(4, "little") + checked + body + TRAILER


def forge_log(frames: Iterable[tuple[int, bytes]], *, base_seq: int = 0) -> bytes:
    """A whole log of hand-made frames (kind, body), none of which holds a batch."""
    header = FileHeader(b"forged log id 16", 7, base_seq)
    raw = header.pack()
    link = header.link
    for kind, body in frames:
        checked = struct.pack(
            "<IIQQQIBBH", len(body), crc32c(body), base_seq, base_seq, len(raw), link, kind, 0, 0
        )
        link = crc32c(checked, header.seed)
        raw += FRAME_MAGIC + link.to_bytes(4, "little") + checked + body + TRAILER
    return raw


def reboot(monkeypatch: Any, boot: str = "another boot") -> None:
    """From here on, the machine has been restarted since anything was written."""
    monkeypatch.setattr("foldlog.storage.log.recovery.boot_id", lambda: boot)
    monkeypatch.setattr("foldlog.storage.formats.foldlog.codec.boot_id", lambda: boot)
