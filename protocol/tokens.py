"""Opaque tokens: the version of an entry, and a position in the stream that feeds a store.

A token is up to 10 bytes that foldlog stores and returns unchanged. An 8-byte big-endian u64 (a
stream revision) and a 10-byte FoundationDB versionstamp both fit. The empty token means "unknown"
as a version and "none" as a cursor.

A token *is* its bytes (a `bytes` subclass without `__dict__`): one is created for every entry read,
and hashing, comparing and slicing stay as fast as for `bytes`.
"""

from __future__ import annotations

import re
from typing import Self, TypeAlias

MAX_TOKEN_BYTES = 10  # a FoundationDB versionstamp; writers and readers both refuse more
MAX_ORIGIN_BYTES = 32
"""The longest origin: the identity of an upstream, stored next to the cursor."""
NAME_BYTES = 16
"""The part of an origin that names the upstream. The rest tells its incarnations apart, such as a
recreated bucket."""
U64_BYTES = 8
U64_MAX = 2**64 - 1


_NUMBER = re.compile("0|[1-9][0-9]{0,19}", re.ASCII)
_HEX = re.compile("(?:0x)?((?:[0-9a-fA-F]{2})+)")


class _Token(bytes):
    __slots__ = ()

    def __new__(cls, raw: bytes | bytearray | memoryview = b"") -> Self:
        if not isinstance(raw, (bytes, bytearray, memoryview)):
            raise TypeError(f"{cls.__name__} takes bytes, not {type(raw).__name__}")
        token = super().__new__(cls, raw)
        if len(token) > MAX_TOKEN_BYTES:
            raise ValueError(
                f"{cls.__name__} takes at most {MAX_TOKEN_BYTES} bytes, got {len(token)}"
            )
        return token

    @classmethod
    def from_u64(cls, number: int) -> Self:
        """The 8-byte big-endian token of `number`, 0 <= number < 2**64; else ValueError."""
        if type(number) is int and 0 <= number <= U64_MAX:
            return bytes.__new__(cls, number.to_bytes(U64_BYTES, "big"))
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{cls.__name__}.from_u64 takes an int, not {type(number).__name__}")
        if not 0 <= number <= U64_MAX:
            raise ValueError(f"{cls.__name__}.from_u64 takes 0 to 2**64 - 1, got {number}")
        return cls(number.to_bytes(U64_BYTES, "big"))

    def as_u64(self) -> int | None:
        """The number of an 8-byte token; None for a token of any other length."""
        return int.from_bytes(self, "big") if len(self) == U64_BYTES else None

    def __int__(self) -> int:
        """The number of an 8-byte token; ValueError for a token of any other length."""
        number = self.as_u64()
        if number is None:
            raise ValueError(f"{self!r} is not a number: it has {len(self)} bytes, not {U64_BYTES}")
        return number

    def __repr__(self) -> str:
        name, number = type(self).__name__, self.as_u64()
        return f"{name}({self.hex()!r})" if number is None else f"{name}.from_u64({number})"

    __str__ = __repr__

    @property
    def shown(self) -> str:
        """As the command line prints it: a u64 as a number, other bytes in hex, the empty token as
        "none"."""
        number = self.as_u64()
        return (self.hex() or "none") if number is None else str(number)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The token that the command line prints as `text`: a number, or hex with an optional 0x;
        else ValueError."""
        if _NUMBER.fullmatch(text) and int(text) <= U64_MAX:
            return cls.from_u64(int(text))
        found = _HEX.fullmatch(text)
        if found is None or len(found[1]) > 2 * MAX_TOKEN_BYTES:
            raise ValueError(
                f"{text[:40]} is neither a number nor the hex of up to {MAX_TOKEN_BYTES} bytes"
            )
        return cls(bytes.fromhex(found[1]))


class VersionToken(_Token):
    """The version of an entry, as its source names it: up to 10 bytes, else ValueError.

    >>> VersionToken.from_u64(7).as_u64()
    7
    >>> VersionToken.unknown().is_unknown
    True
    """

    __slots__ = ()

    @classmethod
    def unknown(cls) -> VersionToken:
        """The empty token: the source names no version."""
        return _UNKNOWN

    @property
    def is_unknown(self) -> bool:
        """True for the empty token."""
        return not self


class WatchCursor(_Token):
    """A position in the stream of updates: up to 10 bytes, else ValueError.

    Wherever a cursor is accepted, a plain int means `from_u64` of it. `int(cursor)` converts back
    and is 0 for the none-cursor, so a stream numbered from 1 resumes after `int(store.cursor())`.

    >>> int(WatchCursor.from_u64(7)), int(WatchCursor.none())
    (7, 0)
    >>> bytes(WatchCursor.from_u64(258)).hex()
    '0000000000000102'
    >>> WatchCursor.none().is_none
    True
    """

    __slots__ = ()

    @classmethod
    def none(cls) -> WatchCursor:
        """The empty cursor: nothing has been applied yet."""
        return _NONE

    @classmethod
    def from_version(cls, version: VersionToken) -> WatchCursor:
        """The position right after the update that carries `version`."""
        if not isinstance(version, VersionToken):
            raise TypeError(
                f"WatchCursor.from_version takes a VersionToken, not {type(version).__name__}"
            )
        return cls(version)

    def __int__(self) -> int:
        """The number of an 8-byte cursor, and 0 for the none-cursor; ValueError for any other."""
        return super().__int__() if self else 0

    @property
    def is_none(self) -> bool:
        """True for the empty cursor."""
        return not self


_UNKNOWN = VersionToken()
_NONE = WatchCursor()

CursorLike: TypeAlias = WatchCursor | int
"""A cursor, or the number of one."""


def as_cursor(cursor: object) -> WatchCursor:
    """`cursor` as a WatchCursor; an int is converted. TypeError or ValueError for anything else."""
    if type(cursor) is WatchCursor:
        return cursor
    if type(cursor) is int:
        return WatchCursor.from_u64(cursor)
    raise TypeError(f"a cursor is a WatchCursor or an int, not {type(cursor).__name__}")


def has_reached(at: WatchCursor, wanted: WatchCursor) -> bool:
    """True if the position `at` is `wanted` or later.

    Cursors of equal length are compared as bytes, which is the order of u64 tokens and of
    versionstamps. Cursors of different lengths have no order, except that every position has
    reached the none-cursor.
    """
    return wanted.is_none or (len(at) == len(wanted) and bytes(at) >= bytes(wanted))
