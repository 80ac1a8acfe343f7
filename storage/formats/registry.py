"""The table of the file formats, and reading a log of whichever of them it is."""

from __future__ import annotations

from pathlib import Path

from foldlog.protocol.errors import (
    CorruptLogError,
    InvalidFormatError,
)
from foldlog.protocol.frames import FileHead
from foldlog.protocol.store import FormatName
from foldlog.storage.formats.foldlog.log import FRAMES
from foldlog.storage.formats.foldlog.replay import read_head
from foldlog.storage.formats.format import Known, Loaded, LogFormat, Progress, Verdict
from foldlog.storage.formats.slipstream.log import SLIPSTREAM
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.note import Watermark
from foldlog.storage.log.regression import lost_since, regression_error

FORMATS: dict[FormatName, LogFormat] = {format.name: format for format in (FRAMES, SLIPSTREAM)}
"""By name. The first is that of a new log."""
MAGICS = tuple(format.magic for format in FORMATS.values())
"""What a log of any format begins with."""


def format_named(name: FormatName | None) -> LogFormat:
    """The format of that name; that of a new log for None."""
    return FRAMES if name is None else FORMATS[name]


def format_of(handle: ReadHandle) -> LogFormat:
    """The format of a log file, by its first bytes; foldlog's own for a file of no format, which it will refuse."""
    first = handle.files.read(handle.fd, max(map(len, MAGICS)), 0)
    found = (format for format in FORMATS.values() if first.startswith(format.magic))
    return next(found, FRAMES)


def load(
    handle: ReadHandle, progress: Progress | None = None, known: Known | None = None
) -> Loaded:
    """Read a log file, of the format that its head tells, to its end or to the first bad frame, which is returned and not judged.

    Cost: 1,000,000 entries of 100 bytes take 30 ms compacted, 0.6 s in batches (measured with the file in the page cache).
    The other format: 2 s.
    """
    return format_of(handle).load(handle, progress, known)


def check_own_format(handle: ReadHandle) -> None:
    """InvalidFormatError, with the remedy, for a log of another format than foldlog's own: for who reads frames only."""
    found = format_of(handle)
    if found is not FRAMES:
        raise InvalidFormatError(
            handle.path,
            0,
            f"a log of the format {found.name}, for which this is not supported: "
            "`foldlog convert` makes a foldlog log of it",
        )


def read_own_head(handle: ReadHandle) -> FileHead:
    """`read_head`, for who reads frames only: the error for a log of another format names the remedy."""
    try:
        return read_head(handle)
    except InvalidFormatError:
        check_own_format(handle)
        raise


def diagnose(handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
    """Whether what follows the last valid bytes of `loaded` is torn or corrupt, and the reason."""
    return loaded.format.diagnose(handle, loaded)


def load_intact(handle: ReadHandle, progress: Progress | None = None) -> Loaded:
    """`load`, for one that only reads: CorruptLogError or InvalidFormatError for damage; a torn
    tail is left out.

    LogRegressedError for a log that ends before what the note beside it remembers as synced.
    """
    loaded = _undamaged(handle, progress)
    if regressed(handle, loaded) is None:
        return loaded
    loaded = _undamaged(handle, progress)  # its writer may have been about to end the last frame
    if (mark := regressed(handle, loaded)) is not None:
        raise regression_error(handle.path, loaded.position.seq, mark)
    return loaded


def _undamaged(handle: ReadHandle, progress: Progress | None) -> Loaded:
    loaded = load(handle, progress)
    if loaded.bad is not None:
        verdict, why = diagnose(handle, loaded)
        if verdict is Verdict.CORRUPT:
            raise damage_error(handle.path, loaded, why)
    return loaded


def regressed(handle: ReadHandle, loaded: Loaded) -> Watermark | None:
    """What the note beside the log remembers as synced, if `loaded` lost some of it."""
    return lost_since(handle, loaded.header.log_id, loaded.position.seq, loaded.size)


def damage_error(path: Path, loaded: Loaded, why: str) -> CorruptLogError | InvalidFormatError:
    """The error for a log whose first bad frame is no torn tail."""
    assert loaded.bad is not None
    kind = InvalidFormatError if loaded.bad.unsupported else CorruptLogError
    if not loaded.base_end:
        return kind(path, loaded.bad.offset, why)
    return kind(path, loaded.bad.offset, why, loaded.fold.seq, bytes(loaded.fold.cursor()))
