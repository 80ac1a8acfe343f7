"""Updates, entries, and one batch in its encoded form.

A batch is encoded once: the caller's thread checks and packs it (`encode_batch`), the writer puts
it into a frame, and replay unpacks it (`decoding.py`). The encoding is columnar, so one
`msgpack` call handles a whole batch:

    BATCHES body := msgpack [item, ...]
    item         := [cursor, [key, ...], [value, ...], [version, ...]]
    value        := bytes | nil = delete | false = purge
                    plus a fifth element if the cursor's upstream is known: its origin
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from operator import itemgetter
from types import NoneType
from typing import Any, NamedTuple, NoReturn, TypeAlias, overload

import msgpack

from foldlog.protocol.tokens import (
    MAX_ORIGIN_BYTES,
    MAX_TOKEN_BYTES,
    CursorLike,
    VersionToken,
    WatchCursor,
    as_cursor,
)

MAX_KEY_BYTES = 65_535
MAX_VALUE_BYTES = 16 * 1024 * 1024
MAX_BODY_BYTES = 1024 * 1024 * 1024
MAX_GROUP = 65_535
"""The most batches in one frame: the header counts them in 16 bits."""
MAX_ITEM_BYTES = MAX_BODY_BYTES - 5
"""The longest encoded batch: leaves room for the array header of a body that holds only this
batch."""
SLICE = 8192
"""Updates that one C call packs or collects. A longer call would hold the interpreter lock for over
a millisecond."""

SAFE_KEY_CHARS = MAX_KEY_BYTES // 4  # a key of so few characters cannot be too long in UTF-8
_SMALL_BATCH = 2048
"""The most updates that one call packs with a packer that is kept: a new one clears its buffer,
which takes as long as packing 1,000 updates."""
_ZIP_BATCH = 256  # up to here `zip` splits updates into columns in the least time
_MAX_KEPT_BYTES = 1024 * 1024
"""A packer never shrinks its buffer; one that has grown beyond this is discarded."""
_ITEM_BYTES = 32
"""About what an encoded batch of one takes besides key and value."""
_ITEM_WITH_ORIGIN = 0x95  # msgpack: an array of five


class _Write(NamedTuple):
    key: str
    value: bytes
    version: VersionToken = VersionToken.unknown()


class _Removal(NamedTuple):
    key: str
    version: VersionToken = VersionToken.unknown()


class KvEntry(_Write):
    """A live entry as readers get it. Unpacks and compares as the tuple (key, value, version).

    It holds the version as plain bytes and creates the `VersionToken` on access: the garbage
    collector tracks instances of classes but not plain bytes, and a range may return a million
    entries.
    """

    __slots__ = ()

    @property
    def version(self) -> VersionToken:
        """The version given by the source."""
        return VersionToken(tuple.__getitem__(self, 2))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.key, self.value, self.version))

    def __getitem__(self, index: Any) -> Any:
        return (self.key, self.value, self.version)[index]

    def __repr__(self) -> str:
        return f"KvEntry(key={self.key!r}, value={self.value!r}, version={self.version!r})"


class _ByKind(tuple[Any, ...]):
    """Equal only to its own kind: a Delete never equals a Purge, though both are (key, version)."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


class Put(_ByKind, _Write):
    """Set `key` (up to 65,535 bytes of UTF-8) to `value` (up to 16 MiB). Both may be empty."""

    __slots__ = ()


class Delete(_ByKind, _Removal):
    """Remove `key`."""

    __slots__ = ()


class Purge(_ByKind, _Removal):
    """Remove `key` and its history, for sources that keep one. Folds like a delete.

    >>> Purge("a") == Delete("a"), Purge("a").version.is_unknown
    (False, True)
    """

    __slots__ = ()


Update: TypeAlias = Put | Delete | Purge


