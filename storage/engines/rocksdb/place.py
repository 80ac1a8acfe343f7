"""Where a database is, and whether it still is."""

from __future__ import annotations

import os
from pathlib import Path

from foldlog.protocol.errors import LogChangedError


class Place:
    """The directory of an open database."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = os.fspath(path)  # a stat of a Path takes 1 us longer
        self._found = _identity(self._name)

    def check(self) -> None:
        """LogChangedError if it is gone, or another directory has its name. Cost: 2 us."""
        try:
            found = _identity(self._name)
        except OSError as error:
            raise LogChangedError(self.path, f"is gone: {error.strerror}") from None
        if found != self._found:
            raise LogChangedError(self.path, "was replaced by another directory")


def _identity(name: str) -> tuple[int, int]:
    info = os.stat(name)
    return info.st_dev, info.st_ino
