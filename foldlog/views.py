"""Views: a store, follower or snapshot as a mapping of typed values, in key order.

A value is decoded when first read and cached while the entry keeps its bytes, so each change is
decoded once, however often it is read. The cache needs no invalidation: each read looks the entry
up, and uses the cached value only if it was decoded from the entry's current bytes.

All readers of a view share the decoded values. So prefer immutable ones (frozen structs, tuples):
mutating a decoded dict changes what the others read, until the entry changes, and does not change
the store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import (
    Callable,
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    ValuesView,
)
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, Literal, TypeAlias, TypeVar, overload

from foldlog.actors.feeds.subscription import Since
from foldlog.actors.feeds.watch import Watch
from foldlog.codecs import Codec, codec_of
from foldlog.protocol.closing import Closing
from foldlog.protocol.errors import (
    DecodeError,
    EncodeError,
    KeyOutsideView,
    StoreClosed,
    VersionMismatch,
)
from foldlog.protocol.events import Changed, Event, Lagged, Rewound, Synced
from foldlog.protocol.tokens import VersionToken, WatchCursor
from foldlog.protocol.updates import KvEntry, Put
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.readable import Publisher, Reads
from foldlog.store import Store
from foldlog.watched import Watched

T = TypeVar("T")
_SWEEP_FROM = 256
"""Cached values allowed before the view starts to check whether their entries are still live."""


@dataclass(frozen=True, slots=True)
class Decoded(Generic[T]):
    """A key was set to this value. Before the first `Synced`: an entry of the state."""

    key: str
    value: T
    version: VersionToken
    cursor: WatchCursor
    seq: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A key was removed."""

    key: str
    version: VersionToken
    cursor: WatchCursor
    seq: int


@dataclass(frozen=True, slots=True)
class Undecodable:
    """A key was set to a value that the codec cannot decode. The watch continues."""

    key: str
    error: DecodeError
    cursor: WatchCursor
    seq: int


ViewEvent: TypeAlias = Decoded[T] | Removed | Undecodable | Synced | Lagged | Rewound


class _Values(Generic[T]):
    """The decoded values by key, with the bytes they were decoded from."""

    def __init__(
        self, codec: Codec[T], inherited: dict[str, tuple[bytes, T]] | None = None
    ) -> None:
        self.codec = codec
        self.by_key: dict[str, tuple[bytes, T]] = {}
        self._inherited = inherited or {}
        """For a view's snapshot: the values that the view had decoded."""
        # Every key in `by_key`, once. Each new key triggers a check of two, so that values of
        # removed keys do not pile up.
        self._sweep: deque[str] = deque()

    def decode(self, entry: KvEntry, fold: FoldSnapshot, *, keep: bool = True) -> T:
        """The value of `entry`, which was never decoded or has changed since."""
        key, raw = entry.key, entry.value
        known = self.by_key.get(key) or self._inherited.get(key)
        if known is not None and known[0] == raw:
            value = known[1]
        else:
            try:
                value = self.codec.decode(raw)
            except Exception as error:
                if _is_no_verdict(error, self.codec.decode, raw):
                    raise
                raise DecodeError(key, entry.version, error) from error
        if keep:
            is_new = key not in self.by_key
            self.by_key[key] = raw, value
            if is_new:
                self._sweep.append(key)
                if len(self.by_key) > _SWEEP_FROM:
                    self._sweep_two(fold)
        return value

    def _sweep_two(self, fold: FoldSnapshot) -> None:
        for _ in range(2):
            try:
                key = self._sweep.popleft()
            except IndexError:
                return  # another thread is checking the rest
            if key in fold:
                self._sweep.append(key)
            else:
                self.by_key.pop(key, None)


def _is_no_verdict(error: Exception, call: Callable[[Any], object], value: object) -> bool:
    """True if a codec's error says nothing of the value: memory had run out, or a signal handler
    raised it, since another attempt succeeds."""
    if isinstance(error, MemoryError):
        return True
    try:
        call(value)
    except Exception:
        return False
    return True


def values_of(codec: Any) -> _Values[Any]:
    """No values yet, to be decoded by `codec`: see `view`."""
    return _Values(codec_of(codec))


class _Pinned:
    """Publishes one snapshot that never changes."""

    def __init__(self, snapshot: FoldSnapshot) -> None:
        self.snapshot = snapshot


