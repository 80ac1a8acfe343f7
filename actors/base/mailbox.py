"""The mailbox of an actor: bounded, able to refuse, and without a lock.

Mail waits in a deque until the actor takes it, so anyone who looks sees all waiting mail in order.
Posting takes two steps: append the mail, then leave a token that wakes the actor. A sender
interrupted between the two wakes the actor on its way out; and the actor looks every `RECHECK_S` in
any case.

Closing and posting are ordered in Dekker's way. Closing first sets the refusal, then answers the
mail inside. A sender first appends, then checks for a refusal, and if there is one answers its own
mail. An answer is claimed in one step, so each mail is answered once.

Senders that find no room queue up, and the first in the queue gets in next, so small requests
cannot starve a large one. A sender that must not sleep holds a `Place` in the queue instead of its
frame. The bounds are checked before appending, so each of several racing senders may add one
request beyond them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from math import inf
from queue import Empty, Full, SimpleQueue
from typing import Any

from pykka._envelope import Envelope
from pykka.messages import _ActorStop

from foldlog.actors.base.answers import Reply
from foldlog.protocol.errors import Backpressure, FoldlogError
from foldlog.protocol.logger import log
from foldlog.storage.handover import RECHECK_S, Bell, Latch, is_below, is_over

STOP = _ActorStop()
"""The message that ends an actor: only this object, which its owner holds, and no equal one."""
Refusal = Callable[[], Exception]
PLACE_S = 1.0
"""How long a place in line lasts without another attempt: an event loop may never run again."""
_getframe = sys._getframe
_popleft = deque.popleft


class Mail:
    """A message, who waits for a reply, and its weight."""

    __slots__ = ("message", "reply_to", "total", "weight")

    def __init__(self, message: Any, reply_to: Any = None) -> None:
        self.message, self.reply_to = message, reply_to
        self.weight: int = getattr(message, "weight", 0)
        self.total = 0
        """The weights of all mail up to this one, counted since the mailbox was last empty."""


class Place:
    """A place in the line for room, held by one that does not sleep there but tries again soon."""

    __slots__ = ("lasts_until",)

    def __init__(self) -> None:
        self.lasts_until = 0.0


class Inbox:
    """See the module. Any number of actors may take from it."""

    def __init__(self, max_messages: int = 1_000_000, max_bytes: int = 1 << 40) -> None:
        self.mails: deque[Mail] = deque()
        """Waiting mail, oldest first. Only actors take from it."""
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._line: deque[object] = deque()
        """Who waits for room, first come, first served: frames of `offer`, and places."""
        self._room = Bell()
        self.refusal: Refusal | None = None
        """Makes the error with which every message is answered now; None if they are accepted."""
        self._drained = False
        """Waiting mail is not served: refused mail answers itself."""
        self._ended = False

    def __len__(self) -> int:
        """The number of waiting messages."""
        return len(self.mails)

    # Sending.

    def put(self, envelope: Envelope[Any] | Mail) -> None:
        """Called by pykka's references. A refused or surplus `ask` is answered with the error; a
        `tell` raises it."""
        mail = Mail(envelope.message, envelope.reply_to)
        try:
            if isinstance(mail.message, _ActorStop) and mail.message is not STOP:
                raise FoldlogError("an actor of a store ends with the store: call its close()")
            self.offer(mail)
        except Exception as error:
            if mail.reply_to is None:
                raise
            reply(mail, error=error)

    def offer(self, mail: Mail, timeout_s: float = 0.0, place: Place | None = None) -> None:
        """Add a message, waiting for room up to `timeout_s`. Raises the refusal, or Backpressure.

        With `place`, does not wait: Backpressure, and the place in line is kept for the next
        attempt. `leave` it in the end.

        Stop messages get past both, and messages between the store's own actors get into a full
        mailbox.
        """
        message = mail.message
        if message is STOP:
            if self._ended:
                reply(mail)  # the actor has ended already
            else:
                self._post(mail)
            return
        if self.refusal is not None:
            raise self.refusal()
        if getattr(message, "urgent", False) or (not self._line and not self._full(mail.weight)):
            self._post(mail)
        elif place is not None:
            self._post_in_line(mail, place)
        else:
            self._wait_and_post(mail, timeout_s)
        refusal = self.refusal
        if refusal is not None and self._drained:
            answer_error(mail, refusal())  # it may have come too late to be drained

    def tell(self, message: Any) -> bool:
        """Add a message of another of the store's actors. False if it is refused: the store has
        failed, or is closing."""
        try:
            self.offer(Mail(message))
        except FoldlogError:
            return False
        return True

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
                if _is_gone(first):
                    self.leave(first)
                    continue
                if (first is _getframe() or is_below(first)) and not self._full(mail.weight):
                    self._post(mail)
                    return
                rest = deadline - time.monotonic()
                if rest <= 0:
                    raise self._no_room()
                seen = len(self.mails)
                self._room.wait_for(
                    lambda: (
                        self.refusal
                        or len(self.mails) < seen  # noqa: B023
                        or line[0] is not first  # noqa: B023
                    ),
                    min(rest, RECHECK_S),
                )
                if self.refusal is not None:
                    raise self.refusal()
        finally:
            self.leave(_getframe())

    def _post_in_line(self, mail: Mail, place: Place) -> None:
        line = self._line
        place.lasts_until = time.monotonic() + PLACE_S
        if place not in line:
            line.append(place)
        for first in tuple(line):
            if first is place and not self._full(mail.weight):
                self._post(mail)
                return
            if not _is_gone(first):
                break
            self.leave(first)
        raise self._no_room()

    def _no_room(self) -> Backpressure:
        return Backpressure(
            f"{len(self.mails)} requests ({self.waiting_bytes} bytes) wait for the writer already"
        )

    def leave(self, who: object) -> None:
        """Give up a place in line. Leaving twice is fine."""
        with contextlib.suppress(ValueError):
            self._line.remove(who)
        if self._line:
            self._room.ring()

    @property
    def waiting_bytes(self) -> int:
        """The total weight of waiting mail."""
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
        """Sleep until mail is posted, a wake-up comes, or `timeout_s` has passed. Returns the
        number of tokens consumed."""
        try:
            self._tokens.get(timeout=timeout_s)
        except Empty:
            return 0
        return 1

    def take(self, taken: list[Mail], timeout_s: float = inf) -> None:
        """Wait up to `timeout_s` for a message and move it to `taken`."""
        deadline = time.monotonic() + timeout_s
        spent = 0
        while not self.mails:
            rest = min(deadline - time.monotonic(), RECHECK_S)
            if rest <= 0:
                return
            spent = self.wait(rest)
        self.move(taken, spent=spent)

    def move(
        self, taken: list[Mail], group: tuple[type, ...] = (), limit: int = 1, spent: int = 0
    ) -> None:
        """Move the first message to `taken`. If it is of `group`, also those of `group` that
        directly follow it, until there are `limit`. `spent`: the tokens that `wait` consumed.

        `taken` belongs to the actor: what it holds survives the actor's death.
        """
        mails = self.mails
        with contextlib.suppress(IndexError):  # the mailbox is empty
            while len(taken) < limit:
                mail = mails[0]
                if taken and not (
                    isinstance(mail.message, group) and isinstance(taken[0].message, group)
                ):
                    break
                taken.extend(map(_popleft, (mails,)))  # one call into C: an interrupt loses none
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
        """Wake a waiting actor to look again."""
        self._tokens.put(None)

    def return_taken(self, taken: list[Mail]) -> None:
        """Put messages back at the front, in order, regardless of the bounds. If there is no memory
        for it, the rest stays in `taken`, and perhaps one that is back."""
        while taken:
            mail = taken[-1]
            with contextlib.suppress(IndexError):
                first = self.mails[0]
                mail.total = first.total - first.weight
            self.mails.appendleft(mail)
            taken.pop()
            self._tokens.put(None)

    # Refusing.

    def refuse(
        self, refusal: Refusal, *, drain: bool, publish: Callable[[], None] | None = None
    ) -> None:
        """From now on, answer every message with an error. With `drain`, waiting mail too;
        otherwise it is still served.

        `publish` runs atomically with this: a caller that sees its effect is refused, and a caller
        that is refused sees its effect.
        """
        self._drained = drain
        if publish is None:
            self.refusal = refusal
        else:
            published = Latch()

            def refuse_when_published() -> Exception:
                published.wait(RECHECK_S)
                return refusal()

            self.refusal = refuse_when_published
            publish()
            published.set()
            self.refusal = refusal
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
        """Nobody takes from it any more: answer all mail, waiting and future."""
        self._ended = True
        self.refuse(refusal, drain=True)

    def accept(self) -> None:
        """Accept messages again."""
        self._drained = False
        self.refusal = None

    def after_fork(self, refusal: Refusal) -> None:
        """In a forked child: waiting mail is the parent's, and no actor takes mail here."""
        self.__init__()  # type: ignore[misc]
        self._drained = True
        self.refusal = refusal


def _is_gone(who: object) -> bool:
    """True if it does not wait for room any more."""
    if isinstance(who, Place):
        return time.monotonic() > who.lasts_until
    return is_over(who)


def answer_error(mail: Mail, error: Exception | None) -> None:
    """End a message that will not be served; `error` is None where ending is what it asked for."""
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


def reply(mail: Mail, value: Any = None, error: BaseException | None = None) -> None:
    """Answer an `ask`, once."""
    if mail.reply_to is None:
        return
    try:
        if error is None:
            mail.reply_to.set(value)
        else:
            mail.reply_to.set_exception((type(error), error, None))
    except Full:
        pass  # it was answered already
    except BaseException:
        if type(mail.reply_to) is Reply:
            raise
        log.exception("a future of the program's failed")


def stop_only(mails: list[Mail]) -> list[Mail]:
    """The messages in hand that ask to stop."""
    return [mail for mail in mails if mail.message is STOP]
