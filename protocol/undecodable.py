"""The verdict of a decoder: no writer produces these bytes, whatever their checksum says.

Only this verdict is evidence of damage. Any other error during decoding (a MemoryError, an OSError,
an interrupt, an exception raised by a signal handler) is about the process or the machine, not
about the bytes. So callers of a decoder catch `Undecodable` and let everything else through.
"""

from __future__ import annotations

from typing import Any, NoReturn

import msgpack

MAX_MAP_BYTES = 4096
"""The longest body of an OPEN or BASE_END frame, which is a map. Writers need less than 200
bytes."""
_MAX_MAP_ENTRIES = 8

MSGPACK_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, msgpack.UnpackException)
"""What msgpack raises for bytes that it cannot unpack."""


class Undecodable(ValueError):
    """The bytes are not a valid encoding of what belongs here."""


def refuse_nested(*_inner: Any) -> NoReturn:
    """A msgpack hook for places that allow only plain values: refuses the first array, map or
    extension."""
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