class View(Mapping[str, T]):
    """A mapping of the typed values under a prefix, in key order. Any thread may read it.

    Keys are the store's keys, prefix included. Iterators, `items()` and `values()` read the state
    at the time of the call.
    """

    __slots__ = ("_known", "_length", "_published", "_source", "_values", "prefix")

    def __init__(
        self,
        source: Reads | FoldSnapshot,
        published: Publisher | _Pinned,
        values: _Values[T],
        prefix: str,
    ) -> None:
        """Not for callers: use `foldlog.view`."""
        self._source = source  # keeps the store alive
        self._published = published
        self._values, self._known = values, values.by_key
        self._length: tuple[FoldSnapshot, int] | None = None
        self.prefix = prefix
        """The prefix of all keys in the view."""

    def __getitem__(self, key: str) -> T:
        """The value of `key`. KeyError if it is absent, DecodeError if it cannot be decoded. Cost,
        if already decoded: 0.3 us, a `get` and a lookup.
        """
        try:
            raw, value = self._known[key]
        except (KeyError, TypeError):
            self._check_key(key)
        else:  # cached, so the key is under the prefix
            entry = self._published.snapshot.get(key)
            if entry is not None and entry.value is raw:
                return value
        fold = self._fold()
        entry = fold.get(key)
        if entry is None:
            raise KeyError(key)
        return self._values.decode(entry, fold)

    def __contains__(self, key: object) -> bool:
        """True if `key` is live and under the prefix, whether or not its value can be decoded."""
        return (
            isinstance(key, str)
            and key.startswith(self.prefix)
            and self._published.snapshot.get(key) is not None
        )

    def __iter__(self) -> Iterator[str]:
        return self._published.snapshot.keys(self.prefix)

    def __reversed__(self) -> Iterator[str]:
        fold = self._published.snapshot
        return (entry.key for entry in fold.iter_range(self.prefix, reverse=True))

    def __len__(self) -> int:
        """The number of live keys under the prefix. Cost, with a prefix: one range over them per
        state."""
        fold = self._fold()
        if not self.prefix:
            return len(fold)
        length = self._length
        if length is None or length[0] is not fold:
            count = sum(map(len, fold.blocks(self.prefix)))
            length = self._length = fold, count
        return length[1]

    def keys(self) -> KeysView[str]:
        """The keys, ascending."""
        return KeysView(self.snapshot())

    def items(self) -> ItemsView[str, T]:
        """(key, value) pairs, ascending by key. After a DecodeError, the iterator can go on with
        the next pair."""
        return _Items(self.snapshot())

    def values(self) -> ValuesView[T]:
        """The values in key order. After a DecodeError, the iterator can go on with the next
        value."""
        return _ValuesInOrder(self.snapshot())

    def snapshot(self) -> View[T]:
        """A view of the current state, which never changes."""
        fold = self._fold()
        return View(
            fold, _Pinned(fold), _Values(self._values.codec, self._values.by_key), self.prefix
        )

    @property
    def source(self) -> Reads | FoldSnapshot:
        """The store, follower or snapshot behind this view."""
        return self._source

    @property
    def fold(self) -> FoldSnapshot:
        """The current snapshot."""
        return self._fold()

    def watch(self, since: Since = None) -> ViewWatch[T]:
        """`Store.watch` with decoded changes: the state, one `Synced`, then changes as they
        arrive."""
        if not isinstance(self._source, Watched):
            raise TypeError(f"a {type(self._source).__name__} cannot be watched")
        return ViewWatch(self._source.watch(self.prefix, since), self)

    def _pairs(self) -> Iterator[tuple[str, T]]:
        """By `map`, because a generator ends at the first error."""
        fold, decode = self._fold(), self._values.decode

        def pair(entry: KvEntry) -> tuple[str, T]:
            return entry.key, decode(entry, fold)

        return map(pair, fold.iter_range(self.prefix))

    def _decoded(self, event: Event | None) -> ViewEvent[T] | None:
        """The event of a decoding watch for one of the store's."""
        if not isinstance(event, Changed):
            return event  # type: ignore[return-value]
        update = event.update
        if not isinstance(update, Put):
            return Removed(update.key, update.version, event.cursor, event.seq)
        entry = KvEntry(*update)
        try:
            fold = self._fold()
            now = fold.get(update.key)
        except StoreClosed:  # what was buffered at the close is still delivered
            fold, now = FoldSnapshot.empty(), None
        is_newest = now is not None and now.value == update.value
        try:
            value = self._values.decode(entry, fold, keep=is_newest)
        except DecodeError as error:
            return Undecodable(update.key, error, event.cursor, event.seq)
        return Decoded(update.key, value, update.version, event.cursor, event.seq)

    def _fold(self) -> FoldSnapshot:
        # Raises StoreClosed; wakes a follower after a fork.
        self._published.snapshot.seq  # noqa: B018
        return self._published.snapshot  # type: ignore[return-value]

    def _encoded(self, key: str, value: T) -> bytes:
        self._check_key(key)
        encode = self._values.codec.encode
        try:
            raw = encode(value)
        except Exception as error:
            if _is_no_verdict(error, encode, value):
                raise
            raise EncodeError(key, error) from error
        if not isinstance(raw, bytes):
            error = TypeError(f"the codec made {type(raw).__name__}, not bytes")
            raise EncodeError(key, error) from error
        return raw

    def _check_key(self, key: object) -> None:
        if not isinstance(key, str):
            raise TypeError(f"a key is a str, not {type(key).__name__}")
        if not key.startswith(self.prefix):
            raise KeyOutsideView(key, self.prefix)

    def __repr__(self) -> str:
        return f"<foldlog.{type(self).__name__} of {self._source!r} under {self.prefix!r}>"


