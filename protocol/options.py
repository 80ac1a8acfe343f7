"""Options of stores, engines, followers, mirrors and commands: declared and checked here.

Options are checked before anything is opened or sent. A wrong type raises TypeError, a value out of
bounds ValueError; both name the option. A `bool` is not a number, and nothing else is a `bool`.
`nan` is refused. `None` or `math.inf` waits forever.
"""

from __future__ import annotations

import enum
import sys
import threading
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeAlias, TypeVar, get_args

from foldlog.protocol.store import Backend, FormatName

Sync: TypeAlias = Literal["always", "interval", "never"]
OnDamage: TypeAlias = Literal["refuse", "cut"]
OnOversize: TypeAlias = Literal["fail", "skip"]

FOREVER_S = min(1e9, threading.TIMEOUT_MAX / 4)
"""Seconds that stand for forever, over 30 years on most systems: no clock or lock accepts
infinity."""


class Unset(enum.Enum):
    """The type of UNSET."""

    UNSET = enum.auto()

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
"""The default of arguments where passing None is a likely mistake."""

_Word = TypeVar("_Word", bound=str)


def _real(name: str, value: object, bound: str = "at least 0") -> float:
    """`value` as a float. TypeError unless it is an int or a float; ValueError if it is nan or
    negative, which says the `bound`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
    if not value >= 0:  # nan, too
        raise ValueError(f"{name} is {bound}, got {value!r}")
    return float(min(value, FOREVER_S))  # in this order: an int may be too large for a float


def check_timeout(value: object, name: str = "timeout_s") -> float:
    """A timeout as a finite number of seconds, which every wait accepts. None and infinity mean
    forever.

    0 does not wait. TypeError unless it is a number; ValueError if it is nan or negative. Cost: 0.1
    us.
    """
    if type(value) is float and 0.0 <= value <= FOREVER_S:
        return value
    return FOREVER_S if value is None else _real(name, value)


def check_flag(name: str, value: object) -> None:
    """TypeError unless `value` is True or False: None or nan would count as one of them."""
    if value is not True and value is not False:
        raise TypeError(f"{name} is True or False, not {type(value).__name__}")


def check_callable(name: str, value: object) -> None:
    """TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} is a function, not {type(value).__name__}")


def check_text(name: str, value: object) -> str:
    """`value`. TypeError unless it is a str; ValueError if it cannot be encoded as UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a lone surrogate at character {error.start}") from None
    return value


@dataclass(frozen=True, slots=True)
class Words(Generic[_Word]):
    """An option whose value is one of a few words."""

    name: str
    words: tuple[_Word, ...]
    default: _Word | None

    def check(self, value: object) -> None:
        """Raise TypeError or ValueError unless `value` is one of the words, or None and that is the
        default."""
        if value is None and self.default is None:
            return
        if not isinstance(value, str):
            raise TypeError(f"{self.name} is text, not {type(value).__name__}")
        if value not in self.words:
            *most, last = map(repr, self.words)
            raise ValueError(f"{self.name} is {', '.join(most)} or {last}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Count:
    """An option whose value is an integer within bounds."""

    name: str
    default: int
    least: int = 0
    most: int | None = None

    def check(self, value: object) -> int:
        """`value`, at most `sys.maxsize`. TypeError unless it is an int; ValueError if it is out of
        bounds."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{self.name} is an int, not {type(value).__name__}")
        if value < self.least or (self.most is not None and value > self.most):
            least, most = self.least, self.most
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            raise ValueError(f"{self.name} is {bounds}, got {value}")
        return min(value, sys.maxsize)


@dataclass(frozen=True, slots=True)
class Seconds:
    """An option whose value is a duration in seconds, above 0."""

    name: str
    default: float
    may_be_infinite: bool = False
    least: float = 0.0
    """The shortest duration accepted, if above 0."""

    def check(self, value: object) -> float:
        """`value` as seconds, at most `FOREVER_S`. TypeError unless it is a number; ValueError if
        it is out of bounds."""
        bound = f"at least {self.least}" if self.least else "above 0"
        seconds = _real(self.name, value, bound)
        if seconds < self.least or seconds == 0:
            raise ValueError(f"{self.name} is {bound}, got {value!r}")
        if value == float("inf") and not self.may_be_infinite:
            raise ValueError(f"{self.name} is finite, got {value!r}")
        return seconds


@dataclass(frozen=True, slots=True)
class Share:
    """An option whose value is a part of a whole, from 0 to 1."""

    name: str
    default: float

    def check(self, value: object) -> float:
        """`value`. TypeError unless it is a number; ValueError if it is out of bounds."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self.name} is a number, not {type(value).__name__}")
        if not 0 <= value <= 1:  # nan, too
            raise ValueError(f"{self.name} is 0 to 1, got {value!r}")
        return value


FORMAT: Words[FormatName] = Words("format", get_args(FormatName), None)
BACKEND: Words[Backend] = Words("backend", get_args(Backend), "append-log")
SYNC: Words[Sync] = Words("sync", get_args(Sync), "interval")
ENGINE_SYNC: Words[Literal["never", "always"]] = Words("sync", ("never", "always"), "never")
ON_DAMAGE: Words[OnDamage] = Words("on_damage", get_args(OnDamage), "refuse")
ON_OVERSIZE: Words[OnOversize] = Words("on_oversize", get_args(OnOversize), "fail")
READERS = Count("readers", 2, 1, 64)
COMPACT_THRESHOLD = Count("compact_threshold", 10 * 1024 * 1024)
"""Appended bytes."""
CACHE_BYTES = Count("cache_bytes", 512 * 1024 * 1024, 8 * 1024 * 1024)
"""Memory for what was read from disk."""
MAILBOX_BATCHES = Count("mailbox_batches", 10_000, 1)
MAILBOX_BYTES = Count("mailbox_bytes", 64 * 1024 * 1024, 1)
MAX_RESTARTS = Count("max_restarts", 5)
LEAST_INTERVAL_S = 0.001
"""What is done this often takes up to a tenth of a processor; more often, soon all of it."""
SYNC_INTERVAL_S = Seconds("sync_interval_s", 1.0, least=LEAST_INTERVAL_S)
RESTART_WINDOW_S = Seconds("restart_window_s", 60.0, may_be_infinite=True, least=0.05)
"""Not shorter than the delay of a restart, or none would count."""
STUCK_AFTER_S = Seconds("stuck_after_s", 120.0, may_be_infinite=True, least=0.05)
MASS_DELETE = Share("mass_delete", 0.5)
AUDIT_INTERVAL_S = Seconds("audit_interval_s", 60.0, may_be_infinite=True, least=LEAST_INTERVAL_S)
POLL_INTERVAL_S = Seconds("poll_interval_s", 0.5, least=LEAST_INTERVAL_S)
PICTURE_INTERVAL_S = Seconds("--interval", 1.0, least=0.05)
"""Seconds between two refreshes of `foldlog top`."""

APPLY_TIMEOUT_S = 30.0
JOB_TIMEOUT_S = 600.0
"""For a compaction, an export or a reopen."""
CLOSE_TIMEOUT_S = 30.0
