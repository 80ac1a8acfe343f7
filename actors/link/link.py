"""The link: feeds a store from an upstream, on an event loop in a thread of its own.

It survives every error:

| what fails                  | what happens                       | what callers see              |
|-----------------------------|------------------------------------|-------------------------------|
| connection, a gap, silence  | detach; attach at the cursor       | LOST, then ATTACHING          |
| the store refuses a batch   | the same                           | LOST with the store's error   |
| the bucket does not exist   | wait for it                        | LOST, with that reason        |
| credentials, permissions    | nothing: a retry cannot help       | FAILED with UpstreamRefused   |
| new upstream, a mass delete | nothing is written; the link waits | FAILED until `accept_reset()` |
| an update over the limits   | nothing is written, or skipped     | FAILED with UpstreamOversize  |
| a hook, or a bug            | restarted, within a limit          | a Restart, finally FAILED     |

Reads continue throughout. Detaching discards all received state: the store's cursor alone says
where to resume.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import Callable

from foldlog.actors.base.threads import OwnThread
from foldlog.actors.link.attachment import Attachment
from foldlog.actors.link.intake import HookFailed, Intake, LinkConfig, Sink
from foldlog.actors.link.progress import LinkState, LinkStats, Progress
from foldlog.actors.link.resuming import retry_delay_s
from foldlog.actors.store.core import Restart
from foldlog.protocol.errors import FoldlogError, StoreClosed
from foldlog.protocol.logger import log
from foldlog.protocol.upstream import (
    Closable,
    ResetHeld,
    Upstream,
    UpstreamError,
    UpstreamLost,
    UpstreamMissing,
    UpstreamOversize,
    UpstreamRefused,
)

CLOSE_S = 5.0
MISSING_ATTEMPT = 5
"""What does not exist is looked for at the slowest pace."""


class Link:
    """See the module. Call `start` once; any thread may query it and stop it."""

    def __init__(self, name: str, sink: Sink, upstream: Upstream, config: LinkConfig) -> None:
        self._name, self._sink, self._upstream, self._config = name, sink, upstream, config
        self.progress = Progress(name)
        self._restarts_s: list[float] = []
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._accept: asyncio.Event | None = None
        self._intake = Intake(sink, config, self.progress)
        self._death: Exception | None = None
        self.thread = OwnThread("foldlog-link", self._run, self._end)

    # Called from any thread.

    def start(self) -> None:
        """Start the thread: see `OwnThread.begin`."""
        self.thread.begin()

    def ask_to_stop(self) -> None:
        """Tell the thread to end. Never blocks."""
        self._stopping = True
        self._on_loop(lambda: self._task.cancel() if self._task is not None else None)

    def stop(self, timeout_s: float = CLOSE_S) -> None:
        """Stop and wait for the thread to end; from the link's own thread, returns at once."""
        self.ask_to_stop()
        if threading.current_thread() is self.thread or self._pid != os.getpid():
            return
        deadline = time.monotonic() + timeout_s
        while self.thread.is_alive() and time.monotonic() < deadline:
            self.thread.join(0.25)
            # Ask again: a client library may have swallowed the cancellation.
            self.ask_to_stop()

    def accept_reset(self) -> None:
        """Accept the held reset. Does nothing if no reset is held."""
        if isinstance(self.progress.error, ResetHeld):
            self._intake.accepted = True
            # At once, so that a caller who waits from here on does not see the old failure.
            self.progress.error = None
            self.progress.set(LinkState.ATTACHING, "the reset was accepted")
            self._on_loop(lambda: self._accept.set() if self._accept is not None else None)

    @property
    def state(self) -> LinkState:
        """What it is doing."""
        return self.progress.state

    @property
    def reason(self) -> str:
        """Why it is in that state; empty if there is nothing to say."""
        return self.progress.reason

    @property
    def error(self) -> Exception | None:
        """Why it is FAILED."""
        return self.progress.error

    @property
    def updates(self) -> int:
        """Updates received and applied since the mirror was opened."""
        return self.progress.updates

    def stats(self) -> LinkStats:
        """The link's current statistics."""
        return self.progress.stats()

    def __repr__(self) -> str:
        return f"<foldlog link {self.state}>"

    def _on_loop(self, call: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None and self._pid == os.getpid():
            with contextlib.suppress(RuntimeError):  # the loop is closed: the thread has ended
                loop.call_soon_threadsafe(call)

    # Runs on the link's thread.

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._death = error if isinstance(error, Exception) else FoldlogError(repr(error))
            log.critical("%s: the link died", self._name, exc_info=True)

    def _end(self) -> None:
        if self._death is not None:
            self.progress.fail(self._death)
        else:
            self.progress.set(LinkState.CLOSED)

    async def _main(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._accept = asyncio.Event()
        attempt = 0
        while not self._stopping:
            confirmed = self.progress.confirmed_at
            error = await self._attached()
            if error is None:
                return
            attempt = 0 if self.progress.confirmed_at > confirmed else attempt + 1
            await self._after(error, attempt)

    async def _attached(self) -> BaseException | None:
        """Attach, and let go. Why that ended; None if the link is to end as well."""
        parts = (self._upstream, self._config, self._sink, self._intake, self.progress)
        error: BaseException = UpstreamLost("the upstream ended its changes")
        try:
            await Attachment(*parts).run()
        except BaseException as raised:
            error = raised
        if isinstance(error, asyncio.CancelledError) and not self._is_over():
            error = UpstreamLost("its client library cancelled what it was asked for")
        if not self._is_over() and _is_passing(error):
            self.progress.set(LinkState.LOST, _reason(error))
        try:
            await self._let_go()
        except HookFailed as failed:
            error = failed
        return None if self._is_over() else error

    def _is_over(self) -> bool:
        """True once the link is told to stop, or its store is closed."""
        if self._stopping or (self._task is not None and self._task.cancelling()):
            return True
        try:
            self._sink.snapshot()
        except StoreClosed:
            return True
        except Exception:
            return False
        return False

    async def _let_go(self) -> None:
        self.progress.behind = None
        if isinstance(self._upstream, Closable):
            # A cancellation, too: a client library may cancel what still waits for an answer.
            with contextlib.suppress(BaseException):
                async with asyncio.timeout(CLOSE_S):
                    await self._upstream.close()
        if not self._stopping:  # else the cursor is read too early
            await self._intake.settle()

    async def _after(self, error: BaseException, attempt: int) -> None:
        """Wait before the next attempt, as `error` requires."""
        if isinstance(error, ResetHeld):
            assert self._accept is not None
            self._accept.clear()
            self.progress.fail(error)
            await self._accept.wait()
        elif isinstance(error, (UpstreamRefused, UpstreamOversize)):
            self.progress.fail(error)
            await asyncio.Event().wait()
        elif _is_passing(error):
            self.progress.set(LinkState.LOST, _reason(error))
            missing = isinstance(error, UpstreamMissing)
            attempt = MISSING_ATTEMPT if missing else attempt
            await asyncio.sleep(retry_delay_s(attempt, random.random()))
        else:
            await self._restart(error.error if isinstance(error, HookFailed) else error)

    async def _restart(self, error: BaseException) -> None:
        now, config = time.monotonic(), self._config
        recent = [at for at in self._restarts_s if now - at < config.restart_window_s]
        reason = f"{type(error).__name__}: {error}"
        if len(recent) >= config.max_restarts:
            self.progress.fail(error if isinstance(error, Exception) else FoldlogError(reason))
            await asyncio.Event().wait()
        self._restarts_s = [*recent, now]
        delay_s = 0.05 * 2.0 ** len(recent) * random.uniform(0.5, 1.0) if recent else 0.0
        self._sink.note_restart(Restart("link", reason, time.time(), delay_s))
        log.warning("%s: the link died (%s)", self._name, reason, exc_info=error)
        self.progress.set(LinkState.LOST, reason)
        await asyncio.sleep(delay_s)


def _is_passing(error: BaseException) -> bool:
    """True for what may be over by the next attempt, without anyone's help."""
    lasting = (ResetHeld, UpstreamRefused, UpstreamOversize)
    passing = (UpstreamError, FoldlogError, OSError, MemoryError)
    return isinstance(error, passing) and not isinstance(error, lasting)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