class UpdateColumns(Sequence[Update]):
    """Updates in three columns of equal length. Each update is made when it is read.

    The garbage collector tracks three lists, rather than a tuple for each update.
    """

    __slots__ = ("keys", "values", "versions")

    def __init__(
        self, keys: list[str], values: list[bytes | bool | None], versions: list[bytes]
    ) -> None:
        """`values`: None for a delete, False for a purge. `versions`: tokens as plain bytes."""
        self.keys, self.values, self.versions = keys, values, versions

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Update]:
        return iter(_updates(self.keys, self.values, self.versions))

    @overload
    def __getitem__(self, index: int) -> Update: ...
    @overload
    def __getitem__(self, index: slice) -> UpdateColumns: ...
    def __getitem__(self, index: int | slice) -> Update | UpdateColumns:
        if isinstance(index, slice):
            return UpdateColumns(self.keys[index], self.values[index], self.versions[index])
        (one,) = _updates([self.keys[index]], [self.values[index]], [self.versions[index]])
        return one

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})"

    def extend(self, more: UpdateColumns) -> None:
        """Add the updates of `more` after these."""
        self.keys += more.keys
        self.values += more.values
        self.versions += more.versions

    def under(self, prefixes: tuple[str, ...]) -> UpdateColumns:
        """Those whose key starts with one of `prefixes`."""
        kept = [key.startswith(prefixes) for key in self.keys]
        if all(kept):
            return self
        keys, values = list(compress(self.keys, kept)), list(compress(self.values, kept))
        return UpdateColumns(keys, values, list(compress(self.versions, kept)))

    @property
    def removes(self) -> bool:
        """True if any of them is a delete or a purge."""
        return not set(map(type, self.values)) <= {bytes}

    def are_sound(self) -> bool:
        """True if all may be held, but perhaps for their UTF-8."""
        keys, versions = self.keys, self.versions
        kinds = set(map(type, self.values))
        removed = kinds & {NoneType, bool}
        values = [v for v in self.values if v.__class__ is bytes] if removed else self.values
        return (
            kinds <= {bytes, NoneType, bool}
            and (bool not in kinds or True not in self.values)
            and max(map(len, values), default=0) <= MAX_VALUE_BYTES  # type: ignore[arg-type]
            and set(map(type, keys)) == {str}
            and max(map(len, keys)) <= SAFE_KEY_CHARS
            and set(map(type, versions)) == {bytes}
            and max(map(len, versions)) <= MAX_TOKEN_BYTES
            and len(keys) == len(self.values) == len(versions)
        )


def keys_of(updates: Sequence[Update]) -> Sequence[str]:
    """The key of each update."""
    return updates.keys if type(updates) is UpdateColumns else [update.key for update in updates]


def fold_versions(
    versions: dict[str, bytes],
    updates: Sequence[Update],
    mark: Callable[[bytes, object], bytes] | None = None,
) -> None:
    """Make `versions`, by key, those of the entries after `updates`; of each, what `mark` makes of
    its version and value."""
    if type(updates) is UpdateColumns and not updates.removes:
        new = updates.versions if mark is None else map(mark, updates.versions, updates.values)
        versions.update(zip(updates.keys, new, strict=True))
        return
    for update in updates:
        if not isinstance(update, Put):
            versions.pop(update.key, None)
        elif mark is None:
            versions[update.key] = bytes(update.version)
        else:
            versions[update.key] = mark(update.version, update.value)


def _updates(
    keys: Sequence[str], values: Sequence[bytes | bool | None], versions: Sequence[bytes]
) -> list[Update]:
    return [
        Delete(key, version)
        if value is None
        else Purge(key, version)
        if value is False
        else Put(key, value, version)  # type: ignore[arg-type]
        for key, value, version in zip(keys, values, map(VersionToken, versions), strict=True)
    ]


Change: TypeAlias = tuple[str, bytes | None, bytes]
"""What a fold keeps of an update: (key, value, version). The value None marks a removed key.

A plain tuple of plain values, because the garbage collector stops tracking those. Replaying
1,000,000 updates into tracked objects took 10 s instead of 1 s, nearly all of it in full
collections.
"""


class Batch(NamedTuple):
    """The updates of one `apply`, checked and encoded."""

    cursor: WatchCursor
    item: bytes
    """The batch as an item of a BATCHES body."""
    changes: tuple[dict[str, Change], ...]
    """The last change of each key. Batches of more than `SLICE` updates use several dicts, oldest
    first."""
    length: int
    """Updates in the batch."""
    origin: bytes = b""
    """The identity of the upstream that the cursor belongs to; empty if unknown."""


