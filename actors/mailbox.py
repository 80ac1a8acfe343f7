"""The mailbox of an actor: bounded, able to refuse, and without a lock.

Mail stands in a deque until the actor takes it, so that who looks sees all that waits, in order. To post is two steps: append,
and leave a token for the actor to wake by. A sender that is interrupted in between wakes it on the way out; and an actor looks
every `RECHECK_S` in any case.

Closing against posting is settled in Dekker's way: a mailbox that is closed first refuses, then answers what is in it; a sender
first appends, then looks whether it is refused by now, and if so answers its own mail. An answer is claimed in one step, so
each mail is answered once.

A sender that finds no room stands in a line, and the first in line is the next to get in, so a large request is not starved by
small ones. The bounds are looked at before appending, so as many senders as race may each add one request beyond them.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from pykka._envelope import Envelope
from pykka.messages import _ActorStop

from foldlog.protocol.errors import Backpressure, FoldlogError
from foldlog.storage.handover import RECHECK_S, Bell, Latch, is_below, is_over

log = logging.getLogger("foldlog")

STOP = _ActorStop()
"""What ends an actor: this one, which its owner holds, and no other of the kind."""
Refusal = Callable[[], Exception]
_getframe = sys._getframe


class Mail:
    """A message, who waits for a reply, and what it weighs."""

    __slots__ = ("message", "reply_to", "total", "weight")

    def __init__(self, message: Any, reply_to: Any = None) -> None:
        self.message, self.reply_to = message, reply_to
        self.weight: int = getattr(message, "weight", 0)
        self.total = 0
        """The weights of all mail up to this one, counted from where the mailbox was last empty."""


class Inbox:
    """See the module. Any number of actors may take from it."""

    def __init__(self, max_messages: int = 1_000_000, max_bytes: int = 1 << 40) -> None:
        self.mails: deque[Mail] = deque()
        """What waits, oldest first. Only actors take from it."""
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._line: deque[object] = deque()
        """The frames of `offer` that wait for room, first come first served."""
        self._room = Bell()
        self._refusal: Refusal | None = None
        self._drained = False
        """What waits is not served: refused mail answers itself."""
        self._ended = False

    def __len__(self) -> int:
        """Messages that wait."""
        return len(self.mails)

    # Sending.

    def put(self, envelope: Envelope[Any] | Mail) -> None:
        """What pykka's references call. A refused or surplus `ask` is answered with the error; a `tell` raises it."""
        mail = Mail(envelope.message, envelope.reply_to)
        try:
            if isinstance(mail.message, _ActorStop) and mail.message is not STOP:
                raise FoldlogError("an actor of a store ends with the store: call its close()")
            self.offer(mail)
        except Exception as error:
            if mail.reply_to is None:
                raise
            reply(mail, error=error)

    def offer(self, mail: Mail, timeout_s: float = 0.0) -> None:
        """Add a message, waiting for room up to `timeout_s`. Raises the refusal, or Backpressure.

        Stopping gets through both, and what the store's own actors tell each other gets through a full mailbox.
        """
        message = mail.message
        if message is STOP:
            if self._ended:
                reply(mail)  # nobody is left to be stopped
            else:
                self._post(mail)
            return
        if self._refusal is not None:
            raise self._refusal()
        if getattr(message, "urgent", False) or (not self._line and not self._full(mail.weight)):
            self._post(mail)
        else:
            self._wait_and_post(mail, timeout_s)
        refusal = self._refusal
        if refusal is not None and self._drained:
            answer_error(mail, refusal())  # it may have come too late to be drained

    def _post(self, mail: Mail) -> None:
        mails = self.mails
        try:
            mail.total = mails[-1].total + mail.weight
        except IndexError:
            mail.total = mail.weight
        try:
            mails.append(mail)
        finally:
            self._tokens.put(None)

    def _wait_and_post(self, mail: Mail, timeout_s: float) -> None:
        line, deadline = self._line, time.monotonic() + timeout_s
        try:
            line.append(_getframe())
            while True:
                first = line[0]
                if is_over(first):
                    self._leave(first)
                    continue
                if (first is _getframe() or is_below(first)) and not self._full(mail.weight):
                    self._post(mail)
                    return
                rest = deadline - time.monotonic()
                if rest <= 0:
                    raise Backpressure(
                        f"{len(self.mails)} requests ({self.waiting_bytes} bytes) wait for the writer already"
                    )
                seen = len(self.mails)
                self._room.wait_for(
                    lambda: self._refusal or len(self.mails) < seen or line[0] is not first,  # noqa: B023
                    min(rest, RECHECK_S),
                )
                if self._refusal is not None:
                    raise self._refusal()
        finally:
            self._leave(_getframe())

    def _leave(self, frame: object) -> None:
        with contextlib.suppress(ValueError):
            self._line.remove(frame)
        if self._line:
            self._room.ring()

    @property
    def waiting_bytes(self) -> int:
        """The weight of what waits."""
        try:
            first, last = self.mails[0], self.mails[-1]
        except IndexError:
            return 0
        return max(last.total - first.total + first.weight, 0)

    def _full(self, weight: int) -> bool:
        waiting = len(self.mails)
        if not waiting:
            return False  # one request always fits, whatever its size
        return waiting >= self._max_messages or self.waiting_bytes + weight > self._max_bytes

    # Taking.

    def wait(self, timeout_s: float) -> int:
        """Sleep until there is mail, or a wake-up, or `timeout_s`. Returns how many tokens that took."""
        if self.mails:
            return 0
        return self.wait_for_wake(timeout_s)

    def wait_for_wake(self, timeout_s: float) -> int:
        """`wait`, also if there is mail."""
        try:
            self._tokens.get(timeout=timeout_s)
        except Empty:
            return 0
        return 1

    def take(
        self,
        taken: list[Mail],
        group: tuple[type, ...] = (),
        limit: int = 1,
        timeout_s: float | None = None,
    ) -> None:
        """Wait for a message, up to `timeout_s`, and move it to `taken`; if it is of `group`, also those after it that are.

        `taken` belongs to the actor: what it holds survives the actor's death.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        spent = 0
        while not self.mails:
            rest = RECHECK_S if deadline is None else min(deadline - time.monotonic(), RECHECK_S)
            if rest <= 0:
                return
            spent = self.wait(rest)
        self.move(taken, group, limit, spent)

    def move(
        self, taken: list[Mail], group: tuple[type, ...] = (), limit: int = 1, spent: int = 0
    ) -> None:
        """`take`, of what is there. `spent`: the tokens that `wait` took."""
        mails = self.mails
        with contextlib.suppress(IndexError):  # there is no more
            while len(taken) < limit:
                mail = mails[0]
                if taken and not (
                    isinstance(mail.message, group) and isinstance(taken[0].message, group)
                ):
                    break
                taken.append(mails.popleft())
                spent -= 1
        while spent < 0 and not self._tokens.empty():
            spent += 1
            self._drop_token()
        if self._line:
            self._room.ring()

    def _drop_token(self) -> None:
        with contextlib.suppress(Empty):
            self._tokens.get_nowait()

    def wake(self) -> None:
        """Let an actor that waits look again."""
        self._tokens.put(None)

    def return_taken(self, taken: list[Mail]) -> None:
        """Put messages back in front, past any bound, in their order."""
        for mail in reversed(taken):
            with contextlib.suppress(IndexError):
                first = self.mails[0]
                mail.total = first.total - first.weight
            self.mails.appendleft(mail)
            self._tokens.put(None)
        taken.clear()

    # Refusing.

    def refuse(
        self, refusal: Refusal, *, drain: bool, publish: Callable[[], None] | None = None
    ) -> None:
        """From now on answer every message with an error. With `drain`, also those that wait; else they are still served.

        `publish` tells others of it in the same moment: whoever sees what it does is refused, and whoever is refused sees it.
        """
        self._drained = drain
        if publish is None:
            self._refusal = refusal
        else:
            published = Latch()

            def refuse_when_published() -> Exception:
                published.wait(RECHECK_S)
                return refusal()

            self._refusal = refuse_when_published
            publish()
            published.set()
            self._refusal = refusal
        if self._line:
            self._room.ring()
        if not drain:
            return
        with contextlib.suppress(IndexError):
            while True:
                mail = self.mails.popleft()
                self._drop_token()
                answer_error(mail, None if mail.message is STOP else refusal())

    def end(self, refusal: Refusal) -> None:
        """Nobody takes from it any more: answer all that waits, and all that comes."""
        self._ended = True
        self.refuse(refusal, drain=True)

    def accept(self) -> None:
        """Take messages again."""
        self._drained = False
        self._refusal = None

    @property
    def refusing(self) -> bool:
        """Whether messages are answered with an error now."""
        return self._refusal is not None

    def after_fork(self, refusal: Refusal) -> None:
        """In a forked child: what waits is the parent's, and nobody takes here."""
        self.__init__()  # type: ignore[misc]
        self._drained = True
        self._refusal = refusal

    # The rest of what pykka expects of a mailbox.

    def get(self) -> Mail:
        taken: list[Mail] = []
        self.take(taken)
        return taken[0]

    def empty(self) -> bool:
        return not self.mails


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
    return [mail for mail in mails if mail.message is STOP]
