"""The verdict of a decoder: these bytes are what no writer makes, whatever their checksum says.

Only this verdict is evidence of damage. What else comes up while bytes are decoded (a MemoryError,
an OSError, an interrupt, an exception that a signal handler raises) says something of the process
or the machine and nothing of the bytes, so whoever calls a decoder catches `Undecodable` and lets
everything else pass.
"""

from __future__ import annotations

from typing import Any, NoReturn

import msgpack

MAX_MAP_BYTES = 4096
"""A body that is a map, of an OPEN or a BASE_END frame. Writers need less than 200 bytes."""
_MAX_MAP_ENTRIES = 8

MSGPACK_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, msgpack.UnpackException)
"""What msgpack raises for bytes that it cannot unpack."""


class Undecodable(ValueError):
    """Bytes do not say what their place requires."""


def refuse_nested(*_inner: Any) -> NoReturn:
    """A hook for msgpack, where a plain value must stand: the first array, map or extension in its
    place is refused."""
    raise Undecodable("an array, a map or an extension where a plain value belongs")


def unpack_map(body: bytes | memoryview) -> dict[str, Any]:
    """The map of up to 8 plain values in `body`. Undecodable for anything else."""
    if len(body) > MAX_MAP_BYTES:
        raise Undecodable(f"{len(body)} bytes, over the limit of {MAX_MAP_BYTES}")
    try:
        fields = msgpack.unpackb(
            body,
            max_map_len=_MAX_MAP_ENTRIES,
            max_array_len=0,
            list_hook=refuse_nested,
            ext_hook=refuse_nested,
        )
    except Undecodable:
        raise
    except MSGPACK_ERRORS as error:
        raise Undecodable(f"{type(error).__name__}: {error}") from None
    if type(fields) is not dict:
        raise Undecodable("not a map")
    return fields
