"""What the supervisor decides, as pure functions: whether and when an actor is restarted, and how
long the writer has been stuck, less the time that the process was paused.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from foldlog.actors.base.adapter import DiedInTurn, NoThread
from foldlog.protocol.errors import (
    CorruptLogError,
    ForeignFileError,
    ForkedStore,
    InvalidFormatError,
    LogAccessError,
    LogChangedError,
    LogRegressedError,
    StoreLocked,
)

PERMANENT = (
    CorruptLogError,
    ForeignFileError,
    InvalidFormatError,
    LogAccessError,
    StoreLocked,
    LogChangedError,
    LogRegressedError,
    ForkedStore,
)
"""Errors that a restart cannot fix."""
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Resources that a restarting actor may lack for as long as others hold them: as memory, and
threads."""
MAX_DELAY_S = 5.0
LATE_S = 0.05
"""A wait that ends later than this is not the store's fault: the process or machine was paused."""


def is_shortage(error: BaseException) -> bool:
    """True for an error that ends once others release what they hold."""
    return isinstance(error, (MemoryError, NoThread)) or (
        isinstance(error, OSError) and error.errno in SHORTAGES
    )


def next_restart_delay_s(
    error: BaseException,
    restarts_s: Sequence[float],
    now_s: float,
    *,
    max_restarts: int,
    window_s: float,
    delay_s: float,
    patient: bool = True,
) -> float | None:
    """Seconds to wait before restarting an actor that died of `error`; None to give up.

    `restarts_s`: when it was restarted before. The first restart within the window is immediate;
    then the delay doubles, up to 5 s. With `patient`, an actor that died of a shortage is always
    restarted: others will release what they hold. One that died in a caller's turn is restarted at
    once.
    """
    if isinstance(error, DiedInTurn):
        return 0.0
    recent = sum(now_s - at < window_s for at in restarts_s)
    short = patient and is_shortage(error)
    if isinstance(error, PERMANENT) or (recent >= max_restarts and not short):
        return None
    return 0.0 if recent == 0 else min(delay_s * 2.0 ** (recent - 1), MAX_DELAY_S)


def lateness_s(asked_s: float, took_s: float) -> float:
    """How much of a wait of `asked_s` that took `took_s` to discount as a pause of the process."""
    late_s = took_s - asked_s
    return late_s if late_s > LATE_S else 0.0


class StuckClock:
    """How long an actor has been busy with one task, less the time the process was paused."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._paused_s = self._late_s = 0.0

    def note_wait(self, asked_s: float, took_s: float) -> None:
        """A wait of `asked_s` took `took_s`: the process may have been paused."""
        self._late_s += lateness_s(asked_s, took_s)

    def look(self, busy_since: float | None, now_s: float) -> float:
        """Seconds it has been busy, less the pauses noted since the first look at it."""
        late_s, self._late_s = self._late_s, 0.0
        if busy_since is None or busy_since != self._since:
            self._since, self._paused_s = busy_since, 0.0
        if busy_since is None:
            return 0.0
        self._paused_s += late_s
        return max(now_s - busy_since - self._paused_s, 0.0)