class MutableView(View[T], MutableMapping[str, T]):
    """A writable view of a store. Each assignment is a `put`, as durable as any other."""

    __slots__ = ()
    _source: Store

    def __setitem__(self, key: str, value: T) -> None:
        """`put` the encoded value. EncodeError if the codec raises; then nothing is stored."""
        self._source.put(key, self._encoded(key, value))

    def __delitem__(self, key: str) -> None:
        """Remove `key`; KeyError if it is absent."""
        self._check_key(key)
        while (entry := self._source.get(key)) is not None:
            try:
                self._source.delete(key, expected=entry.version)
                return
            except VersionMismatch:
                continue  # someone wrote it meanwhile
        raise KeyError(key)


class _Items(ItemsView[str, T]):
    _mapping: View[T]

    def __iter__(self) -> Iterator[tuple[str, T]]:
        return self._mapping._pairs()


class _ValuesInOrder(ValuesView[T]):
    _mapping: View[T]

    def __iter__(self) -> Iterator[T]:
        return map(itemgetter(1), self._mapping._pairs())


class ViewWatch(Closing, Iterator[ViewEvent[T]]):
    """A `Watch` whose changes are decoded."""

    def __init__(self, watch: Watch, view: View[T]) -> None:
        """Not for callers: use `view.watch`."""
        self._watch, self._view = watch, view

    @property
    def ended(self) -> str | None:
        """Why the watch ended; None while it goes on."""
        return self._watch.ended

    def __next__(self) -> ViewEvent[T]:
        event = self.next()
        if event is None:
            raise StopIteration
        return event

    def next(self, timeout_s: float | None = None) -> ViewEvent[T] | None:
        """The next event; None if none comes within `timeout_s`, or the watch has ended (see
        `ended`)."""
        event = self._watch.offer(timeout_s)
        decoded = self._view._decoded(event)
        if event is not None:
            self._watch.accept()  # now: what interrupts the codec loses no event
        return decoded

    def close(self) -> None:
        """Stop watching. Any thread may call it."""
        self._watch.close()


@overload
def view(store: Store, codec: Literal["raw"], prefix: str = "") -> MutableView[bytes]: ...
@overload
def view(
    store: Store, codec: Literal["json", "msgpack", "pickle"], prefix: str = ""
) -> MutableView[Any]: ...
@overload
def view(store: Store, codec: Codec[T], prefix: str = "") -> MutableView[T]: ...
@overload
def view(store: Store, codec: type[T], prefix: str = "") -> MutableView[T]: ...
@overload
def view(store: Reads | FoldSnapshot, codec: Literal["raw"], prefix: str = "") -> View[bytes]: ...
@overload
def view(
    store: Reads | FoldSnapshot, codec: Literal["json", "msgpack", "pickle"], prefix: str = ""
) -> View[Any]: ...
@overload
def view(store: Reads | FoldSnapshot, codec: Codec[T], prefix: str = "") -> View[T]: ...
@overload
def view(store: Reads | FoldSnapshot, codec: type[T], prefix: str = "") -> View[T]: ...
def view(store: Reads | FoldSnapshot, codec: Any, prefix: str = "") -> View[Any]:
    """The entries of `store` under `prefix` as a mapping of decoded values; writable if `store` is
    a Store.

    `codec`: "json", "msgpack", "raw" or "pickle" (unsafe: anyone who can write the log can run code
    in its readers); a msgspec struct or pydantic model class, stored as JSON; or any object with
    `encode` and `decode`. A changed entry is decoded once, when first read, and all readers share
    the result: prefer immutable values.

    A value that cannot be decoded raises DecodeError for its key only.

    >>> with foldlog.open("flags.log") as store:
    ...     flags = foldlog.view(store, "json", "flags/")
    ...     flags["flags/beta"] = {"percent": 5}
    ...     flags["flags/beta"]["percent"], list(flags), "flags/dark" in flags
    (5, ['flags/beta'], False)
    """
    if not isinstance(prefix, str):
        raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
    values = values_of(codec)
    if isinstance(store, Store):
        return MutableView(store, store._published, values, prefix)
    if isinstance(store, Reads):
        return View(store, store._published, values, prefix)
    if hasattr(store, "iter_range") and hasattr(store, "seq"):  # a snapshot, of either engine
        return View(store, _Pinned(store), values, prefix)
    raise TypeError(
        f"a view is of a store, a follower or a snapshot, not of a {type(store).__name__}"
    )
