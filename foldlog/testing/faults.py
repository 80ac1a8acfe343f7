"""A file system that fails on purpose at the n-th call."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from foldlog.storage.log.files import OS_FILES, Files
from foldlog.testing.crashes import CrashFiles

OPERATIONS = tuple(
    name
    for name, member in vars(Files).items()
    if callable(member) and not name.startswith("_") and name != "exists"
)
"""The calls that can fail: those of `foldlog.storage.log.files.Files` that reach the operating
system."""


class Call(NamedTuple):
    """A call about to be made."""

    operation: str
    nth: int
    """Its number among calls of this operation, from 1."""
    total: int
    """Its number among all calls, from 1."""
    args: tuple[Any, ...]


class Fault(NamedTuple):
    """Which call is to fail, and how."""

    operation: str | None = None
    """One of `OPERATIONS`; None counts all calls alike."""
    nth: int = 1
    """Which call, from 1."""
    error: int = errno.EIO
    """The errno of the OSError. 0: no error; the call is only cut short (see `takes`)."""
    lasting: bool = False
    """All later calls fail as well."""
    takes: int | None = None
    """The most bytes that a failing write writes before it fails; None means none."""

    def hits(self, call: Call) -> bool:
        """True if `call` is to fail."""
        if self.operation is not None and self.operation != call.operation:
            return False
        number = call.total if self.operation is None else call.nth
        return number == self.nth or (self.lasting and number > self.nth)


class FaultyFiles(Files):
    """Files whose chosen calls fail. A failing call does nothing, except that `close` closes and a
    write writes the bytes of `takes`.

    All calls are counted, even after `disarm()`. Any thread may call it. On top of `CrashFiles`, a
    failed fsync loses what it should have saved. To fail every call in turn:

        for nth in itertools.count(1):
            files = FaultyFiles(Fault(nth=nth))
            run(files)
            if not files.fired:
                break
    """

    def __init__(
        self,
        *faults: Fault,
        hook: Callable[[Call], None] | None = None,
        short: int | None = None,
        inner: Files = OS_FILES,
    ) -> None:
        """`hook`: called before each call; may raise, block, or end the process. `short`: the most
        bytes that one write writes, without an error. `inner`: carries out the calls."""
        for fault in faults:
            if fault.operation is not None and fault.operation not in OPERATIONS:
                raise ValueError(f"{fault.operation!r} is not one of OPERATIONS")
        self.faults, self.hook, self.short, self.inner = faults, hook, short, inner
        self.counts: Counter[str] = Counter()
        """Number of calls by operation."""
        self.total = 0
        self.fired: list[Call] = []
        """The calls that failed."""
        self._lock = threading.RLock()  # a finalizer may close a file within a call

    def arm(self, *faults: Fault) -> None:
        """Reset the counts, and fail these calls instead."""
        with self._lock:
            self.counts.clear()
            self.total, self.faults = 0, faults
            self.fired.clear()

    def disarm(self) -> None:
        """Let all further calls through."""
        self.faults, self.hook, self.short = (), None, None

    def _begin(self, operation: str, args: tuple[Any, ...]) -> Fault | None:
        with self._lock:
            self.counts[operation] += 1
            self.total += 1
            call = Call(operation, self.counts[operation], self.total, args)
            fault = next((fault for fault in self.faults if fault.hits(call)), None)
            if fault is not None:
                self.fired.append(call)
        if self.hook is not None:
            self.hook(call)
        return fault

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        fault, short = self._begin("write", (fd, data, offset)), self.short
        if fault is not None and fault.takes is not None:
            short = fault.takes
        taken = 0
        if fault is None or fault.takes is not None:
            taken = self.inner.write(
                fd, data if short is None else memoryview(data)[:short], offset
            )
        if fault is not None and fault.error:
            raise OSError(fault.error, os.strerror(fault.error))
        return taken

    def close(self, fd: int) -> None:
        fault = self._begin("close", (fd,))
        self.inner.close(fd)
        if fault is not None and fault.error:
            raise OSError(fault.error, os.strerror(fault.error))

    def exists(self, path: Any) -> bool:
        return self.inner.exists(path)


def _failing(operation: str) -> Callable[..., Any]:
    def method(self: FaultyFiles, *args: Any, **options: Any) -> Any:
        fault = self._begin(operation, args)
        if fault is not None and fault.error:
            if operation == "sync" and isinstance(self.inner, CrashFiles):
                self.inner.sync_failed(*args)
            raise OSError(fault.error, os.strerror(fault.error))
        return getattr(self.inner, operation)(*args, **options)

    method.__name__ = operation
    return method


for _operation in OPERATIONS:
    if _operation not in FaultyFiles.__dict__:
        setattr(FaultyFiles, _operation, _failing(_operation))


class UnsyncedFiles(Files):
    """Files whose fsync does nothing, for tests that open thousands of logs. Useless for testing
    power loss."""

    def sync(self, fd: int) -> None:
        pass
