"""Each frame that a log writes, read back by the reader's own code: what is answered can be
read."""

from __future__ import annotations

from typing import Any

import pytest

from foldlog.protocol.frames import KIND_BATCHES, KIND_OPEN, parse_open
from foldlog.storage.formats.foldlog.log import FRAMES
from foldlog.storage.log.backlog import decoded
from foldlog.storage.log.files import OS_FILES
from foldlog.storage.log.log import Log
from foldlog.storage.log.scan import Chain, read_frames


class Borrowed:
    """A log's own descriptor, read past whatever fails or counts its calls."""

    def __init__(self, log: Log) -> None:
        self.files, self.fd, self.path = OS_FILES, log.file.handle.fd, log.path


def read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, a frame that its reader refuses fails the append that wrote it."""
    write = Log._write

    def checked(log: Log, data: bytes, behind: Chain) -> None:
        before: Any = log.position
        write(log, data, behind)
        if log.file.format is not FRAMES:
            return
        handle: Any = Borrowed(log)
        header: Any = log.file.header
        chain = before
        for frame, body in read_frames(handle, header, before, behind.offset):
            if frame.kind == KIND_BATCHES:
                assert decoded(frame, body)
            elif frame.kind == KIND_OPEN:
                parse_open(body)
            chain = chain.after(frame)
        assert chain == behind

    monkeypatch.setattr(Log, "_write", checked)
