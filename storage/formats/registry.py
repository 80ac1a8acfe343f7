"""The table of the file formats, and loading a log of any of them."""

from __future__ import annotations

from pathlib import Path

from foldlog.protocol.errors import CorruptLogError, InvalidFormatError
from foldlog.protocol.frames import FileHeader
from foldlog.protocol.store import FormatName
from foldlog.storage.formats.foldlog.log import FRAMES
from foldlog.storage.formats.foldlog.replay import read_header
from foldlog.storage.formats.format import Known, Loaded, LogFormat, Progress, Verdict
from foldlog.storage.formats.slipstream.log import SLIPSTREAM
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.sidecars.regression import lost_since, regression_error

FORMATS: dict[FormatName, LogFormat] = {format.name: format for format in (FRAMES, SLIPSTREAM)}
"""By name. The first is the default for a new log."""
MAGICS = tuple(format.magic for format in FORMATS.values())
"""What logs begin with, one for each format."""


def format_named(name: FormatName | None) -> LogFormat:
    """The format with this name; for None, the default for a new log."""
    return FRAMES if name is None else FORMATS[name]


def format_of(handle: ReadHandle) -> LogFormat:
    """The format of a log file, by its first bytes.

    foldlog's own if no format matches: loading the file then raises InvalidFormatError.
    """
    first = handle.files.read(handle.fd, max(map(len, MAGICS)), 0)
    found = (format for format in FORMATS.values() if first.startswith(format.magic))
    return next(found, FRAMES)


def load(
    handle: ReadHandle, progress: Progress | None = None, known: Known | None = None
) -> Loaded:
    """`LogFormat.load`, for the format of the file.

    Cost: 30 ms for 1,000,000 entries of 100 bytes if compacted, 0.6 s in batches; 2 s in the Rust
    crate's format (measured with the file in the page cache).
    """
    return format_of(handle).load(handle, progress, known)


def check_own_format(handle: ReadHandle) -> None:
    """InvalidFormatError for a log that is not in foldlog's own format, with the remedy."""
    found = format_of(handle)
    if found is not FRAMES:
        raise InvalidFormatError(
            handle.path,
            0,
            f"a log in the format {found.name}, for which this is not supported: "
            "convert it to a foldlog log with `foldlog convert`",
        )


def read_own_header(handle: ReadHandle) -> FileHeader:
    """The file header of a log in foldlog's own format. For others, see `check_own_format`."""
    try:
        return read_header(handle)
    except InvalidFormatError:
        check_own_format(handle)
        raise


def load_intact(handle: ReadHandle, progress: Progress | None = None) -> Loaded:
    """`load` for readers, which leaves out a torn tail.

    CorruptLogError or InvalidFormatError if the log is damaged. LogRegressedError if batches that
    were synced according to the note are missing.
    """
    for _ in range(2):  # at the first look the writer may have been finishing the last frame
        loaded = _undamaged(handle, progress)
        mark = lost_since(handle, loaded.header.log_id, loaded.position.seq, loaded.size)
        if mark is None:
            return loaded
        error = regression_error(handle.path, loaded.position.seq, mark)
    raise error


def _undamaged(handle: ReadHandle, progress: Progress | None) -> Loaded:
    loaded = load(handle, progress)
    if loaded.bad is not None:
        verdict, why = loaded.format.diagnose(handle, loaded)
        if verdict is Verdict.CORRUPT:
            raise damage_error(handle.path, loaded, why)
    return loaded


def damage_error(path: Path, loaded: Loaded, why: str) -> CorruptLogError | InvalidFormatError:
    """The error for a log whose first bad bytes are not a torn tail."""
    assert loaded.bad is not None
    kind = InvalidFormatError if loaded.bad.unsupported else CorruptLogError
    if not loaded.base_end:
        return kind(path, loaded.bad.offset, why)
    return kind(path, loaded.bad.offset, why, loaded.fold.seq, bytes(loaded.fold.cursor()))
