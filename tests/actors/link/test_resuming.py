"""What a link decides, over every small history of an upstream; and that each rule which is simpler
fails in one of them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
from counting import work_of

from foldlog.actors.link.resuming import (
    Audit,
    Held,
    Plan,
    Step,
    audit_delay_s,
    confirms,
    is_same,
    mark_of,
    may_delete,
    next_audit_s,
    plan,
    retry_delay_s,
    scoped_origin,
)
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.upstream import Identity

NAME = b"n" * 16
EVENTS = ("put a", "put b", "delete a", "purge deletes", "purge all", "recreate", "restore")
AWAY = 3
"""Events while the client is away: with the states before it left, 7**3 * 3 histories."""


def at(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number) if number else WatchCursor.none()


class World(NamedTuple):
    """A bucket with a history of 1: the last message of each key, the last sequence, and which
    bucket it is."""

    messages: tuple[tuple[str, int, bool], ...] = ()
    """(key, sequence, live), by sequence."""
    last: int = 0
    made: int = 1

    def write(self, key: str, live: bool) -> World:
        kept = tuple(m for m in self.messages if m[0] != key)
        return self._replace(messages=(*kept, (key, self.last + 1, live)), last=self.last + 1)

    def after(self, event: str, copy: World) -> World:
        if event == "purge deletes":
            return self._replace(messages=tuple(m for m in self.messages if m[2]))
        if event == "purge all":
            return self._replace(messages=())
        if event == "recreate":
            return World(made=self.made + 1)
        if event == "restore":
            return copy
        verb, key = event.split()
        return self.write(key, verb == "put")

    @property
    def live(self) -> dict[str, bytes]:
        """Versions by key; the incarnation makes equal sequences of two buckets different
        entries."""
        return {k: bytes(at(seq)) + bytes((self.made,)) for k, seq, live in self.messages if live}

    @property
    def first(self) -> int:
        return self.messages[0][1] if self.messages else self.last + 1

    @property
    def identity(self) -> Identity:
        origin = NAME + bytes((self.made,))
        return Identity(origin, WatchCursor.none(), WatchCursor.from_u64(self.last))


class Attached(NamedTuple):
    """What a client holds once it is in step, and whether it told its watchers of a rewind."""

    fold: dict[str, bytes]
    told: bool


def attached(held: Held, fold: dict[str, bytes], world: World, stale: World, rules) -> Attached:
    """How a client attaches by `rules`, if its first look is answered by a leader that has only
    `stale`."""
    decided = rules["plan"](held, stale.identity, stale)
    seen = stale
    if decided.rewound and rules["confirms"] is not None:
        again = rules["plan"](held, world.identity, world)
        if not rules["confirms"](stale.identity, decided, world.identity, again):
            return attached(held, fold, world, world, rules)
        seen = world
    if decided.step in (Step.LOAD, Step.REPLACE):
        return Attached(dict(seen.live), decided.rewound)
    fold = dict(fold)
    for key, seq, live in world.messages:
        if seq > (held.cursor.as_u64() or 0):
            fold.pop(key, None)
            if live:
                fold[key] = world.live[key]
    if rules["audit"] is not None:
        for key in rules["audit"](fold, world.live):
            fold.pop(key, None)
            if key in world.live:
                fold[key] = world.live[key]
    return Attached(fold, False)


def both_ways(fold: dict[str, bytes], found: dict[str, bytes]) -> set[str]:
    audit = Audit(found, ())
    audit.compare(list(fold), list(fold.values()))
    return audit.end()


RULES = {
    "plan": lambda held, identity, world: plan(held, identity),
    "audit": both_ways,
    "confirms": confirms,
}


def first_sequence_alone(held, identity, world) -> Plan:
    sound = not held.cursor.is_none and world.first <= (held.cursor.as_u64() or 0) + 1
    return Plan(Step.RESUME if sound else Step.REPLACE)


MUTANTS = {
    "first sequence alone": RULES | {"plan": first_sequence_alone, "audit": None},
    "no audit": RULES | {"audit": None},
    "audit only of what is held": RULES
    | {"audit": lambda fold, found: {k for k in fold if k not in found}},
    "audit only of what is found": RULES
    | {"audit": lambda fold, found: {k for k in found if k not in fold}},
    "no confirmation": RULES | {"confirms": None},
    "confirmation of the origin alone": RULES
    | {"confirms": lambda found, decided, again, decided_again: found.origin == again.origin},
    "audit of keys, not of versions": RULES
    | {"audit": lambda fold, found: fold.keys() ^ found.keys()},
}


def histories():
    """(what is held, as told and in full, and the world as it is now) after every small history;
    and an older state of the world, as a deposed leader has it."""
    befores = [
        World().write("a", True),
        World().write("a", True).write("b", True),
        World().write("b", True).write("a", True).write("a", True),
    ]
    for before in befores:
        copy = World(before.messages[:1], before.messages[0][1]).write("c", True)
        older = World(before.messages[:1], before.messages[0][1])
        held = Held(before.identity.origin, before.identity.last, not before.live)
        for events in itertools.product(EVENTS, repeat=AWAY):
            world = before
            for event in events:
                world = world.after(event, copy)
            yield held, dict(before.live), world, older


def wrong(rules) -> int:
    """Cases in which a client ends with another state, or tells of a rewind that never was."""
    count = 0
    for held, fold, world, older in histories():
        for first in (world, older):
            done = attached(held, fold, world, first, rules)
            has_rewound = plan(held, world.identity).rewound
            count += done.fold != world.live or (done.told and not has_rewound)
    return count


def test_attaching_is_exact_after_every_small_history_whoever_answers_first():
    assert wrong(RULES) == 0


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_every_simpler_rule_leaves_a_mirror_wrong(mutant):
    assert wrong(MUTANTS[mutant]) > 0


ORIGIN, REBORN, OTHER = NAME + b"1", NAME + b"2", b"o" * 16 + b"1"


@pytest.mark.parametrize(
    ("held", "found", "step", "rewound"),
    [
        (Held(b"", at(0), True), Identity(ORIGIN, at(0), at(5)), Step.LOAD, False),
        (Held(OTHER, at(0), True), Identity(ORIGIN, at(0), at(5)), Step.LOAD, False),
        (Held(ORIGIN, at(0), False), Identity(ORIGIN, at(0), at(5)), Step.LOAD, False),
        (Held(ORIGIN, at(5), False), Identity(ORIGIN, at(0), at(5)), Step.RESUME, False),
        (Held(ORIGIN, at(5), True), Identity(ORIGIN, at(0), at(5)), Step.RESUME, False),
        (Held(ORIGIN, at(5), False), Identity(ORIGIN, at(5), at(9)), Step.RESUME, False),
        (Held(ORIGIN, at(5), False), Identity(ORIGIN, at(6), at(9)), Step.REPLACE, False),
        (Held(ORIGIN, at(5), False), Identity(ORIGIN, at(0), at(4)), Step.REPLACE, True),
        (
            Held(ORIGIN, WatchCursor(b"\0"), False),
            Identity(ORIGIN, at(0), at(4)),
            Step.REPLACE,
            True,
        ),
        (
            Held(ORIGIN, WatchCursor(b"x"), False),
            Identity(ORIGIN, at(0), at(4)),
            Step.REPLACE,
            True,
        ),
        (Held(ORIGIN, at(5), False), Identity(REBORN, at(0), at(9)), Step.REPLACE, True),
        (Held(NAME, at(5), False), Identity(ORIGIN, at(0), at(9)), Step.REPLACE, True),
        (Held(OTHER, at(5), False), Identity(ORIGIN, at(0), at(9)), Step.HOLD, False),
        (Held(b"", at(5), False), Identity(ORIGIN, at(0), at(9)), Step.HOLD, False),
        (Held(b"", at(0), False), Identity(ORIGIN, at(0), at(9)), Step.HOLD, False),
    ],
)
def test_where_a_link_goes_on(held, found, step, rewound):
    decided = plan(held, found)
    assert (decided.step, decided.rewound) == (step, rewound)


def test_a_log_of_unknown_origin_is_told_from_that_of_another_upstream():
    found = Identity(ORIGIN, at(0), at(9))
    reasons = [plan(Held(origin, at(5), False), found).reason for origin in (OTHER, b"")]
    assert [reason.split(" by ")[1] for reason in reasons] == [
        "another upstream",
        "an unknown upstream",
    ]


def test_a_second_look_confirms_only_the_same_plan_for_the_same_upstream():
    found, other = Identity(ORIGIN, at(0), at(4)), Identity(REBORN, at(0), at(4))
    back, resume = Plan(Step.REPLACE, "went back", rewound=True), Plan(Step.RESUME)
    assert confirms(found, back, found._replace(last=at(3)), back)
    assert not confirms(found, back, other, back)
    assert not confirms(found, back, found, resume)


@pytest.mark.parametrize(
    ("held", "mark", "same"),
    [
        (ORIGIN, b"", True),
        (ORIGIN + b"m" * 8, b"m" * 8, True),
        (ORIGIN + b"m" * 7, b"", False),
        (ORIGIN + b"m" * 9, b"", False),
        (OTHER + b"m" * 8, b"", False),
        (OTHER, b"", False),
        (b"", b"", False),
    ],
)
def test_a_mark_is_what_follows_the_origin_in_full_length(held, mark, same):
    assert (mark_of(held, ORIGIN), is_same(held, ORIGIN)) == (mark, same)


def test_a_foreign_log_is_replaced_only_once_its_owner_agrees():
    held, found = Held(OTHER, at(5), False), Identity(ORIGIN, at(0), at(9))
    assert plan(held, found).step is Step.HOLD
    assert plan(held, found, accepted=True) == Plan(
        Step.REPLACE, "the log was fed by another upstream", rewound=True
    )


@pytest.mark.parametrize(
    ("deleted", "live", "allowed"),
    [(0, 0, True), (99, 99, True), (100, 100, False), (100, 200, True), (101, 200, False)],
)
def test_a_mass_delete_is_over_half_of_the_keys_and_at_least_100(deleted, live, allowed):
    assert may_delete(deleted, live, 0.5) is allowed


def test_keys_told_of_meanwhile_are_exempt_from_an_audit():
    audit = Audit({"a": b"1", "b": b"1", "new": b"1"}, {"b", "gone", "new"})
    audit.compare(["a", "b", "gone"], [b"1", b"0", b"1"])
    assert audit.end() == set()


def test_an_audit_takes_no_loop_over_what_is_equal():
    """It took 9 us a key of the link's thread, and so came seldom at 1 % of a core."""
    keys = [f"k.{number}" for number in range(1000)]
    versions = [b"%d" % number for number in range(1000)]
    audit = Audit(dict(zip(keys, versions, strict=True)), ())
    few = work_of(audit.compare, keys[:100], versions[:100]).lines
    assert work_of(audit.compare, keys[100:], versions[100:]).lines == few
    assert audit.end() == set()


