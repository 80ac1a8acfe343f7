"""Codecs: how values become bytes, and bytes values.

A view names one: "json", "msgpack", "raw" or "pickle"; a class of msgspec structs or pydantic models, whose values are then
JSON; or anything with `encode` and `decode`.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from typing import Any, Literal, NoReturn, Protocol, TypeAlias, TypeVar

import msgpack

T = TypeVar("T")
CodecName: TypeAlias = Literal["json", "msgpack", "raw", "pickle"]


class Codec(Protocol[T]):
    """Anything with these two. Each may raise whatever it likes: a view tells it as EncodeError or DecodeError."""

    def encode(self, value: T, /) -> bytes:
        """The bytes that stand for `value`."""

    def decode(self, raw: bytes, /) -> T:
        """The value that `raw` stands for. Must depend on `raw` alone: it is called once for each value that changed."""


class Json:
    """JSON as RFC 8259 has it: UTF-8, no NaN, no infinities."""

    def encode(self, value: Any, /) -> bytes:
        """TypeError or ValueError for what JSON cannot say."""
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()

    def decode(self, raw: bytes, /) -> Any:
        """ValueError for what is not JSON."""
        return json.loads(raw, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Msgpack:
    """MessagePack, with text and bytes apart."""

    def encode(self, value: Any, /) -> bytes:
        """TypeError or ValueError for what MessagePack cannot say."""
        packed: bytes = msgpack.packb(value)
        return packed

    def decode(self, raw: bytes, /) -> Any:
        """An error of msgpack's for what is not MessagePack."""
        return msgpack.unpackb(raw, strict_map_key=False)


class Raw:
    """The bytes themselves."""

    def encode(self, value: bytes, /) -> bytes:
        """TypeError unless `value` is bytes."""
        if type(value) is not bytes:
            raise TypeError(f"a raw value is bytes, not {type(value).__name__}")
        return value

    def decode(self, raw: bytes, /) -> bytes:
        """`raw`."""
        return raw


class Pickle:
    """Pickle, for those who ask for it by name: whoever can write the log can run code in its readers."""

    def encode(self, value: Any, /) -> bytes:
        """An error of pickle's for what it does not take."""
        return pickle.dumps(value, protocol=5)

    def decode(self, raw: bytes, /) -> Any:
        """Whatever `raw` says, including running code."""
        return pickle.loads(raw)


class FromFunctions:
    """A codec made of two functions."""

    def __init__(self, encode: Callable[[Any], bytes], decode: Callable[[bytes], Any]) -> None:
        self.encode, self.decode = encode, decode


_BY_NAME: dict[str, type[Codec[Any]]] = {
    "json": Json,
    "msgpack": Msgpack,
    "raw": Raw,
    "pickle": Pickle,
}


def codec_of(codec: object) -> Codec[Any]:
    """The codec that `codec` is or names. TypeError or ValueError if there is none."""
    if isinstance(codec, str):
        if codec not in _BY_NAME:
            names = ", ".join(map(repr, _BY_NAME))
            raise ValueError(f"a codec is one of {names}, a class or an object, not {codec!r}")
        return _BY_NAME[codec]()
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
    msgspec = sys.modules.get("msgspec")  # whoever has such a class has imported it
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
