"""A thread of the product's own: whoever waits for it never waits in vain.

Where memory is short, a thread may die before its first line, and nobody is told. So who starts one
waits until it runs, and gives it up if that takes too long: then it never will. Once it runs, a
MemoryError does not end it.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from math import inf

from foldlog.actors.base.answers import Answer
from foldlog.actors.base.memory import pause
from foldlog.storage.handover import RECHECK_S

LOOKS = 50
"""Looks for a thread that was started, `RECHECK_S` apart, before it is given up. They are counted,
not timed, so that a pause of the process counts as one."""


def call_aside(call: Callable[[], object], failed: Callable[[BaseException], object]) -> None:
    """Call `call`, which must not raise, on a thread of its own, where no interrupt comes. If none
    can be started, calls `failed` with the RuntimeError."""
    try:
        _thread.start_new_thread(call, ())
    except RuntimeError as error:
        failed(error)


def _nothing() -> None:
    pass


class OwnThread(threading.Thread):
    """See the module. `begin` starts it."""

    def __init__(
        self,
        name: str,
        work: Callable[[], object],
        at_end: Callable[[], object] = _nothing,
    ) -> None:
        """`work` is called again after a MemoryError, and so must be able to continue. Whatever
        ends it, `at_end` is called after it, until it has the memory that it needs."""
        super().__init__(name=name, daemon=True)
        self._work, self._at_end = work, at_end
        self._begun: Answer[None] = Answer()
        """Cancelled if it is never to run."""
        self._refusal: BaseException | None = None
        """Why it could not be started."""

    def begin(self, timeout_s: float | None = None) -> bool:
        """Start it, and return True once it runs.

        False after `timeout_s`; RuntimeError if no thread can be started, MemoryError if it died
        before it ran. Then it never runs.
        """
        begun = self._begun
        call_aside(self._start_aside, self._refuse)
        deadline = inf if timeout_s is None else time.monotonic() + timeout_s
        for _ in range(LOOKS):
            rest = max(deadline - time.monotonic(), 0.0)
            if begun.wait(min(rest, RECHECK_S)):
                break
            if rest == 0.0 and self.withdraw():
                return False
        if self.withdraw():
            raise self._refusal or MemoryError(f"the thread {self.name} did not begin")
        begun.result()
        return True

    def _start_aside(self) -> None:
        """An interrupt within `Thread.start` can leave locks of `threading` held, and it waits for
        ever if the thread dies before its first line: no thread that is needed calls it."""
        try:
            self.start()
        except BaseException as error:
            self._refuse(error)

    def _refuse(self, error: BaseException) -> None:
        self._refusal = error
        self.withdraw()

    @property
    def has_begun(self) -> bool:
        """True if it runs, or has ended."""
        return self._begun.done()

    def withdraw(self) -> bool:
        """Keep it from running. False if it has begun."""
        if not self._begun.cancel():
            return False
        # Who waits in `Thread.start` for a thread that died holds it for ever.
        self._work = self._at_end = _nothing
        return True

    def run(self) -> None:
        """Called on the thread. No handler calls anything: it may have no memory for that."""
        is_over = is_short = False
        struck: BaseException | None = None
        while True:
            try:
                if is_short:
                    pause()
                if not is_over:
                    self._begun.finish(None)
                    if self._begun.cancelled():
                        return
                    self._work()
                    is_over = True
                self._at_end()
                break
            except MemoryError:
                is_short = True
            except BaseException as error:
                if is_over:
                    raise
                struck, is_over = error, True
        self._work = self._at_end = _nothing  # they hold whoever holds this thread
        if struck is not None:
            raise struck
