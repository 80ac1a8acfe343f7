"""Feeds bytes from atheris to a reader, from which only typed errors may come.

Usage: fuzz_target.py READER [atheris options]
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["foldlog.protocol", "foldlog.storage"]):
    from foldlog import FoldlogError
    from foldlog.protocol.decoding import decode_batches
    from foldlog.storage.artifacts.artifact import parse_manifest
    from foldlog.storage.fold.leaf import check_leaf
    from foldlog.storage.formats.registry import load_intact
    from foldlog.storage.log.files import OS_FILES, ReadHandle

FOLDER = tempfile.TemporaryDirectory(prefix="foldlog-fuzz-")


def log(data: bytes) -> None:
    """A file in either format."""
    path = Path(FOLDER.name) / "a.log"
    path.write_bytes(data)
    load_intact(ReadHandle(OS_FILES, path)).fold.range()


READERS = {"log": log, "manifest": parse_manifest, "batches": decode_batches, "leaf": check_leaf}


def main() -> None:
    reader = READERS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with contextlib.suppress(FoldlogError, ValueError):
            reader(data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