class DecodedBatch(NamedTuple):
    """A batch as it was read from a log."""

    cursor: WatchCursor
    keys: list[str]
    values: list[bytes | bool | None]
    versions: list[bytes]
    origin: bytes = b""
    """See `Batch.origin`."""

    def updates(self) -> list[Update]:
        """The updates, in upstream order."""
        return _updates(self.keys, self.values, self.versions)

    def changes(self) -> tuple[dict[str, Change], ...]:
        """The last change of each key; see `Batch.changes`."""
        return _changes(self.keys, self.values, self.versions)

    def change_into(self, state: dict[str, Change]) -> None:
        """Put the changes of at most `SLICE` updates into `state`. Cost: half of `changes` and an
        update."""
        keys, values = self.keys, self.values
        if bool in set(map(type, values)):
            values = [None if value is False else value for value in values]
        state.update(zip(keys, zip(keys, values, self.versions)))  # type: ignore[arg-type]


class DecodedPuts(DecodedBatch):
    """A batch that is known to hold nothing but puts: most do."""

    __slots__ = ()

    def change_into(self, state: dict[str, Change]) -> None:
        _, keys, values, versions, _ = self
        state.update(zip(keys, zip(keys, values, versions)))  # type: ignore[arg-type]


class _Packers(threading.local):
    # Taken out during packing and put back only on success: if a MemoryError or an interrupt stops
    # it half-way, the buffer with the partly packed batch is dropped.
    packer: msgpack.Packer | None = None


_packers = _Packers()
_new = tuple.__new__  # a NamedTuple in half the time
_FIELDS = tuple(map(itemgetter, range(3)))
_plain = itemgetter(slice(None))  # `bytes` of a token, in a third of the time


def check_origin(origin: object) -> None:
    """Raise TypeError or ValueError unless `origin` is up to 32 bytes."""
    if type(origin) is not bytes:
        raise TypeError(f"an origin is bytes, not {type(origin).__name__}")
    if len(origin) > MAX_ORIGIN_BYTES:
        raise ValueError(f"an origin takes at most {MAX_ORIGIN_BYTES} bytes, got {len(origin)}")


def checked_weight(update: Update) -> int:
    """About the bytes that `update` takes, encoded in a batch of its own. TypeError or ValueError
    if it is invalid."""
    key = _check(0, update)
    return len(key) + (len(update.value) if type(update) is Put else 0) + _ITEM_BYTES


def has_origin(item: bytes) -> bool:
    """True if an encoded batch names the upstream of its cursor."""
    return item[0] == _ITEM_WITH_ORIGIN


def encode_batch(updates: Iterable[Update], cursor: CursorLike, origin: bytes = b"") -> Batch:
    """Check and encode one batch, on the caller's thread. `origin`: see `Batch.origin`.

    TypeError or ValueError names the first invalid update. Cost: about 0.3 us an update plus 1 us a
    batch.
    """
    if type(cursor) is not WatchCursor:
        cursor = as_cursor(cursor)
    if origin:
        check_origin(origin)
    updates = tuple(updates) if type(updates) is list else _in_order(updates)
    if len(updates) == 1 and type(only := updates[0]) is Put:
        key, value, version = only
        if (
            type(key) is str
            and type(value) is bytes
            and type(version) is VersionToken
            and len(key) <= SAFE_KEY_CHARS
            and len(value) <= MAX_VALUE_BYTES
        ):
            return _batch_of_one(cursor, key, value, version, origin)
    if not updates:
        item = _with_origin(msgpack.packb([cursor, [], [], []]), origin)
        return Batch(cursor, item, (), 0, origin)
    keys, values, versions = _columns(updates)
    try:
        if len(keys) <= _SMALL_BATCH:
            item = _packed((cursor, keys, values, versions))
        else:
            item = _pack_columns(cursor, keys, values, versions)
    except UnicodeEncodeError:
        _explain(updates)
        raise
    if origin:
        item = _with_origin(item, origin)
    if len(item) > MAX_ITEM_BYTES:
        raise ValueError(
            f"the batch takes {len(item)} bytes encoded, over the limit of {MAX_ITEM_BYTES}"
        )
    if type(updates) is not UpdateColumns:
        versions = list(map(_plain, versions))
    changes = _changes(keys, values, versions)
    return _new(Batch, (cursor, item, changes, len(keys), origin))


