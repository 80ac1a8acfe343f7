"""Codecs convert between values and bytes.

A view takes a name ("json", "msgpack", "raw" or "pickle"), a msgspec struct or pydantic model class
(stored as JSON), or any object with `encode` and `decode`.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

import msgpack

T = TypeVar("T")


class Codec(Protocol[T]):
    """An object with these two methods. Either may raise any Exception: views wrap it in
    EncodeError or DecodeError."""

    def encode(self, value: T, /) -> bytes:
        """`value` as bytes."""

    def decode(self, raw: bytes, /) -> T:
        """The value encoded in `raw`. Must depend only on `raw`: views call it once for each
        changed value."""


class FromFunctions:
    """A codec made of two functions."""

    def __init__(self, encode: Callable[[Any], bytes], decode: Callable[[bytes], Any]) -> None:
        self.encode, self.decode = encode, decode


def _to_json(value: Any) -> bytes:
    """JSON as defined by RFC 8259: UTF-8, no NaN, no infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def _from_json(raw: bytes) -> Any:
    return json.loads(raw, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _checked_bytes(value: object) -> bytes:
    if type(value) is not bytes:
        raise TypeError(f"a raw value is bytes, not {type(value).__name__}")
    return value


_BY_NAME: dict[str, Codec[Any]] = {
    "json": FromFunctions(_to_json, _from_json),
    # Keeps text and bytes distinct.
    "msgpack": FromFunctions(msgpack.packb, partial(msgpack.unpackb, strict_map_key=False)),
    "raw": FromFunctions(_checked_bytes, bytes),
    # Only if named explicitly: anyone who can write the log can run code in its readers.
    "pickle": FromFunctions(partial(pickle.dumps, protocol=5), pickle.loads),
}


def codec_of(codec: object) -> Codec[Any]:
    """The codec that `codec` is, names or implies. TypeError or ValueError if there is none."""
    if isinstance(codec, str):
        if codec not in _BY_NAME:
            names = ", ".join(map(repr, _BY_NAME))
            raise ValueError(f"a codec is one of {names}, a class or an object, not {codec!r}")
        return _BY_NAME[codec]
    if isinstance(codec, type):
        made = _of_struct(codec) or _of_model(codec)
        if made is not None:
            return made
    if callable(getattr(codec, "encode", None)) and callable(getattr(codec, "decode", None)):
        return codec  # type: ignore[return-value]
    raise TypeError(
        "a codec is a name, a msgspec.Struct, a pydantic.BaseModel, or has encode and decode; "
        f"{codec!r} is none of these"
    )


def _of_struct(kind: type) -> Codec[Any] | None:
    msgspec = sys.modules.get("msgspec")  # imported, if `kind` is one of its classes
    if msgspec is None or not issubclass(kind, msgspec.Struct):
        return None
    from msgspec.json import Decoder, Encoder

    return FromFunctions(Encoder().encode, Decoder(kind).decode)


def _of_model(kind: type) -> Codec[Any] | None:
    pydantic = sys.modules.get("pydantic")
    if pydantic is None or not issubclass(kind, pydantic.BaseModel):
        return None
    adapter: Any = pydantic.TypeAdapter(kind)
    return FromFunctions(adapter.dump_json, adapter.validate_json)
