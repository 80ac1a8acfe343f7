"""Work off the loop: calls on one thread, in order. Each is answered, even if memory runs out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from foldlog.actors.base.answers import Answer
from foldlog.actors.base.threads import OwnThread

R = TypeVar("R")


class OffLoop:
    """The thread kept for work off the loop. It is started by the first call, and ends after `end`,
    or once nobody holds this any more."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._thread: OwnThread | None = None
        self._is_over = False
        weakref.finalize(self, self._calls.put, None).atexit = False

    def submit(self, run: Callable[[], R]) -> Answer[R]:
        """Call `run` on the thread. Waits only for the thread to start.

        RuntimeError or MemoryError if none can be started; RuntimeError after `end`. Any thread may
        call it.
        """
        if self._thread is None:
            # Two callers at once may start one each: then both serve.
            worker = _Worker(self._calls)
            thread = OwnThread("foldlog-aio", worker.work)
            thread.begin()
            self._thread = thread
        call = _Call(run)
        self._calls.put(call)
        if self._is_over and call.answer.cancel():  # perhaps nobody takes it any more
            raise RuntimeError("this thread was told to end")
        return call.answer

    def end(self) -> None:
        """Let the thread end after the calls made so far. Never blocks."""
        self._is_over = True  # first: what is put in later may come after the mark
        self._calls.put(None)


class _Call(Generic[R]):
    """A call, and what it came to."""

    __slots__ = ("answer", "error", "result", "run")

    def __init__(self, run: Callable[[], R]) -> None:
        self.run: Callable[[], R] | None = run
        self.answer: Answer[R] = Answer()
        self.result: R | None = None
        self.error: BaseException | None = None

    def carry_out(self) -> None:
        """Run it, once, and answer. Called again if a MemoryError ends it."""
        run = self.run
        if run is not None and self.answer.start():
            self.run = None
            try:
                self.result = run()
            except BaseException as error:
                self.error = error
        if not self.answer.finish(self.result, self.error):
            self.answer.tell()  # perhaps it was answered, and nobody told
        self.result = self.error = None  # its traceback holds this call


class _Worker:
    """What a thread does: the calls of a queue, until the mark."""

    def __init__(self, calls: SimpleQueue[_Call[Any] | None]) -> None:
        self._calls = calls
        self._call: _Call[Any] | None = None
        """The one in hand."""
        self._is_over = False

    def work(self) -> None:
        """Called again if a MemoryError ends it: no call is lost."""
        while not self._is_over:
            if self._call is not None:
                self._call.carry_out()
                self._call = None  # it is not to be held while there is no other
            self._call = self._calls.get()
            self._is_over = self._call is None
        self._calls.put(None)  # for another thread, if there is one