def _batch_of_one(
    cursor: WatchCursor, key: str, value: bytes, version: VersionToken, origin: bytes
) -> Batch:
    """The batch of one Put, checked but for its key's UTF-8: in half the time of the general
    way."""
    packer, _packers.packer = _packers.packer or msgpack.Packer(), None
    try:
        item: bytes = packer.pack((cursor, (key,), (value,), (version,)))
    except UnicodeEncodeError:
        _check(0, Put(key, value, version))
        raise
    if len(item) <= _MAX_KEPT_BYTES:
        _packers.packer = packer
    if origin:
        item = _with_origin(item, origin)
    changes = ({key: (key, value, _plain(version))},)
    return _new(Batch, (cursor, item, changes, 1, origin))


def _with_origin(item: bytes, origin: bytes) -> bytes:
    """An item of four elements with the origin added as the fifth; unchanged if the origin is
    empty."""
    if not origin:
        return item
    return b"".join((bytes((_ITEM_WITH_ORIGIN,)), memoryview(item)[1:], msgpack.packb(origin)))


def _packed(item: tuple[Any, ...]) -> bytes:
    packer, _packers.packer = _packers.packer or msgpack.Packer(), None
    packed: bytes = packer.pack(item)
    if len(packed) <= _MAX_KEPT_BYTES:
        _packers.packer = packer
    return packed


def _in_order(updates: Iterable[Update]) -> Sequence[Update]:
    """The updates, in a sequence of our own: what is checked and what is encoded must be the same,
    and another thread may change the caller's."""
    if type(updates) is tuple:
        return updates
    if type(updates) is UpdateColumns:
        return updates[:]
    if isinstance(updates, (Put, Delete, Purge)) or not isinstance(updates, Iterable):
        raise TypeError(
            f"updates is an iterable of Put, Delete or Purge, not {type(updates).__name__}"
        )
    return tuple(updates)


class RawUpdates(NamedTuple):
    """The checked updates of one `apply` in columns, for an engine that keeps no log of its own."""

    keys: list[bytes]
    """In UTF-8, in upstream order; a key may occur more than once."""
    values: Sequence[bytes | bool | None]
    """None for a delete, False for a purge."""
    versions: Sequence[bytes]


def raw_updates(updates: Iterable[Update]) -> RawUpdates:
    """Check the updates of one batch. TypeError or ValueError names the first invalid one.

    Cost: 0.2 us an update.
    """
    updates = _in_order(updates)
    if not updates:
        return RawUpdates([], (), ())
    keys, values, versions = _columns(updates)
    try:
        return RawUpdates(list(map(str.encode, keys)), values, versions)
    except UnicodeEncodeError:
        _explain(updates)
        raise


def _columns(updates: Sequence[Update]) -> tuple[Sequence[str], Sequence[Any], Sequence[bytes]]:
    keys: Sequence[Any]
    values: Sequence[Any]
    versions: Sequence[Any]
    if type(updates) is UpdateColumns:
        keys, values, versions = updates.keys, updates.values, updates.versions
        if not updates.are_sound():
            _explain(updates)
            versions = list(map(_plain, versions))
        return keys, values, versions
    if len(updates) == 1 and type(updates[0]) is Put:  # the general path below takes 1.5 us longer
        key, value, version = updates[0]
        typed = type(key) is str and type(value) is bytes and type(version) is VersionToken
        if typed and len(key) <= SAFE_KEY_CHARS and len(value) <= MAX_VALUE_BYTES:
            return (key,), (value,), (version,)
        _explain(updates)
    if set(map(type, updates)) == {Put}:
        if len(updates) <= _ZIP_BATCH:
            keys, values, versions = zip(*updates, strict=True)
        else:
            keys, values, versions = (list(map(field, updates)) for field in _FIELDS)
        sound = set(map(type, values)) == {bytes} and max(map(len, values)) <= MAX_VALUE_BYTES
    else:
        keys, values, versions = [], [], []
        for index, update in enumerate(updates):
            kind = type(update)
            if kind is Put:
                keys.append(update[0])
                values.append(update[1])
                versions.append(update[2])  # type: ignore[misc]
            elif kind is Delete or kind is Purge:
                keys.append(update[0])
                values.append(None if kind is Delete else False)
                versions.append(update[1])
            else:
                raise TypeError(f"update {index} is a Put, Delete or Purge, not {kind.__name__}")
        puts = [update[1] for update in updates if type(update) is Put]
        sound = (
            set(map(type, puts)) <= {bytes} and max(map(len, puts), default=0) <= MAX_VALUE_BYTES
        )
    if not (
        sound
        and set(map(type, keys)) == {str}
        and max(map(len, keys)) <= SAFE_KEY_CHARS
        and set(map(type, versions)) == {VersionToken}
    ):
        _explain(updates)
    return keys, values, versions


