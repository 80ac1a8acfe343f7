"""An artifact under construction: a directory that gets its name in one step."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from foldlog.storage.log.access import narrow
from foldlog.storage.log.files import Access, Files, unused_path


def make_dir(files: Files, path: Path, source: Access | None) -> None:
    """Create a directory that admits nobody whom `source` keeps out; None: the default of any new
    directory. An error leaves nothing."""
    files.make_dir(path, 0o777 if source is None else 0o700)
    if source is None:
        return
    try:
        narrow_dir(files, path, source)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def narrow_dir(files: Files, path: Path, source: Access) -> None:
    """Let the new directory `path` admit nobody whom `source` keeps out."""
    fd = files.open_dir(path)
    try:
        narrow(files, fd, source, directory=True)
    finally:
        files.close(fd)


@contextmanager
def staging(
    files: Files, dest_dir: str | os.PathLike[str], make: Callable[[Path], object]
) -> Iterator[Path]:
    """A directory to fill, made by `make`. At the end of the block it is named `dest_dir`, durably.

    The block syncs what it writes below the directory. FileExistsError if `dest_dir` exists. An
    error leaves nothing, unless only the last step failed, which makes the name durable.
    """
    dest = unused_path(files, dest_dir, "an export")
    stage = dest.with_name(f"{dest.name}.partial-{secrets.token_hex(4)}")  # a unique name
    make(stage)
    try:
        yield stage
        files.sync_dir(stage)
        files.rename_new(stage, dest)
        files.sync_dir(dest.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
