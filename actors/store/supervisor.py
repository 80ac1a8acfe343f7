"""The supervisor: starts a store's actors, restarts them by class of error, and gives up by rule.

It is a plain thread, not an actor: it must outlive every actor, and it waits for none.

| what fails             | what pykka would do   | what happens here      | what callers see       |
|------------------------|-----------------------|------------------------|------------------------|
| a check of arguments   | answers the asker     | the same               | TypeError, ValueError  |
|                        |                       |                        | or a conflict          |
| a write (EIO, ENOSPC)  | answers the asker; a  | the group is answered, | OSError; none of it is |
| that was undone        | tell kills the actor  | the writer continues   | stored                 |
| an fsync, or undoing a | the same              | the fold is written to | the answer, later;     |
| write                  |                       | a new file, requests   | nothing is lost        |
|                        |                       | are retried            |                        |
| a bug: an Exception in | answers, lives on in  | restart in place: log  | the answer, later; if  |
| a handler              | an unknown state; a   | replayed, requests     | it recurs:             |
|                        | tell kills the actor  | settled                | WriterCrashed          |
| SystemExit,            | stops every actor of  | the same as a bug      | the same as a bug      |
| BaseException          | the process; the      |                        |                        |
|                        | asker hangs           |                        |                        |
| on_start               | dies silently, or     | a restart, delayed;    | at open: the error     |
|                        | leaves a ref that     | too many: FAILED       | itself; later:         |
|                        | hangs                 |                        | StoreFailed            |
| on_stop                | dies, or runs twice   | retried, then released | closed, lock released  |
| the log: corrupt,      | -                     | FAILED at once: a      | writes: StoreFailed    |
| locked, replaced, cut, |                       | retry cannot help      | with reason; reads: as |
| regressed              |                       |                        | before                 |
| the log: deleted       | -                     | rewritten from memory  | the answer             |
| a reader               | as above              | restart; what it had   | the answer, or         |
|                        |                       | in hand is retried     | WriterCrashed          |
|                        |                       | once                   |                        |
| maintenance, syncer    | as above              | restart; a job in hand | WriterCrashed          |
|                        |                       | fails                  |                        |
| over `max_restarts` in | -                     | FAILED, until `reopen` | StoreFailed; reads     |
| `restart_window_s`     |                       |                        | continue               |
| the process is paused  | -                     | nothing: the           | nothing                |
|                        |                       | supervisor was late    |                        |
|                        |                       | too, and discounts it  |                        |
| a writer that is stuck | -                     | FAILED, until it comes | StoreFailed; then as   |
|                        |                       | back                   | before                 |
| too few descriptors or | -                     | retried without limit, | the answer, later      |
| threads to restart, or |                       | at most 5 s apart      |                        |
| too little memory      |                       |                        |                        |
| an actor has no memory | callers hang          | noticed within 1 s,    | the answer, later      |
| left to tell its end   |                       | and restarted          |                        |
| the supervisor has too | -                     | it takes up what it    | the answer, later      |
| little memory          |                       | has left undone        |                        |
| an exception strikes a | -                     | restart at once, not   | that caller: the       |
| caller in a turn       |                       | counted                | exception; others: the |
|                        |                       |                        | answer                 |
| the host stops all     | threads end, messages | nothing: the store     | the answer             |
| actors                 | vanish                | ends when its owner    |                        |
|                        |                       | closes it              |                        |
| the supervisor itself  | -                     | FAILED for good        | StoreFailed; reads     |
|                        |                       |                        | continue               |
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from foldlog.actors.base.adapter import (
    STOP,
    DiedInTurn,
    Ended,
    Mail,
    NoThread,
    Notice,
    Started,
    SupervisedActor,
)
from foldlog.actors.base.answers import Answer, look_after_callbacks
from foldlog.actors.base.memory import insist, pause
from foldlog.actors.base.threads import OwnThread
from foldlog.actors.store.core import Core, Restart, State
from foldlog.actors.store.maintenance import Maintenance
from foldlog.actors.store.policy import StuckClock, next_restart_delay_s
from foldlog.actors.store.readers import Reader, ReaderInbox
from foldlog.actors.store.requests import WriterInbox
from foldlog.actors.store.syncer import Syncer
from foldlog.actors.store.writer import Writer
from foldlog.protocol.errors import ForkedStore, StoreClosed, StoreFailed
from foldlog.protocol.logger import log
from foldlog.storage.fold.snapshot import ClosedFold

HEALTH_CHECK_S = 1.0
LOOKS = 4
"""Least number of checks within `stuck_after_s`: at most one interval of a pause goes unnoticed."""


class CloseNow(NamedTuple):
    """Drain, stop all actors and release the log. The future gives the error raised while stopping,
    or None."""

    future: Answer[BaseException | None]


class Reopen(NamedTuple):
    """Retry after FAILED."""

    future: Answer[None]


class Supervisor:
    """See the module. All methods but `post` and `owns` run on its own thread."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._notices: queue.SimpleQueue[Notice | CloseNow | Reopen] = queue.SimpleQueue()
        self.reader_inbox = ReaderInbox()
        writer_inbox = WriterInbox(core.config.mailbox_batches, core.config.mailbox_bytes)
        self.maintenance = Maintenance(core, self.post, writer_inbox)
        self.writer = Writer(core, self.post, writer_inbox, self.maintenance.inbox)
        self.readers = [
            Reader(core, self.post, self.reader_inbox, number)
            for number in range(core.config.readers)
        ]
        self.syncer = Syncer(core, self.post, writer_inbox)
        self._others: list[SupervisedActor] = [self.maintenance, self.syncer, *self.readers]
        self._actors = [self.writer, *self._others]
        self._running: set[SupervisedActor] = set()
        self._due: dict[SupervisedActor, float] = {}  # when to restart whom (time.monotonic())
        self._restarts_s: dict[SupervisedActor, list[float]] = {}
        self._notice: Notice | CloseNow | Reopen | None = None
        """The one in hand."""
        self._is_behind = False
        """True after a step that a MemoryError ended: see `_catch_up`."""
        self._closing: list[CloseNow] = []
        self._told_to_stop: set[SupervisedActor] = set()
        self._stop_error: BaseException | None = None
        self.opened: Answer[None] = Answer()
        """Done once the store has opened or failed to open."""
        self._reopening: list[Reopen] = []
        self._stuck_since: float | None = None
        """The `busy_since` of a writer that was given up as stuck. The writer has come back when
        its `busy_since` differs."""
        self._clock = StuckClock()
        self.thread = OwnThread("foldlog-supervisor", self._run, self._end)

    def post(self, notice: Notice | CloseNow | Reopen) -> None:
        """Notify the supervisor. Any thread; never blocks. If the supervisor has ended, the notice
        is answered here."""
        self._notices.put(notice)
        if self.core.ended.is_set():
            self._answer_late()

    def _answer_late(self) -> None:
        """Answer notices posted while the supervisor's thread was ending. Any thread."""
        with contextlib.suppress(queue.Empty):
            while True:
                notice = self._notices.get_nowait()
                if isinstance(notice, CloseNow):
                    notice.future.finish(None)  # closing twice is fine
                elif isinstance(notice, Reopen):
                    failed = self.core.state is State.FAILED
                    notice.future.finish(None, self._failed() if failed else self._closed())

    def open(self) -> None:
        """Start, and wait until the store has opened. Raises what it failed with. The caller's
        thread."""
        try:
            self.thread.begin()
        except BaseException:
            if self.thread.withdraw():
                self.core.state = State.CLOSED
                self.core.ended.set()
            raise
        self.opened.result()

    def owns(self, thread: threading.Thread) -> bool:
        """True if `thread` is one of the store's own, which must not wait for the store."""
        return thread is self.thread or any(actor.thread is thread for actor in self._actors)

    def after_fork(self) -> None:
        """In a forked child no thread of the store exists. Reads continue from the snapshot;
        everything else is refused."""

        def forked() -> Exception:
            return ForkedStore(f"{self.core.config.path} was opened before this process was forked")

        self.core.state = State.FORKED
        for inbox in (self.writer.inbox, self.reader_inbox, self.maintenance.inbox):
            inbox.after_fork(forked)
        for actor in self._actors:
            actor.actor_stopped = threading.Event()

    def _run(self) -> None:
        try:
            step: Callable[[], None] = partial(self._resume, self.writer)
            while self.core.state is not State.CLOSED:
                try:
                    step()
                except MemoryError:
                    self._is_behind = True
                    pause()
                step = self._wait
        except BaseException as error:
            self._stop_error = self._stop_error or error
            insist(self._die)

    def _end(self) -> None:
        self._answer_closed()
        self.core.ended.set()
        self._answer_late()

    def _die(self) -> None:
        """After an error of its own: the store only reads from now on."""
        error = self._stop_error
        path = self.core.config.path
        log.critical(
            "the supervisor of %s died; the store only reads from now on", path, exc_info=error
        )
        self._give_up(f"the supervisor died: {error!r}")
        self._stop_all()
        self._answer_opened(error)

    def _wait(self) -> None:
        if self._is_behind:
            self._catch_up()
            self._is_behind = False
        now = time.monotonic()
        for actor, due in tuple(self._due.items()):
            if due <= now or self.core.state is State.CLOSING:
                del self._due[actor]
                self._resume(actor)
        look_s = min(HEALTH_CHECK_S, self.core.config.stuck_after_s / LOOKS)
        timeout_s = min([look_s, *(max(due - now, 0.0) for due in self._due.values())])
        if self._receive(timeout_s):
            self._heed()
            return
        self.core.feeds.look_after()
        look_after_callbacks()
        if self.core.state is State.CLOSING:
            self._finish_close_if_ended()
        self._check_health(time.monotonic())

    def _heed(self) -> None:
        """Do what the notice in hand asks for. Can be repeated, if a MemoryError ended it."""
        notice = self._notice
        if isinstance(notice, Started):
            self._on_started(notice.actor)
        elif isinstance(notice, Ended):
            if notice.thread is notice.actor.thread:  # else it has told its end twice
                self._on_ended(notice.actor, notice.error)
        elif isinstance(notice, CloseNow):
            if notice not in self._closing:
                self._closing.append(notice)
            self._begin_close()
        elif isinstance(notice, Reopen):
            if notice not in self._reopening:
                self._reopening.append(notice)
            self._begin_reopen()
        self._notice = None

    def _catch_up(self) -> None:
        """Take up what a step that a MemoryError ended may have left undone."""
        self._running -= {actor for actor in self._running if actor.withdraw()}
        self._heed()
        core = self.core
        if core.state is State.STARTING:
            self._stop_error = MemoryError("while the store was opened")
            if self.writer in self._running:
                self._begin_close()
            else:
                self._end_unopened(self._stop_error)
        elif core.state is State.CLOSING:
            self._tell_to_stop()
        elif core.state is State.FAILED:
            self._abandon(core.reason)
        elif core.state is not State.CLOSED:  # else the notice in hand was the last
            self._resume_the_dead()
            if core.state is State.RUNNING:
                self._answer_opened(None)
        if self._closing and core.state is not State.CLOSING:
            self._begin_close()

    def _receive(self, timeout_s: float) -> bool:
        """Take the next notice in hand. False if none comes within `timeout_s`."""
        began = time.monotonic()
        try:
            self._notice = self._notices.get(timeout=timeout_s)
            return True
        except queue.Empty:
            return False
        finally:
            self._clock.note_wait(timeout_s, time.monotonic() - began)

    # Starting and restarting.

    def _resume(self, actor: SupervisedActor) -> None:
        self._running.add(actor)
        try:
            actor.resume()
        except NoThread as error:
            self._on_ended(actor, error)

    def _on_started(self, actor: SupervisedActor) -> None:
        if actor is not self.writer or self.core.state not in (State.STARTING, State.RESTARTING):
            return
        if self.core.state is State.STARTING:
            for other in self._others:
                if other not in self._running:
                    self._resume(other)
                if self.core.state is not State.STARTING:
                    return  # no more threads to be had
        self.core.state, self.core.reason = State.RUNNING, ""
        self._answer_opened(None)
        log.info("%s: open at batch %d", self.core.config.path, self.core.snapshot.seq)

    def _answer_opened(self, error: BaseException | None) -> None:
        for future in [self.opened, *(reopen.future for reopen in self._reopening)]:
            future.finish(None, error)
        self._reopening.clear()

    def _on_ended(self, actor: SupervisedActor, error: BaseException | None) -> None:
        if actor not in self._running:
            return  # heeded before
        actor.await_end()
        self._running.discard(actor)
        core = self.core
        if error is None:
            if actor is self.writer and (stop_error := self.writer.stop_error) is not None:
                self._stop_error = self._stop_error or stop_error
                log.warning("%s: closed without a seal: %s", core.config.path, stop_error)
            self._begin_close()
            return
        if actor is self.writer and self._stuck_since is not None:
            self._stuck_since = None
            if core.state is State.FAILED:  # it came back, only to die
                self._end_failed()
                self._restart(actor, error)
                self._resume_the_dead()
                return
        if core.state is State.STARTING:
            if actor is self.writer:
                self._end_unopened(error)
            else:
                self._stop_error = error
                self._begin_close()
            return
        if core.state is State.FAILED and actor not in self.readers:
            self._abandon_the_dead()
            return
        self._restart(actor, error)

    def _restart(self, actor: SupervisedActor, error: BaseException) -> None:
        core, now = self.core, time.monotonic()
        config = core.config
        restarts_s = self._restarts_s.setdefault(actor, [])
        interrupted = isinstance(error, DiedInTurn)  # a caller's thread: not the actor's fault
        delay_s = next_restart_delay_s(
            error,
            restarts_s,
            now,
            max_restarts=config.max_restarts,
            window_s=config.restart_window_s,
            delay_s=config.restart_delay_s,
            patient=core.state is not State.CLOSING,
        )
        reason = f"{type(error).__name__}: {error}"
        if delay_s is None:
            if core.state is State.CLOSING:
                self._stop_error = error
                self._finish_close_if_ended()
            elif core.state is State.FAILED:
                log.error("%s: %s died: %s", config.path, actor.name, reason)
                self._abandon_the_dead()
            else:
                self._give_up(f"{actor.name} died: {reason}")
            return
        if actor is self.writer and core.state is State.RUNNING:
            core.state, core.reason = State.RESTARTING, reason
        # Stores that failed together must not restart together.
        delay_s *= random.uniform(0.5, 1.0)
        if not interrupted:
            restarts_s.append(now)
        core.statistics.note_restart(Restart(actor.name, reason, time.time(), delay_s), error)
        log.log(
            logging.INFO if interrupted else logging.WARNING,
            "%s: %s died (%s); restarting in %.2f s",
            config.path,
            actor.name,
            reason,
            delay_s,
            exc_info=error,
        )
        self._due[actor] = now + delay_s

    def _end_unopened(self, error: BaseException) -> None:
        """The first start failed: tell the opener, and leave nothing running."""
        self.core.state = State.CLOSED
        self.writer.retire()
        self.writer.let_go()
        self.writer.inbox.refuse(self._closed, drain=True)
        self.reader_inbox.refuse(self._closed, drain=True)
        self._answer_opened(error)

    # Giving up and retrying.

    def _give_up(self, reason: str) -> None:
        core = self.core

        def publish() -> None:
            core.reason, core.state = reason, State.FAILED

        # Reads continue.
        self._due = {actor: due for actor, due in self._due.items() if actor in self.readers}
        self.writer.inbox.refuse(self._failed, drain=True, publish=publish)
        log.error("%s: failed: %s", core.config.path, reason)
        self._abandon(reason)

    def _abandon(self, reason: str) -> None:
        """Answer all who wait for what does not happen in a FAILED store."""
        unknown = f"{reason}; whether this was written is unknown until the store is reopened"
        self.writer.abandon_requests(
            StoreFailed(unknown),
            None if self.writer in self._running else self._failed(),
        )
        self._abandon_the_dead()
        self._answer_opened(self._failed())

    def _abandon_the_dead(self) -> None:
        """Answer requests waiting for actors that will not be restarted before `reopen`."""
        dead = [
            actor for actor in self._others if actor not in self._running and actor not in self._due
        ]
        for actor in dead:
            actor.abandon(self._failed())
        if self.maintenance in dead:
            self.maintenance.inbox.refuse(self._failed, drain=True)
        if all(reader in dead for reader in self.readers):
            self.reader_inbox.refuse(self._failed, drain=True)

    def _stop_all(self) -> None:
        """The supervisor itself failed: let the others end in order, so that the log is sealed and
        its lock released."""
        for actor in self._running:
            actor.inbox.offer(Mail(STOP))
        # The readers share a mailbox, where each finds its stop message: it ends with the last.
        for group in ([self.writer], [self.maintenance], [self.syncer], self.readers):
            stopped = [actor for actor in group if self._has_stopped(actor)]
            for actor in stopped:
                actor.retire()
            if len(stopped) == len(group):
                group[0].inbox.end(self._failed)
            for actor in stopped:
                actor.abandon(self._failed())
            if self.writer in stopped:  # else it may still write: the lock stays
                self.writer.let_go()

    def _has_stopped(self, actor: SupervisedActor) -> bool:
        """Wait for a thread that was told to stop. False if it does not end."""
        thread = actor.thread
        if actor not in self._running or thread is None or thread.withdraw():
            return True
        thread.join(self.core.config.stuck_after_s)
        return not thread.is_alive()

    def _failed(self) -> Exception:
        return StoreFailed(self.core.reason, applied=False)

    def _closed(self) -> Exception:
        return StoreClosed(f"{self.core.config.path} is closed")

    def _begin_reopen(self) -> None:
        """Begin to reopen, unless that has begun already or the writer is restarting."""
        core = self.core
        if core.state is State.FAILED:
            self._end_failed()
            self._resume_the_dead()
            if self.writer in self._running and self.writer.busy_since is None:
                self._on_started(self.writer)  # another actor had failed
        elif core.state is State.RUNNING:
            self._answer_opened(None)
        elif core.state is not State.RESTARTING:
            self._answer_opened(self._closed())

    def _end_failed(self) -> None:
        """Begin to restart: accept messages again, and reset the restart counts."""
        self._restarts_s.clear()
        self._due.clear()
        for inbox in (self.reader_inbox, self.maintenance.inbox, self.writer.inbox):
            inbox.accept()
        self.core.state = State.RESTARTING

    def _check_health(self, now_s: float) -> None:
        """Detect a writer that is stuck, and one that was stuck and has come back."""
        busy_since = self.writer.busy_since
        stuck_s = self._clock.look(busy_since, now_s)
        came_back = self._stuck_since is not None and busy_since != self._stuck_since
        if came_back:
            self._stuck_since = None
            if self.core.state is State.FAILED:
                self._end_failed()
                self._resume_the_dead()
            log.warning("%s: the writer came back", self.core.config.path)
        idle = self.writer in self._running and busy_since is None
        if self.core.state is State.RESTARTING and (came_back or idle):
            self._on_started(self.writer)  # it never ended, so it sends no Started notice
        if self.core.state is State.RUNNING and stuck_s > self.core.config.stuck_after_s:
            # Its thread may still write: keep the lock, and start no second writer.
            self._give_up(f"the writer has been stuck for {stuck_s:.0f} s")
            self._stuck_since = busy_since

    def _resume_the_dead(self) -> None:
        """Resume all whom nobody restarts, unless the store has failed again."""
        for actor in self._actors:
            is_dead = actor not in self._running and actor not in self._due
            if is_dead and self.core.state is not State.FAILED:
                self._resume(actor)

    # Closing.

    def _begin_close(self) -> None:
        if self.core.state is State.CLOSED:
            self._answer_closed()
        elif self.core.state is State.CLOSING:
            self._finish_close_if_ended()
        else:
            self.core.state = State.CLOSING
            self._tell_to_stop()

    def _tell_to_stop(self) -> None:
        """Tell whoever is to stop next. Can be repeated: a second stop is answered, too."""
        self.writer.inbox.refuse(self._closed, drain=False)  # waiting mail is still served
        if self.writer in self._running or self.writer in self._due:
            self.writer.inbox.offer(Mail(STOP))
        self._told_to_stop.clear()
        self._finish_close_if_ended()

    def _finish_close_if_ended(self) -> None:
        """End the writer first, since the others serve it; then the others; then the lock."""
        if self.writer in self._running or self.writer in self._due:
            return
        core = self.core
        self.writer.inbox.refuse(self._closed, drain=True)
        self.writer.abandon_requests(self._closed())
        self.maintenance.inbox.refuse(self._closed, drain=False)
        self.reader_inbox.refuse(self._closed, drain=False)
        for actor in self._others:
            if actor in self._running and actor not in self._told_to_stop:
                self._told_to_stop.add(actor)
                actor.inbox.offer(Mail(STOP))
        if any(actor in self._running or actor in self._due for actor in self._others):
            return
        for actor in self._actors:
            actor.retire()
            actor.inbox.end(self._closed)
            actor.abandon(self._closed())
        try:
            insist(self.syncer.close_watch)
            insist(self.writer.let_go)
        except Exception as error:  # nobody could try again
            log.warning("%s: not closed in order", core.config.path, exc_info=True)
            self._stop_error = self._stop_error or error
        core.feeds.end(f"{core.config.path} was closed")
        core.snapshot, core.engine = ClosedFold(f"{core.config.path} is closed"), None
        core.state = State.CLOSED
        log.info("%s: closed", core.config.path)
        self._answer_closed()
        self._answer_opened(self._stop_error or self._closed())

    def _answer_closed(self) -> None:
        for request in self._closing:
            request.future.finish(self._stop_error)
        self._closing.clear()
