"""Counters of what an operation costs: calls, bytes, leaves, copies, messages, lines. No clock."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from statistics import median_high
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import pytest

from foldlog import Store
from foldlog.actors.base.adapter import Inbox, Mail
from foldlog.storage.fold import delta, leaf
from foldlog.storage.fold.leaf import Columns
from foldlog.storage.formats.foldlog import writer
from foldlog.testing import FaultyFiles, UnsyncedFiles


class CountedFiles(FaultyFiles):
    """Files that count calls and bytes. An fsync is counted, and not made."""

    def __init__(self) -> None:
        super().__init__(inner=UnsyncedFiles())
        self.bytes_read = self.bytes_written = 0

    def forget(self) -> None:
        """Count from here on."""
        self.arm()
        self.bytes_read = self.bytes_written = 0

    @property
    def reads(self) -> int:
        return self.counts["read"] + self.counts["read_into"]

    def read(self, fd: int, size: int, offset: int) -> bytes:
        data = super().read(fd, size, offset)
        self.bytes_read += len(data)
        return data

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        count = super().read_into(fd, buffer, offset)
        self.bytes_read += count
        return count

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        count = super().write(fd, data, offset)
        self.bytes_written += count
        return count


class LeafCounter:
    """Counts how often leaves are decoded and encoded, while the patch holds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.keys = self.entries = self.encoded = 0
        decode_keys, entries, encode_leaf = leaf.decode_keys, leaf._entries, leaf.encode_leaf

        def counted_keys(index: bytes | memoryview) -> list[str]:
            self.keys += 1
            return decode_keys(index)

        def counted_entries(*arguments: Any) -> Columns:
            self.entries += 1
            return entries(*arguments)

        def counted_encode(*columns: Any) -> bytes:
            self.encoded += 1
            return encode_leaf(*columns)

        patch.setattr(leaf, "decode_keys", counted_keys)
        patch.setattr(leaf, "_entries", counted_entries)
        patch.setattr(writer, "encode_leaf", counted_encode)

    def forget(self) -> None:
        """Count from here on."""
        self.keys = self.entries = self.encoded = 0

    def __bool__(self) -> bool:
        """Whether any was."""
        return bool(self.keys or self.entries or self.encoded)


class CountedRun(delta.Run):
    """In place of `delta.Run`: counts the changes that are copied into runs and pieces."""

    __slots__ = ()
    copied = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        CountedRun.copied += len(self)

    def update(self, *arguments: Any, **more: Any) -> None:
        before = len(self)
        super().update(*arguments, **more)
        CountedRun.copied += (
            len(arguments[0]) if isinstance(arguments[0], dict) else len(self) - before
        )


class SentMail:
    """The messages that are put into mailboxes, while the patch holds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.mails: list[tuple[Inbox, str]] = []
        offer = Inbox.offer

        def counted(inbox: Inbox, mail: Mail, *waiting: Any) -> None:
            self.mails.append((inbox, type(mail.message).__name__))
            offer(inbox, mail, *waiting)

        patch.setattr(Inbox, "offer", counted)

    def to_writer(self, store: Store) -> list[str]:
        """What the writer of `store` was sent, by type."""
        return [message for inbox, message in self.mails if inbox is store._supervisor.writer.inbox]


def calls_of(
    patch: pytest.MonkeyPatch, owner: ModuleType | type, name: str
) -> list[tuple[Any, ...]]:
    """The arguments of each call of a function of a module or class, while the patch holds."""
    calls: list[tuple[Any, ...]] = []
    function = getattr(owner, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **options)

    patch.setattr(owner, name, noted)
    return calls


def functions_of(call: Callable[..., object], *arguments: object) -> list[str]:
    """The functions in Python that a call calls on this thread, itself included."""
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_qualname)

    profiled = sys.getprofile()
    sys.setprofile(note)
    try:
        call(*arguments)
    finally:
        sys.setprofile(profiled)
    return called


class Work(NamedTuple):
    """What a call took."""

    lines: int
    """Lines of Python that were executed: those of a loop, each time round."""
    peak_bytes: int
    """Of memory, above what was held before."""

    def is_like(self, other: Work) -> bool:
        """True if both may be the same operation on stores of any size.

        A cost that depends on the size shows in lines or in bytes.
        """
        few, many = sorted((self.lines, other.lines))
        small, large = sorted((self.peak_bytes, other.peak_bytes))
        return many <= 1.2 * few + 10 and large <= 1.5 * small + 4096


def usual(works: Sequence[Work]) -> Work:
    """The cost of a call made repeatedly: medians, since the first time costs more."""
    return Work(*map(median_high, zip(*works, strict=True)))


def work_of(call: Callable[..., object], *arguments: object) -> Work:
    """What a call takes, on this thread."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    traced = sys.gettrace()
    gc.disable()  # or it would be charged with what others left
    tracemalloc.start()
    sys.settrace(trace)
    try:
        call(*arguments)
    finally:
        sys.settrace(traced)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.enable()
    return Work(lines, peak_bytes)