def _explain(updates: Sequence[Update]) -> None:
    for index, update in enumerate(updates):
        _check(index, update)


def _check(index: int, update: Update) -> bytes:
    """The key in UTF-8. TypeError or ValueError if the update is invalid."""

    def fail(kind: type[Exception], what: str) -> NoReturn:
        raise kind(f"update {index}: {what}")

    if type(update.key) is not str:
        fail(TypeError, f"a key is a str, not {type(update.key).__name__}")
    key = f"key {update.key[:40]!r}"
    try:
        encoded = update.key.encode()
    except UnicodeEncodeError as error:
        fail(ValueError, f"{key} has a lone surrogate at character {error.start}")
    if len(encoded) > MAX_KEY_BYTES:
        fail(
            ValueError,
            f"{key}... takes {len(encoded)} bytes of UTF-8, over the limit of {MAX_KEY_BYTES}",
        )
    if type(update) is Put:
        if type(update.value) is not bytes:
            fail(TypeError, f"the value of {key} is bytes, not {type(update.value).__name__}")
        if len(update.value) > MAX_VALUE_BYTES:
            fail(
                ValueError,
                f"the value of {key} takes {len(update.value)} bytes, "
                f"over the limit of {MAX_VALUE_BYTES}",
            )
    if type(update.version) is not VersionToken:
        fail(
            TypeError,
            f"the version of {key} is a VersionToken, not {type(update.version).__name__}",
        )
    return encoded


def _pack_columns(cursor: bytes, *columns: Sequence[Any]) -> bytes:
    """[cursor, column, ...], packed in pieces so that no call holds the interpreter lock for
    long."""
    packer = msgpack.Packer()
    count = len(columns[0])
    parts = [packer.pack_array_header(1 + len(columns)), packer.pack(cursor)]
    for column in columns:
        parts.append(packer.pack_array_header(count))
        for start in range(0, count, SLICE):
            piece = column[start : start + SLICE]
            array_header = 1 if len(piece) < 16 else 3  # bytes
            parts.append(packer.pack(piece)[array_header:])
    return b"".join(parts)


def _changes(
    keys: Sequence[str], values: Sequence[Any], versions: Sequence[bytes]
) -> tuple[dict[str, Change], ...]:
    if len(keys) == 1:
        return ({keys[0]: (keys[0], values[0] if type(values[0]) is bytes else None, versions[0])},)
    if bool in set(map(type, values)):
        values = [None if value is False else value for value in values]
    if len(keys) <= SLICE:
        return (dict(zip(keys, zip(keys, values, versions))),) if keys else ()
    return tuple(
        dict(
            zip(
                keys[i : i + SLICE],
                zip(keys[i : i + SLICE], values[i : i + SLICE], versions[i : i + SLICE]),
            )
        )
        for i in range(0, len(keys), SLICE)
    )


def batches_body(items: Sequence[bytes]) -> bytes:
    """The body of a BATCHES frame that holds `items`, of which there is at least one."""
    count = len(items)
    if count == 1:
        return b"\x91" + items[0]
    header = bytes((0x90 | count,)) if count < 16 else msgpack.Packer().pack_array_header(count)
    return b"".join((header, *items))
