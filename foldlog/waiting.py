"""Waiting until a published snapshot has reached a position."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TypeAlias

from foldlog.actors.feeds.feeds import Feeds, Waiter
from foldlog.protocol.engine import Snapshot
from foldlog.protocol.errors import RequestTimeout, StoreClosed
from foldlog.protocol.options import check_timeout
from foldlog.protocol.tokens import CursorLike, VersionToken, as_cursor, has_reached
from foldlog.storage.handover import RECHECK_S, Wakeup

SeqLike: TypeAlias = int | VersionToken
"""A batch's sequence: a number, or the version that `put` returned."""

WAIT_TIMEOUT_S = 30.0


class Position:
    """A position to wait for: a cursor or a sequence."""

    def __init__(self, cursor: CursorLike | None, seq: SeqLike | None) -> None:
        """TypeError or ValueError unless exactly one of the two is given."""
        if (cursor is None) == (seq is None):
            raise TypeError("wait_for takes either a cursor or seq=")
        self._cursor = None if cursor is None else as_cursor(cursor)
        self._seq = 0 if seq is None else _sequence(seq)

    def is_reached(self, fold: Snapshot) -> bool:
        """True if `fold` includes everything up to this position."""
        if self._cursor is None:
            return fold.seq >= self._seq
        return has_reached(fold.cursor(), self._cursor)

    def __str__(self) -> str:
        return f"batch {self._seq}" if self._cursor is None else repr(self._cursor)

    def timeout(self, fold: Snapshot, timeout_s: float) -> RequestTimeout:
        """The error after waiting `timeout_s` and seeing no more than `fold`."""
        return RequestTimeout(
            f"{self} was not seen within {timeout_s} s; at batch {fold.seq}, {fold.cursor()!r}"
        )


def _sequence(seq: object) -> int:
    if type(seq) is VersionToken:
        return int(seq)
    if type(seq) is not int:
        raise TypeError(
            f"seq is an int, or the version that put returned, not {type(seq).__name__}"
        )
    if seq < 0:
        raise ValueError(f"seq is at least 0, got {seq}")
    return seq


def check_coming(feeds: Feeds) -> None:
    """Raise if it makes no sense to wait for another state: StoreClosed after the end, or the
    error that keeps a follower from reading anything."""
    if feeds.ended is not None:
        raise StoreClosed(feeds.ended)
    if feeds.refusal is not None:
        raise copy.copy(feeds.refusal)  # many threads may wait


def wait_until(
    feeds: Feeds, current: Callable[[], Snapshot], position: Position, timeout_s: float | None
) -> None:
    """Wait until the published snapshot has reached `position`. RequestTimeout after `timeout_s`;
    raises if `check_coming` does."""
    timeout_s = check_timeout(timeout_s)
    if position.is_reached(current()):
        return
    woken = Wakeup()
    waiter = Waiter(position.is_reached, woken.set)
    feeds.add_waiter(waiter)  # before checking the snapshot: anything published later wakes us
    deadline = time.monotonic() + timeout_s
    while not position.is_reached(current()):
        check_coming(feeds)
        rest = min(deadline - time.monotonic(), RECHECK_S)
        if rest <= 0:
            raise position.timeout(current(), timeout_s)
        woken.wait(rest)
