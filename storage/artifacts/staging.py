"""An artifact under construction: a directory that gets its name in one step."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from foldlog.storage.log.files import Files, unused_path


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
