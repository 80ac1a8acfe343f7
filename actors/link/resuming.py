"""What a link decides, as pure functions: where to resume, what an audit corrects, what may not be
lost without consent.

The position alone does not show whether missed changes can still be delivered. The upstream may be
a different one under the same name, may have gone back, or may have dropped changes silently. So
attaching takes three steps: identity, then the tail, then an audit.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Mapping, Sequence
from hashlib import blake2b
from itertools import compress, count, repeat
from operator import ne
from typing import NamedTuple

from foldlog.protocol.tokens import NAME_BYTES, WatchCursor
from foldlog.protocol.upstream import Identity, Prefixes

MIN_MASS_DELETE = 100
"""A reset or an audit that deletes fewer keys than this is never held."""
SCOPE_BYTES = 8
"""Size of the scope in the origin of a mirror limited to some prefixes."""
MARK_BYTES = 8
"""Size of the mark that may follow an origin in the log. An upstream recognizes the position by
it."""


class Step(enum.Enum):
    """How a link resumes."""

    LOAD = "load"
    """Nothing complete is held: take the state, in pieces, with the cursor last."""
    RESUME = "resume"
    """Take the changes after the cursor."""
    REPLACE = "replace"
    """Take the state, and fold the difference as one batch."""
    HOLD = "hold"
    """Ask first: the log holds what another upstream, or an unknown one, fed it."""


class Held(NamedTuple):
    """What a store holds."""

    origin: bytes
    cursor: WatchCursor
    is_empty: bool


class Plan(NamedTuple):
    """A step, and the reason for it."""

    step: Step
    reason: str = ""
    rewound: bool = False
    """The upstream went back, or is another incarnation: a claim to be confirmed, and passed on to
    watchers."""


def scoped_origin(origin: bytes, prefixes: Prefixes) -> bytes:
    """The origin of a mirror of these prefixes. Other prefixes make another incarnation, since the
    changes to keys outside them were not received."""
    if not prefixes:
        return origin
    name, rest = origin[:NAME_BYTES].ljust(NAME_BYTES, b"\0"), origin[NAME_BYTES:]
    digest = blake2b(rest, digest_size=SCOPE_BYTES)
    for prefix in sorted(prefixes):
        raw = prefix.encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return name + digest.digest()


def plan(held: Held, found: Identity, *, accepted: bool = False) -> Plan:
    """How to resume with an upstream that identifies itself as `found`. `accepted`: the owner has
    accepted a reset."""
    if held.is_empty and held.cursor.is_none:
        return Plan(Step.LOAD, "nothing is held")
    if not is_same(held.origin, found.origin):
        if held.origin[:NAME_BYTES].ljust(NAME_BYTES, b"\0") == found.origin[:NAME_BYTES].ljust(
            NAME_BYTES, b"\0"
        ):
            return Plan(Step.REPLACE, "the upstream was made anew since", rewound=True)
        who = "another upstream" if held.origin else "an unknown upstream"
        reason = f"the log was fed by {who}"
        return Plan(Step.REPLACE if accepted else Step.HOLD, reason, rewound=accepted)
    if held.cursor.is_none:
        return Plan(Step.LOAD, "loading was not finished")
    if len(held.cursor) != len(found.last) or bytes(found.last) < bytes(held.cursor):
        return Plan(Step.REPLACE, "the upstream went back", rewound=True)
    if bytes(held.cursor) < bytes(found.first):
        return Plan(Step.REPLACE, "the upstream no longer reaches back to the cursor")
    return Plan(Step.RESUME)


def confirms(found: Identity, decided: Plan, again: Identity, decided_again: Plan) -> bool:
    """True if a second look says what the first one did: the same upstream, and the same plan. The
    first may have been answered by a leader that was deposed."""
    return again.origin == found.origin and decided_again == decided


def is_same(held: bytes, found: bytes) -> bool:
    """True if an origin as stored in a log, perhaps with a mark, is that of an upstream."""
    return held in (found, found + mark_of(held, found))


def mark_of(held: bytes, found: bytes) -> bytes:
    """The mark that follows the origin `found` in `held`; empty if none does."""
    has_mark = held.startswith(found) and len(held) == len(found) + MARK_BYTES
    return held[len(found) :] if has_mark else b""


def may_delete(deleted: int, live: int, limit: float) -> bool:
    """True if `deleted` of `live` keys may be removed without consent: up to the share `limit`, or
    fewer than 100."""
    return deleted < MIN_MASS_DELETE or deleted <= limit * live


class Audit:
    """Compares what is held with the versions of an upstream's keys, in both directions. Keys that
    change meanwhile are exempt."""

    def __init__(self, found: Mapping[str, bytes], touched: Container[str]) -> None:
        self._missing = dict(found)
        self._touched = touched
        self.suspects: set[str] = set()
        """Keys whose entries seem wrong; to be confirmed."""

    def compare(self, keys: Sequence[str], versions: Sequence[bytes]) -> None:
        """Take some of what is held, each key once, with versions in the form used in `found`.
        Cost: a loop only over what differs."""
        told = list(map(self._missing.pop, keys, repeat(None)))
        for index in compress(count(), map(ne, told, versions)):
            if keys[index] not in self._touched:
                self.suspects.add(keys[index])

    def end(self) -> set[str]:
        """All suspects, once everything held was compared; includes keys that are not held."""
        self.suspects.update(key for key in self._missing if key not in self._touched)
        return self.suspects


def audit_delay_s(cost_s: float, budget: float, min_s: float) -> float:
    """How long to wait after an audit that took `cost_s` of processor time, so that audits use
    `budget` of a core."""
    return max(min_s, cost_s / budget - cost_s)


def next_audit_s(pace_s: float, *, is_clean: bool, was_clean: bool) -> float:
    """How long to wait after an audit. What it corrected is checked at once, but only once: a
    `parse` that is not a pure function would have it correct something each time."""
    return 0.0 if was_clean and not is_clean else pace_s


def retry_delay_s(attempt: int, jitter: float) -> float:
    """How long to wait before the `attempt`-th attach in a row, counted from 0. `jitter` is 0 to 1.

    At most 0.5 s: a server that comes back is found within a second, and a try costs it one refused
    connection.
    """
    return min(0.02 * 2.0 ** min(attempt, 5), 0.5) * (0.5 + 0.5 * jitter)
