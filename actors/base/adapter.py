"""pykka, adapted for a store that must keep its promises.

The only module that knows how pykka runs an actor (4.5, pinned below 5).

What pykka does, and how this module changes it:

- An actor that fails in a `tell`, or with a BaseException, is gone, along with its mailbox and its
  reference; a BaseException stops every actor of the process. Here an actor's loop always ends with
  a notice to the supervisor, which starts a new thread on the *same* actor. The reference, the
  mailbox and the waiting messages stay.
- A message posted while the actor was ending is never answered. Here the mailbox (`mailbox.py`)
  decides whether a message is taken or refused: it is answered either way.
- Mailboxes are unbounded. Here each has a bound in messages and bytes, and a stop always gets
  through.
- `ActorRegistry.stop_all`, called by any foreign actor that dies of SystemExit, stops everything
  registered. A store's actors are not registered; only their owner's stop message ends them.
- `ask` waits on a future whose setter waits for a lock that the asker holds. Here it waits on a
  `Reply` (`answers.py`).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import pykka

from foldlog.actors.base.answers import Reply
from foldlog.actors.base.mailbox import STOP as STOP
from foldlog.actors.base.mailbox import Inbox as Inbox
from foldlog.actors.base.mailbox import Mail as Mail
from foldlog.actors.base.mailbox import Place as Place
from foldlog.actors.base.mailbox import answer_error as answer_error
from foldlog.actors.base.mailbox import reply as reply
from foldlog.actors.base.mailbox import stop_only as stop_only
from foldlog.actors.base.threads import OwnThread
from foldlog.protocol.errors import is_own_fault
from foldlog.storage.handover import RECHECK_S, discard, is_below, is_over

_getframe = sys._getframe


class Started(NamedTuple):
    """An actor is ready."""

    actor: SupervisedActor


class Ended(NamedTuple):
    """An actor's thread is about to end: stopped if `error` is None, else crashed. May come twice
    from one thread."""

    actor: SupervisedActor
    error: BaseException | None
    thread: OwnThread | None


Notice = Started | Ended
Post = Callable[[Notice], None]


class NoThread(RuntimeError):
    """No thread could be started for an actor."""


class SupervisedActor(pykka.ThreadingActor):
    """An actor that always reports its end, and that can continue in a new thread.

    A subclass defines `on_start` (also called after a crash: `self.taken` then holds what it was
    doing), `handle` and `on_stop`. An exception from any of them ends the thread, and the
    supervisor decides what follows.
    """

    use_daemon_thread = True  # else a forgotten store would keep the interpreter alive
    tick_s = inf
    """Call `on_tick` after this long without a message."""

    def __init__(self, name: str, post: Post, inbox: Inbox | None = None) -> None:
        super().__init__()
        self.name = name
        self._post = post
        if inbox is not None:
            self.actor_inbox = inbox  # type: ignore[assignment]
            self._actor_ref.actor_inbox = inbox  # type: ignore[assignment]
        self.inbox: Inbox = self.actor_inbox  # type: ignore[assignment]
        # Taken from the mailbox and not done. Owned by the thread that has the turn.
        self.taken: list[Mail] = []
        self.thread: OwnThread | None = None
        """The one that runs it, until the supervisor has seen it end."""
        self._death: BaseException | None = None
        """What ended it, if anything but a stop did."""
        self.has_stopped = False
        """True once it was stopped in order: whatever fails after that, it is not restarted."""
        self.busy_since: float | None = None
        """When it began its current work (time.monotonic()); None while it waits."""

    @staticmethod
    def _create_actor_inbox() -> Any:
        return Inbox()

    @staticmethod
    def _create_future() -> pykka.Future[Any]:
        return Reply()

    def resume(self) -> None:
        """Start, or continue after a crash, in a new thread. NoThread if none can be started; the
        call can be repeated."""
        self.thread = OwnThread(f"foldlog-{self.name}", self._actor_loop, self._tell_end)
        try:
            self.thread.begin()
        except (RuntimeError, MemoryError) as error:
            if self.withdraw():
                raise NoThread(str(error)) from error

    def withdraw(self) -> bool:
        """Keep its thread from running. False if that has begun.

        For when `resume` ended with a MemoryError, so that nobody knows.
        """
        return self.thread is None or self.thread.withdraw()

    def await_end(self) -> None:
        """Wait for a thread that has told its end: none of its code may run beside its
        successor."""
        if self.thread is not None and not self.thread.withdraw():
            self.thread.join()
        self.thread = self._death = None

    def retire(self) -> None:
        """Mark as stopped for pykka."""
        self.actor_stopped.set()

    def _actor_loop(self) -> None:
        self._death = None
        try:
            self.busy_since = time.monotonic()
            self.on_start()
            self._post(Started(self))
            while not self.actor_stopped.is_set():
                if not self.taken:  # else a thread that died while stopping left work behind
                    self._await_mail()
                self.busy_since = time.monotonic()
                self._serve()
        # No handler calls anything: it may have no memory for that.
        except MemoryError as error:
            error.__traceback__ = None  # let go of what the thread had in hand
            self._death = error
        except BaseException as error:
            self._death = error

    def _tell_end(self) -> None:
        error = None if self.has_stopped else self._death
        self._post(Ended(self, error, self.thread))

    def _await_mail(self) -> None:
        self.busy_since = None
        self.inbox.take(self.taken, self.tick_s)

    def _serve(self) -> None:
        if not self.taken:
            self.on_tick()
        elif self.taken[0].message is STOP:
            mail = self.taken[0]
            self.on_stop()
            self.has_stopped = True
            self.retire()
            self.taken.clear()
            reply(mail)
        else:
            self.handle(self.taken)
            self.taken.clear()

    def abandon(self, error: Exception) -> None:
        """Answer what a thread that ended for good left in hand. Called by the supervisor."""
        for mail in self.taken:
            answer_error(mail, None if mail.message is STOP else error)
        self.taken.clear()

    def handle(self, mails: list[Mail]) -> None:
        """Serve what was taken: one message, or several of the `group` of a `SharedActor`."""
        raise NotImplementedError

    def on_tick(self) -> None:
        """Called when no message came for `tick_s`."""


class DiedInTurn(Exception):
    """An actor died in a turn that a caller's thread had taken, of an exception that struck that
    thread (`__cause__`)."""


class SharedActor(SupervisedActor):
    """An actor whose turns its callers' threads may take while it is idle and its mailbox is empty.

    Turns still run one at a time, in mailbox order: the first in the queue `turn` has the turn. The
    actor is in the queue while it works, and from its death until it has restarted. A caller that
    finds the queue empty enters it, checks that the mailbox is still empty, works, and leaves. Only
    the holder of the turn takes mail, so an empty mailbox means that nothing came before. (Flat
    combining: Hendler, Incze, Shavit, Tzafrir, SPAA 2010.)

    An exception that ends a turn also ends the actor: its thread wakes up, finds what was in hand,
    and ends with a notice as usual. The same happens if the caller's frame is gone without notice,
    after an interrupt within an interrupt.
    """

    group: tuple[type, ...] = ()
    """Message types that `handle` takes in batches."""
    group_limit = 1

    def __init__(self, name: str, post: Post, inbox: Inbox | None = None) -> None:
        super().__init__(name, post, inbox)
        self.turn: deque[object] = deque()
        """The holder of the turn, then those waiting: frames of `work_in_turn`, and the actor."""
        self._died_of: BaseException | None = None
        # The last ones: the actor's thread may have died of another before a caller asks.
        self._raised_by_hook: deque[BaseException] = deque(maxlen=4)

    def hooked(self, hook: Callable[[str], None]) -> Callable[[str], None]:
        """`hook`, wrapped so that what it raises counts as the actor's own fault, whichever thread
        has the turn."""

        def call(name: str) -> None:
            try:
                hook(name)
            except BaseException as error:
                if not isinstance(error, KeyboardInterrupt) or error.args:  # Ctrl-C has none
                    self._raised_by_hook.append(error)
                raise

        return call

    def is_own_fault(self, error: BaseException) -> bool:
        """True if the actor failed; False if the exception struck the thread that had the turn from
        outside."""
        return any(error is raised for raised in self._raised_by_hook) or is_own_fault(error)

    def resume(self) -> None:
        if self not in self.turn:
            self.turn.append(self)
        super().resume()

    def work_in_turn(self, mail: Mail) -> bool:
        """Serve `mail` on the caller's thread if the turn is free. False if it is not: offer the
        mail to the mailbox.

        Raises the exception that ended the turn. The actor then has `mail` in hand, and settles it
        after its restart.
        """
        turn, inbox = self.turn, self.inbox
        if turn or inbox.mails:
            return False
        working = False
        try:
            turn.append(_getframe())
            if not may_work(turn[0] is _getframe(), inbox):
                return False
            working = True
            taken = self.taken
            taken.append(mail)
            self.busy_since = time.monotonic()
            self.handle(taken)
            taken.clear()
            if inbox.mails:
                self.work_for_others()
            self.busy_since = None
            working = False
            return True
        except BaseException as error:
            if working:
                self._died_of = error
            raise
        finally:
            if not working:
                discard(turn, _getframe())
            if working or inbox.mails:
                inbox.wake()

    def is_in_turn(self) -> bool:
        """True if the calling thread has the turn further down its stack: it would wait for
        itself."""
        try:
            return is_below(self.turn[0])
        except IndexError:
            return False

    def work_for_others(self) -> None:
        """In a turn taken by a caller: serve some of the mail that came meanwhile."""

    def _await_mail(self) -> None:
        turn, inbox = self.turn, self.inbox
        deadline = time.monotonic() + self.tick_s
        self.busy_since = None
        turn.remove(self)
        while True:
            rest = min(RECHECK_S, max(deadline - time.monotonic(), 0.0))
            spent = 0 if inbox.mails else inbox.wait(rest)
            self._look_after_turn()
            late = time.monotonic() >= deadline
            if not inbox.mails and not late:
                continue
            turn.append(self)
            while turn[0] is not self:
                inbox.wait(RECHECK_S)
                self._look_after_turn()
            self.busy_since = time.monotonic()
            inbox.move(self.taken, self.group, self.group_limit, spent)
            if self.taken or late:
                return
            self.busy_since = None
            turn.remove(self)

    def _look_after_turn(self) -> None:
        """Take over from a caller that was interrupted in its turn; raise if that left mail in
        hand."""
        turn = self.turn
        try:
            first = turn[0]
        except IndexError:
            return
        if first is self or (self._died_of is None and not is_over(first)):
            return
        if first not in turn:
            return  # it left in good order meanwhile, and the turn may be another's
        # Only this thread removes it now. Before the turn is free: this says nothing of the next.
        error, self._died_of = self._died_of, None
        if not self.taken:
            self.busy_since = None
            discard(turn, first)
            return
        # In its place, not at the end of the line: the turn is free at no moment in between.
        discard(turn, self)
        turn[0] = self
        if error is not None and self.is_own_fault(error):
            raise error
        raise DiedInTurn(f"interrupted in a caller's thread: {error!r}") from error


def may_work(is_first: bool, inbox: Inbox) -> bool:
    """True if a caller that has entered the queue may take the turn: no caller and no mail came
    before it, and the actor has not ended."""
    return is_first and not inbox.mails and inbox.refusal is None
