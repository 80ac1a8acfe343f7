"""Verifying a log of any format: at a path, or one that this process writes."""

from __future__ import annotations

import os
from dataclasses import replace

from foldlog.storage.formats.format import Known, Problem, Progress, VerifyReport
from foldlog.storage.formats.registry import format_of
from foldlog.storage.log.files import OS_FILES, Files, ReadHandle, resolve
from foldlog.storage.log.log import Log


def verify_log(
    source: str | os.PathLike[str] | ReadHandle,
    *,
    end: int | None = None,
    files: Files = OS_FILES,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every invariant of a log, given as a path or an open handle.

    Up to the offset `end`, where its last frame must end; by default the whole file, whose tail may
    be torn. Takes no lock, and works beside a writer. InvalidFormatError if the file is not a log,
    or of a newer format; OSError. Cost: about 1 us an entry, and reading the file.
    """
    if not isinstance(source, ReadHandle):
        with ReadHandle(files, resolve(source)) as handle:
            return verify_log(handle, end=end, progress=progress)
    handle = source
    size = handle.files.fstat(handle.fd).st_size if end is None else end
    return format_of(handle).check(handle, size, tail_may_be_torn=end is None, progress=progress)


def verify_live(log: Log, seq: int, progress: Progress | None = None) -> VerifyReport:
    """`verify_log` for a log that this process writes, up to its current end.

    Batch `seq` has been published: a log that ends before it has a problem. Any thread may call it
    while batches are appended and the log is compacted.
    """
    file, size = log.here()
    known = Known(file.header, file.base_end)
    report = file.format.check(
        file.handle, size, tail_may_be_torn=False, known=known, progress=progress
    )
    if report.ok and report.seq < seq:
        lost = Problem(
            size, 0, f"the log ends with batch {report.seq}, but batch {seq} was published"
        )
        return replace(report, problems=(lost,))
    return report