def test_a_scope_keeps_the_name_and_other_prefixes_are_another_incarnation():
    scopes = {scoped_origin(ORIGIN, p) for p in ((), ("a",), ("b",), ("a", "b"), ("ab",))}
    assert len(scopes) == 5
    assert scoped_origin(ORIGIN, ()) == ORIGIN
    assert {scope[:16] for scope in scopes} == {NAME}
    assert scoped_origin(ORIGIN, ("b", "a")) == scoped_origin(ORIGIN, ("a", "b"))
    assert all(len(scope) <= 32 for scope in scopes)


def test_audits_stay_within_their_budget_and_retries_within_half_a_second():
    assert audit_delay_s(4.0, 0.01, 60.0) == pytest.approx(396.0)
    assert audit_delay_s(0.1, 0.01, 60.0) == 60.0
    assert next_audit_s(60.0, is_clean=True, was_clean=True) == 60.0
    assert next_audit_s(60.0, is_clean=False, was_clean=True) == 0.0
    assert next_audit_s(60.0, is_clean=False, was_clean=False) == 60.0
    delays = [retry_delay_s(attempt, 1.0) for attempt in range(2000)]
    assert delays == sorted(delays)
    assert max(delays) <= 0.5
    assert min(retry_delay_s(attempt, 0.0) for attempt in range(9)) > 0
