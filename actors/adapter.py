"""pykka, made fit for a store that must keep its promises. The only module that knows pykka's insides (4.5, pinned below 5).

What pykka does, and what is done about it here:

- An actor that fails in a `tell`, or with a BaseException, is gone, with its mailbox and its reference; a BaseException stops
  every actor of the process. Here an actor's loop always ends with a notice to the supervisor, which starts a new thread
  on the *same* actor: reference, mailbox and waiting messages stay.
- A message that was put while the actor was ending is never answered. Here the mailbox refuses under the lock that it
  takes messages under: a message is either taken, or answered with the refusal at once.
- Mailboxes have no bound. Here one has, in messages and bytes, and stopping always gets through.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pykka
from pykka import ActorRegistry
from pykka._envelope import Envelope
from pykka.messages import _ActorStop

from foldlog.protocol.errors import Backpressure

log = logging.getLogger("foldlog")

STOP = _ActorStop()
Refusal = Callable[[], Exception]
Mail = Envelope[Any]


class Inbox:
    """A mailbox with a bound that can be told to refuse. Any number of actors may take from it."""

    def __init__(self, max_messages: int = 1_000_000, max_bytes: int = 1 << 40) -> None:
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._emptied = threading.Condition(self._lock)
        self._waiting: deque[Mail] = deque()
        self._bytes = 0
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._refusal: Refusal | None = None
        self._ended = False

    def __len__(self) -> int:
        """Messages that wait."""
        return len(self._waiting)

    def put(self, mail: Mail) -> None:
        """What pykka's references call. A refused or surplus `ask` is answered with the error; a `tell` raises it."""
        try:
            self.offer(mail)
        except Exception as error:
            if mail.reply_to is None:
                raise
            mail.reply_to.set_exception((type(error), error, None))

    def offer(self, mail: Mail, timeout_s: float = 0.0) -> None:
        """Add a message, waiting for room up to `timeout_s`. Raises the refusal, or Backpressure.

        Stopping gets through both, and what the store's own actors tell each other gets through a full mailbox.
        """
        weight = getattr(mail.message, "weight", 0)
        stop = isinstance(mail.message, _ActorStop)
        urgent = stop or getattr(mail.message, "urgent", False)
        deadline = None
        with self._lock:
            while True:
                if self._ended and stop:
                    break
                if self._refusal is not None and not stop:
                    raise self._refusal()
                if urgent or not self._full(weight):
                    self._waiting.append(mail)
                    self._bytes += weight
                    self._filled.notify()
                    return
                if deadline is None:
                    deadline = time.monotonic() + timeout_s
                rest = deadline - time.monotonic()
                if rest <= 0:
                    raise Backpressure(
                        f"{len(self._waiting)} requests ({self._bytes} bytes) wait for the writer already"
                    )
                self._emptied.wait(rest)
        reply(mail)  # nobody is left to be stopped

    def _full(self, weight: int) -> bool:
        if not self._waiting:
            return False  # one request always fits, whatever its size
        return len(self._waiting) >= self._max_messages or self._bytes + weight > self._max_bytes

    def take(
        self,
        taken: list[Mail],
        group: tuple[type, ...] = (),
        limit: int = 1,
        timeout_s: float | None = None,
    ) -> None:
        """Wait for a message, up to `timeout_s`, and move it to `taken`; if it is of `group`, those behind it that are, too.

        `taken` belongs to the actor: what it holds survives the actor's death.
        """
        with self._lock:
            if not self._waiting:
                self._filled.wait_for(self._waiting.__len__, timeout_s)
            while self._waiting and len(taken) < limit:
                mail = self._waiting[0]
                if taken and not (
                    isinstance(mail.message, group) and isinstance(taken[0].message, group)
                ):
                    break
                taken.append(self._waiting.popleft())
                self._bytes -= getattr(mail.message, "weight", 0)
            self._emptied.notify_all()

    def return_taken(self, taken: list[Mail]) -> None:
        """Put messages back in front, past any bound, in their order."""
        with self._lock:
            self._waiting.extendleft(reversed(taken))
            self._bytes += sum(getattr(mail.message, "weight", 0) for mail in taken)
            taken.clear()
            self._filled.notify()

    def refuse(
        self, refusal: Refusal, *, drain: bool, publish: Callable[[], None] | None = None
    ) -> None:
        """From now on answer every message with an error. With `drain`, also those that wait; else they are still served.

        `publish` tells others of it in the same moment: whoever sees what it does is refused, and whoever is refused sees it.
        """
        with self._lock:
            if publish is not None:
                publish()
            self._refusal = refusal
            drained = list(self._waiting) if drain else []
            if drain:
                self._waiting.clear()
                self._bytes = 0
            self._emptied.notify_all()
        for mail in drained:
            answer_error(mail, None if isinstance(mail.message, _ActorStop) else refusal())

    def end(self, refusal: Refusal) -> None:
        """Nobody takes from it any more: answer all that waits, and all that comes."""
        with self._lock:
            self._ended = True
        self.refuse(refusal, drain=True)

    def accept(self) -> None:
        """Take messages again."""
        with self._lock:
            self._refusal = None

    def after_fork(self, refusal: Refusal) -> None:
        """In a forked child: the locks may be held by threads that do not exist here."""
        self.__init__()  # type: ignore[misc]
        self._refusal = refusal

    # The rest of what pykka expects of a mailbox.

    def get(self) -> Mail:
        taken: list[Mail] = []
        self.take(taken)
        return taken[0]

    def empty(self) -> bool:
        return not self._waiting


