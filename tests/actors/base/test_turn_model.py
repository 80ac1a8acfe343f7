"""A small model of callers, writer, stop, crash and interrupt: all interleavings are explored.

It has three callers, the writer's loop, the supervisor's stop, one crash and one interrupt.
Each step of the model is one call into C of `SharedActor` and `Inbox`: anything may happen
between two of them. `may_work` decides what may be done when, as in the code. Where two
interrupts may come, the last one strikes in a `finally`. The model has no clock: a lost wake-up
is a deadlock here. The exception is work that an interrupted `finally` left undone: the writer
finds it at its next check (`RECHECK_S`).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from types import SimpleNamespace

import pytest

from foldlog.actors.base.adapter import may_work

WRITER, STOP = "writer", "stop"
IN_TURN = ("decide", "take", "handle", "clear", "leave", "withdraw", "wake", "wake, then offer")
"""The steps of a caller between entering the line and the end of `work_in_turn`."""
Callers = tuple[tuple[str, ...], ...]
ONE_EACH: Callers = (("work b",), ("work c",))
TWO: Callers = (("send a", "work b"), ("work c",))
"""What each caller does: `send` is apply_async, `work` is apply. One after the other."""
THREE: Callers = (("send a", "work b"), ("work c",), ("work d",))


class State:
    """Everything, at one moment."""

    def __init__(self, callers: int, interrupts: int, crashes: int) -> None:
        self.mails: tuple[str, ...] = ()
        self.turn: tuple[object, ...] = (WRITER,)
        self.taken: tuple[str, ...] = ()
        self.tokens = 0
        self.refusing = self.drained = False
        self.answers: frozenset[tuple[str, str]] = frozenset()
        self.served: frozenset[str] = frozenset()
        self.faults: tuple[str, ...] = ()
        self.writer = "leave"
        self.supervisor = "refuse"
        self.caller: tuple[tuple[int, str], ...] = ((0, "look"),) * callers
        self.first: object = None
        """Who had the turn when the writer looked."""
        self.died = False
        """`_died_of` is set: a caller failed or was interrupted in its turn."""
        self.interrupts, self.crashes = interrupts, crashes
        self.recheck = False

    def __copy__(self) -> State:
        new = State.__new__(State)
        new.__dict__.update(self.__dict__)
        return new

    def key(self) -> tuple[object, ...]:
        return tuple(self.__dict__.values())

    def answer(self, mail: str, how: str) -> None:
        """Claim the answer: the first to come has it."""
        if mail not in dict(self.answers):
            self.answers |= {(mail, how)}

    def serve(self) -> None:
        for mail in self.taken:
            if mail not in dict(self.answers):
                if mail in self.served:
                    self.faults += ("served twice",)
                if mail == "a" and "b" in self.served:
                    self.faults += ("out of order",)
                self.served |= {mail}
                self.answer(mail, "ok")

    def is_over(self, frame: object) -> bool:
        """True if this frame of `work_in_turn` has ended: of which caller, in which of its
        calls."""
        return isinstance(frame, tuple) and not any(
            (who, number) == frame and at in IN_TURN for who, (number, at) in enumerate(self.caller)
        )

    def wake(self) -> None:
        self.tokens = 1

    def leave(self, owner: object) -> None:
        self.turn = tuple(other for other in self.turn if other != owner)


class Model:
    """The steps, and what is left out of them on purpose."""

    def __init__(
        self, callers: Callers = TWO, interrupts: int = 0, crashes: int = 0, without: str = ""
    ) -> None:
        self.callers, self.without = callers, without
        self.begin = State(len(callers), interrupts, crashes)
        self.double = interrupts == 2

    def next(self, state: State) -> Iterator[State]:
        for who in range(len(self.callers)):
            yield from self.caller(state, who)
        yield from self.writer(state)
        yield from self.supervisor(state)

    def caller(self, old: State, who: int) -> Iterator[State]:
        number, at = old.caller[who]
        if at == "end":
            return
        kind, mail = self.callers[who][number].split()
        state = copy(old)

        def go(step: str, number: int = number) -> State:
            if step == "next":
                more = number + 1 < len(self.callers[who])
                number, step = (number + 1, "look") if more else (number, "end")
            moved = list(state.caller)
            moved[who] = (number, step)
            state.caller = tuple(moved)
            return state

        if at == "look":
            waits = state.mails and self.without != "the look at the mailbox"
            yield go("offer" if kind == "send" or state.turn or waits else "enter")
        elif at == "enter":
            state.turn += ((who, number),)
            yield go("decide")
        elif at == "decide":
            inbox = SimpleNamespace(
                mails=() if self.without == "the look at the mailbox" else state.mails,
                refusal=object() if state.refusing else None,
            )
            yield go("take" if may_work(state.turn[0] == (who, number), inbox) else "withdraw")
        elif at == "take":
            state.taken += (mail,)
            yield go("handle")
        elif at == "handle":
            state.serve()
            yield go("clear")
        elif at == "clear":
            state.taken = ()
            yield go("leave")
        elif at in ("leave", "withdraw"):
            state.leave((who, number))
            yield go("wake" if at == "leave" else "wake, then offer")
        elif at in ("wake", "wake, then offer"):
            if state.mails and self.without != "waking the writer":
                state.wake()
            yield go("next" if at == "wake" else "offer")
        elif at == "offer":
            if state.refusing:
                state.answer(mail, "refused")
                yield go("next")
            else:
                yield go("append")
        elif at == "append":
            state.mails += (mail,)
            yield go("token")
        elif at == "token":
            self.post_token(state)
            yield go("look again")
        elif at == "look again":
            if state.drained and self.without != "looking again":
                state.answer(mail, "refused")
            yield go("next" if kind == "send" else "wait")
        elif at == "wait" and mail in dict(state.answers):
            yield go("next")
        if at == "handle" and old.crashes:  # its handler fails: the caller waits for the answer
            state = copy(old)
            state.crashes -= 1
            state.died = True
            state.wake()
            yield go("wait")
        if old.interrupts:
            yield self.interrupted(old, who, at)

    def post_token(self, state: State) -> None:
        if self.without != "a token":
            state.wake()

    def interrupted(self, old: State, who: int, at: str) -> State:
        """The caller is gone. Its `finally` runs, unless the second interrupt comes there."""
        for_good = self.double and old.interrupts == 1
        state = copy(old)
        state.interrupts -= 1
        moved = list(state.caller)
        moved[who] = (0, "end")
        state.caller = tuple(moved)
        if for_good:
            state.recheck = True
            return state
        if at in ("decide", "withdraw"):
            state.leave((who, old.caller[who][0]))
            if state.mails:
                state.wake()
        elif at in ("take", "handle", "clear", "leave"):
            state.died = True
            state.wake()
        elif at == "token":
            self.post_token(state)
        elif at in ("wake", "wake, then offer") and state.mails:
            state.recheck = True
        return state

    def writer(self, old: State) -> Iterator[State]:
        state, at = copy(old), old.writer
        if at == "leave":
            state.leave(WRITER)
            state.writer = "wait"
            yield state
        elif at == "wait":
            state.writer = "look after" if state.mails else "sleep"
            yield state
        elif at in ("sleep", "wait for the turn"):
            if state.tokens:
                state.tokens -= 1
            elif state.recheck:
                state.recheck = False
            else:
                return
            state.writer = "look after" if at == "sleep" else "look after the turn"
            yield state
        elif at in ("look after", "look after the turn"):
            state.first = state.turn[0] if state.turn else None
            if state.first in (None, WRITER):
                self.look_on(state, at == "look after")
            else:
                state.writer = "is it over?" if at == "look after" else "is the turn's over?"
            yield state
        elif at in ("is it over?", "is the turn's over?"):
            looked_for = self.without != "looking after the turn"
            if looked_for and (state.died or state.is_over(state.first)):
                state.writer = "is it there?" if at == "is it over?" else "is the turn's there?"
            else:
                self.look_on(state, at == "is it over?")
            yield state
        elif at in ("is it there?", "is the turn's there?"):
            if state.first in state.turn or self.without == "looking again at the turn":
                yield self.take_over(state, at == "is it there?")
            else:
                self.look_on(state, at == "is it there?")
                yield state
        elif at == "leave the dead":
            state.leave(state.first)
            state.writer = "restart"
            yield state
        elif at == "enter":
            state.turn += (WRITER,)
            state.writer = "first?"
            yield state
        elif at == "first?":
            if state.turn[0] == WRITER or self.without == "waiting for the turn":
                state.writer = "move"
            else:
                state.writer = "wait for the turn"
            yield state
        elif at == "move":
            if STOP in state.mails[:1]:
                state.writer, state.mails = "ended", state.mails[1:]
            elif not state.mails:
                state.writer = "leave"
            else:
                end = state.mails.index(STOP) if STOP in state.mails else len(state.mails)
                state.taken, state.mails = state.mails[:end], state.mails[end:]
                state.writer = "handle"
            yield state
        elif at == "handle":
            if old.crashes:
                crashed = copy(old)
                crashed.crashes -= 1
                crashed.writer = "restart"
                yield crashed
            state.serve()
            state.writer = "clear"
            yield state
        elif at == "clear":
            state.taken, state.writer = (), "leave"
            yield state
        elif at == "restart":
            unsettled = tuple(mail for mail in state.taken if mail not in dict(state.answers))
            state.mails, state.taken = unsettled + state.mails, ()
            state.writer = "leave"
            yield state

    def look_on(self, state: State, outside: bool) -> None:
        """The writer goes on, from waiting for mail or (not `outside`) for the turn."""
        state.first = None
        state.writer = ("enter" if state.mails else "wait") if outside else "first?"

    def take_over(self, state: State, outside: bool) -> State:
        """The writer takes the turn of one who died."""
        if not state.is_over(state.first):
            state.faults += ("took the turn of a caller at work",)
        if state.taken or self.without != "believing a death once":
            state.died = False
        if not state.taken:
            state.leave(state.first)
            self.look_on(state, outside)
        elif self.without == "taking the place of the dead":
            if WRITER not in state.turn:
                state.turn += (WRITER,)
            state.writer = "leave the dead"
        else:
            state.leave(WRITER)
            state.turn = (WRITER, *state.turn[1:])
            state.writer = "restart"
        return state

    def supervisor(self, old: State) -> Iterator[State]:
        state, at = copy(old), old.supervisor
        if at == "refuse":
            state.refusing, state.supervisor = True, "stop"
        elif at == "stop":
            state.mails += (STOP,)
            state.supervisor = "token"
        elif at == "token":
            self.post_token(state)
            state.supervisor = "drain" if self.without == "refusing first" else "join"
        elif at == "join" and state.writer == "ended":
            state.supervisor = "say so"
        elif at == "say so":
            state.drained, state.supervisor = True, "drain"
        elif at == "drain":
            for mail in state.mails:
                state.answer(mail, "refused")
            state.mails, state.supervisor = (), "end"
        else:
            return
        yield state


def explored(model: Model) -> tuple[int, list[str]]:
    """How many states there are, and what is wrong in any of them."""
    seen, found = {model.begin.key()}, []
    waiting = [model.begin]
    while waiting:
        state = waiting.pop()
        stuck = True
        for following in model.next(state):
            stuck = False
            key = following.key()
            if key not in seen:
                seen.add(key)
                waiting.append(following)
                found += faults(following)
        if stuck:
            found += faults_at_the_end(state)
        if found:
            break
    return len(seen), found


def faults(state: State) -> Iterator[str]:
    yield from state.faults
    working = [who for who, (_, at) in enumerate(state.caller) if at in ("handle", "clear")]
    if len(working) + (state.writer in ("handle", "clear", "restart")) > 1:
        yield "two turns at once"


def faults_at_the_end(state: State) -> Iterator[str]:
    if state.writer != "ended" or state.supervisor != "end":
        yield f"stuck: the writer at {state.writer}, the supervisor at {state.supervisor}"
    for who, (number, at) in enumerate(state.caller):
        if at != "end":
            yield f"stuck: caller {who} at {at} of its call {number}"


MODELS = [
    pytest.param(TWO, 0, 1, id="a crash"),
    pytest.param(TWO, 1, 0, id="an interrupt"),
    pytest.param(TWO, 2, 0, marks=pytest.mark.slow, id="an interrupt within an interrupt"),
    pytest.param(TWO, 1, 1, marks=pytest.mark.slow, id="an interrupt and a crash"),
    pytest.param(THREE, 0, 0, marks=pytest.mark.slow, id="three callers"),
]


@pytest.mark.parametrize(("callers", "interrupts", "crashes"), MODELS)
def test_no_interleaving_loses_a_wake_up_an_answer_or_the_order(
    callers: Callers, interrupts: int, crashes: int
) -> None:
    states, found = explored(Model(callers, interrupts, crashes))
    assert found == []
    assert states > 1_000


@pytest.mark.parametrize(
    "rule",
    [
        "the look at the mailbox",
        "a token",
        "waking the writer",
        "looking again",
        "looking after the turn",
        "looking again at the turn",
        "taking the place of the dead",
        "believing a death once",
        "waiting for the turn",
        "refusing first",
    ],
)
def test_each_rule_of_the_hand_over_is_needed(rule: str) -> None:
    callers, interrupts = {
        "looking after the turn": (TWO, 2),
        "taking the place of the dead": (ONE_EACH, 1),
        "believing a death once": (TWO, 1),
    }.get(rule, (TWO, 0))
    assert explored(Model(callers, interrupts, without=rule))[1] != []
