"""What a forked child does with what it inherited: one hook, and the order in which it tells whom.

The threads of the parent are not there, its locks are held for ever, and its files are shared.
"""

from __future__ import annotations

import enum
import os
import weakref
from collections.abc import Callable
from typing import Protocol


class Rank(enum.IntEnum):
    """Who is told before whom."""

    LOCK = 0
    """First: the child's copies of a lock would outlive the parent."""
    ENGINE = 1
    ANSWERS = 2
    FEEDS = 3
    FOLLOWER = 4
    STORE = 5


class Inherited(Protocol):
    """What is told that it is in a forked child now."""

    def after_fork(self) -> None:
        """In the child, on its only thread. May be called again, in a child of the child."""


_owners: dict[Rank, weakref.WeakSet[Inherited]] = {rank: weakref.WeakSet() for rank in Rank}
_functions: dict[Rank, list[Callable[[], None]]] = {rank: [] for rank in Rank}


def tell_after_fork(owner: Inherited, rank: Rank) -> None:
    """Call `owner.after_fork()` in each forked child, for as long as `owner` lives."""
    _owners[rank].add(owner)


def call_after_fork(function: Callable[[], None], rank: Rank) -> None:
    """Call `function` in each forked child."""
    _functions[rank].append(function)


def _after_fork_in_child() -> None:
    failed: list[Exception] = []
    for rank in Rank:
        for call in (*_functions[rank], *(owner.after_fork for owner in list(_owners[rank]))):
            try:
                call()
            except Exception as error:  # the others are told none the less
                failed.append(error)
    if failed:
        raise failed[0]


os.register_at_fork(after_in_child=_after_fork_in_child)