def answer_error(mail: Mail, error: Exception | None) -> None:
    """End a message that will not be served; None where that is what it asked for."""
    fail = getattr(mail.message, "fail", None)
    if fail is not None:
        fail(error)
    elif mail.reply_to is not None:
        reply(mail, error=error)
    elif error is not None:
        log.error(
            "a message was told to an actor that cannot serve it: %r: %s",
            type(mail.message).__name__,
            error,
        )


def reply(mail: Mail, value: Any = None, error: Exception | None = None) -> None:
    """Answer an `ask`, once."""
    if mail.reply_to is None:
        return
    with contextlib.suppress(Exception):  # queue.Full: it was answered already
        if error is None:
            mail.reply_to.set(value)
        else:
            mail.reply_to.set_exception((type(error), error, None))


def stop_only(mails: list[Mail]) -> list[Mail]:
    """Of messages in hand, those that ask to stop."""
    return [mail for mail in mails if isinstance(mail.message, _ActorStop)]


class Started(NamedTuple):
    """An actor is ready."""

    actor: SupervisedActor


class Ended(NamedTuple):
    """An actor's thread is about to end: stopped if `error` is None, else it crashed."""

    actor: SupervisedActor
    error: BaseException | None


Notice = Started | Ended
Post = Callable[[Notice], None]


class SupervisedActor(pykka.ThreadingActor):
    """An actor whose end is always heard of, and which can go on in a new thread.

    A subclass says what to do in `on_start` (also after a crash: `self.taken` then holds what it was doing), `handle` and
    `on_stop`. An exception out of any of them ends the thread, and the supervisor decides.
    """

    use_daemon_thread = True  # or a forgotten store would keep the interpreter from ending
    group: tuple[type, ...] = ()
    """Message types that `handle` takes many of at a time."""
    group_limit = 1
    tick_s: float | None = None
    """Call `on_tick` when no message has come for so long."""

    def __init__(self, name: str, post: Post, inbox: Inbox | None = None) -> None:
        super().__init__()
        self.name = name
        self._post = post
        if inbox is not None:
            self.actor_inbox = inbox
            self._actor_ref.actor_inbox = inbox
        self.inbox: Inbox = self.actor_inbox  # type: ignore[assignment]
        # What was taken from the mailbox and is not done. Owned by the actor's thread while it lives.
        self.taken: list[Mail] = []
        self.thread: threading.Thread | None = None
        self.told_to_stop = False
        self.busy_since: float | None = None
        """Since when it works on what it has taken (time.monotonic()); None while it waits."""

    @staticmethod
    def _create_actor_inbox() -> Any:
        return Inbox()

    def launch(self) -> None:
        """Register and start. RuntimeError if there are no threads to be had; nothing is left behind then."""
        ActorRegistry.register(self.actor_ref)
        try:
            self.resume()
        except BaseException:
            self.retire()
            raise

    def resume(self) -> None:
        """Go on in a new thread, after a crash. RuntimeError if there is none to be had; it can be tried again."""
        self.thread = threading.Thread(
            target=self._actor_loop, name=f"foldlog-{self.name}", daemon=True
        )
        self._start_actor_loop()

    def _start_actor_loop(self) -> None:
        assert self.thread is not None
        self.thread.start()

    def retire(self) -> None:
        """Mark as stopped for pykka."""
        ActorRegistry.unregister(self.actor_ref)
        self.actor_stopped.set()

    def _actor_loop(self) -> None:
        error: BaseException | None = None
        try:
            self.busy_since = time.monotonic()
            self.on_start()
            self._post(Started(self))
            while not self.actor_stopped.is_set():
                self.busy_since = None
                if (
                    not self.taken
                ):  # a predecessor that died while it stopped has left that to be done
                    self.inbox.take(self.taken, self.group, self.group_limit, self.tick_s)
                self.busy_since = time.monotonic()
                self._serve()
        except BaseException as raised:
            error = raised.with_traceback(None) if isinstance(raised, MemoryError) else raised
        finally:
            self._post(Ended(self, error))

    def _serve(self) -> None:
        if not self.taken:
            self.on_tick()
        elif isinstance(self.taken[0].message, _ActorStop):
            mail = self.taken[0]
            self.on_stop()
            self.retire()
            self.taken.clear()
            reply(mail)
        else:
            self.handle(self.taken)
            self.taken.clear()

    def abandon(self, error: Exception) -> None:
        """Answer what a thread that ended for good has left in hand. For the supervisor."""
        for mail in self.taken:
            answer_error(mail, None if isinstance(mail.message, _ActorStop) else error)
        self.taken.clear()

    def handle(self, mails: list[Mail]) -> None:
        """Serve what was taken: one message, or several of `group`."""
        raise NotImplementedError

    def on_tick(self) -> None:
        """Nothing came for `tick_s`."""
