"""A leaf: the entries of one key range of the base, in key order, as the body of a LEAF frame.

    count u32 | index length u32 | keys length u32 | index crc u32         little-endian
    keys         FF key FF key FF ... FF    UTF-8, which never holds FF: separators need no escape
    value_ends   u32 * count                where each value ends in `values`
    value_crcs   u32 * count                CRC-32C of each value
    version_ends u16 * count                where each version ends in `versions`
    versions
    values                                  from `index length` on

The index (all before the values) is read when the leaf is first used, and kept with its keys
decoded: about 90 bytes an entry. A key is found by bisection, and its value is then read alone.
Both reads are checked, the index by its own checksum and the value by its entry in `value_crcs`, so
that nothing reaches a caller unverified, however long ago the log was opened. (Searching the
encoded keys with one `bytes.find` takes a third of the memory, and 2-3 us more for each first
read.)

Where a leaf ends depends on the keys and values alone (`leaf_end`). So equal states have equal
leaves, and a changed key affects only the leaves near it. This is content-defined chunking, as in
LBFS (Muthitacharoen et al., SOSP 2001).
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from operator import add, itemgetter, sub
from typing import NamedTuple

from crc32c import crc32c

from foldlog.protocol.decoding import Undecodable
from foldlog.protocol.tokens import MAX_TOKEN_BYTES
from foldlog.protocol.updates import MAX_KEY_BYTES, MAX_VALUE_BYTES, Change

MIN_ENTRIES = 128
MAX_ENTRIES = 512
MAX_COUNT = 512
"""The most entries in a leaf that a reader accepts, in this format version."""
MAX_LEAF_BYTES = 256 * 1024
"""A leaf ends with the entry that brings its keys and values to this size."""
_BOUNDARY_MASK = 127  # one key in 128 ends a leaf that is long enough: 256 entries on average

HEADER = struct.Struct("<IIII")
_U32 = struct.Struct("<I")
_U32_PAIR = struct.Struct("<II")
_U16 = struct.Struct("<H")
_U16_PAIR = struct.Struct("<HH")
_SEPARATOR = b"\xff"
_KEY_GUESS = 256  # bytes; the first and the last key of a leaf mostly fit
_NUMBERS = [*range(MAX_COUNT)]  # shared by all indexes
_SLICED = 32  # items that are cut out of a blob at a time
_SIZES = {"I": 4, "H": 2}
_MASKS = {"I": 0xFFFFFFFF, "H": 0xFFFF}
_value_of = itemgetter(1)  # of a change
_NUMBER_BYTES = 44  # of a key in the dict of an index, less the key
KEY_OVERHEAD = 66
"""Bytes that a key takes in memory besides its text: the object, and its place in a list."""


def text_bytes(text: str) -> int:
    """Bytes that the characters of `text` take in memory, at most."""
    return len(text) if text.isascii() else 4 * len(text)


class Columns(NamedTuple):
    """Entries in key order, as three columns of equal length."""

    keys: list[str]
    values: list[bytes]
    versions: list[bytes]


def leaf_end(keys: Sequence[str], values: Sequence[bytes], start: int) -> int | None:
    """The end (exclusive) of the leaf that starts with entry `start`.

    None if it continues past these entries.
    """
    stop = min(len(keys), start + MAX_ENTRIES)
    full = stop - start == MAX_ENTRIES
    if sum(map(len, keys[start:stop])) + sum(map(len, values[start:stop])) >= MAX_LEAF_BYTES:
        sizes = map(add, map(len, keys[start:stop]), map(len, values[start:stop]))
        stop = start + bisect_left(list(accumulate(sizes)), MAX_LEAF_BYTES) + 1
        full = True
    first = start + MIN_ENTRIES - 1
    for index, crc in enumerate(map(crc32c, map(str.encode, keys[first:stop])), first):
        if not crc & _BOUNDARY_MASK:
            return index + 1
    return stop if full else None


def encode_leaf(keys: Sequence[str], values: Sequence[bytes], versions: Sequence[bytes]) -> bytes:
    """The body of a leaf of these entries: in key order, at least one.

    Cost: about 0.2 us an entry.
    """
    key_blob = _encode_keys(keys)
    index = b"".join(
        (
            key_blob,
            _little(array("I", accumulate(map(len, values)))),
            _little(array("I", map(crc32c, values))),
            _little(array("H", accumulate(map(len, versions)))),
            *versions,
        )
    )
    sizes = struct.pack("<III", len(keys), HEADER.size + len(index), len(key_blob))
    crc = crc32c(index, crc32c(sizes))
    return b"".join((sizes, crc.to_bytes(4, "little"), index, *values))


def _encode_keys(keys: Sequence[str]) -> bytes:
    lines = "\n".join(keys)
    # No key has a newline of its own: one call encodes them all.
    if lines.count("\n") == len(keys) - 1:
        return b"".join((_SEPARATOR, lines.encode().replace(b"\n", _SEPARATOR), _SEPARATOR))
    return b"".join((_SEPARATOR, _SEPARATOR.join([key.encode() for key in keys]), _SEPARATOR))


def _little(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def range_bounds(body: bytes | memoryview) -> tuple[str, str]:
    """The first and the last key of a leaf's body.

    Undecodable unless the lengths in its header fit. The rest of the index is checked when it is
    first used: see `Index`. Cost: 2 us.
    """
    if len(body) < HEADER.size:
        raise Undecodable("a leaf is shorter than its header")
    count, index_len, keys_len, _ = HEADER.unpack_from(body)
    if (
        not 0 < count <= MAX_COUNT
        or index_len > len(body)
        or keys_len < count + 1
        or HEADER.size + keys_len + 10 * count > index_len
    ):
        raise Undecodable("a leaf's lengths do not fit")
    start, end = HEADER.size + 1, HEADER.size + keys_len - 1
    if body[start - 1] != 0xFF or body[end] != 0xFF:
        raise Undecodable("a leaf's keys are not separated")
    first = bytes(body[start : min(start + _KEY_GUESS, end)]).partition(_SEPARATOR)[0]
    if len(first) == _KEY_GUESS:
        first = bytes(body[start:end]).partition(_SEPARATOR)[0]
    last = bytes(body[max(end - _KEY_GUESS, start) : end]).rpartition(_SEPARATOR)[2]
    if len(last) == _KEY_GUESS:
        last = bytes(body[start:end]).rpartition(_SEPARATOR)[2]
    try:
        return first.decode(), last.decode()
    except UnicodeDecodeError:
        raise Undecodable("a leaf's key is not UTF-8") from None


def check_index(index: bytes | memoryview) -> None:
    """Undecodable unless the index of a leaf, read without its values, verifies."""
    if len(index) < HEADER.size or HEADER.unpack_from(index)[1] != len(index):
        raise Undecodable("a leaf's index has another length")
    if (
        crc32c(memoryview(index)[HEADER.size :], crc32c(index[: HEADER.size - 4]))
        != HEADER.unpack_from(index)[3]
    ):
        raise Undecodable("a leaf's index does not verify")


def _checked_keys(index: bytes, size: int) -> list[str]:
    """The keys of a leaf whose body has `size` bytes, from its index.

    Undecodable unless the whole index is valid: its checksum matches; the keys are ascending, and
    as many as it says; values and versions are within their limits, in order, and end where the
    body and the index end. Cost: 60 ns a key.
    """
    check_index(index)
    count, index_len, keys_len, _ = HEADER.unpack_from(index)
    ends_at = HEADER.size + keys_len
    if not 0 < count <= MAX_COUNT or keys_len < count + 1 or ends_at + 10 * count > index_len:
        raise Undecodable("a leaf's lengths do not fit")
    if index[HEADER.size] != 0xFF or index[ends_at - 1] != 0xFF:
        raise Undecodable("a leaf's keys are not separated")
    try:
        keys = decode_keys(index)
    except UnicodeDecodeError:
        raise Undecodable("a leaf's key is not UTF-8") from None
    # Four times as fast as comparing neighbours: sorting sorted keys needs no call for each.
    if not len(keys) == len(set(keys)) == count or keys != sorted(keys):
        raise Undecodable("a leaf's keys are not ascending")
    if keys_len > MAX_KEY_BYTES and max(len(key.encode()) for key in keys) > MAX_KEY_BYTES:
        raise Undecodable("a leaf's key is over its limit")
    if not _ends_fit(index, ends_at, "I", count, size - index_len, MAX_VALUE_BYTES):
        raise Undecodable("a leaf's values do not end where its body does, or are over their limit")
    versions = index_len - ends_at - 10 * count
    if not _ends_fit(index, ends_at + 8 * count, "H", count, versions, MAX_TOKEN_BYTES):
        raise Undecodable(
            "a leaf's versions do not end where its index does, or are over their limit"
        )
    return keys


def _ends_fit(index: bytes, at: int, width: str, count: int, total: int, limit: int) -> bool:
    """True if the `count` items whose ends are at `at` fit.

    Each has 0 to `limit` bytes, and all together have `total`.
    """
    size = _SIZES[width] * count
    step = total // count
    even = step * count == total and step <= limit  # of equal length, as tokens mostly are
    if even and index[at : at + size] == _even_ends(width, step)[:size]:
        return True
    ends = struct.unpack_from(f"<{count}{width}", index, at)
    lengths: list[int] = list(map(sub, ends, (0, *ends)))
    return bool(ends[-1] == total and min(lengths) >= 0 and max(lengths) <= limit)


@lru_cache(16)
def _even_ends(width: str, step: int) -> bytes:
    ends = (number * step & _MASKS[width] for number in range(1, MAX_COUNT + 1))
    return _little(array(width, ends))


def _steps(places: bytes, count: int, values: int, versions: int) -> tuple[int, int]:
    """The lengths of a value and of a version if all of each are equal and not empty, else (0, 0).

    `values`, `versions`: how long all of them are together.
    """
    size, version_size = values // count, versions // count
    if (
        size * count == values
        and version_size * count == versions
        and places[: 4 * count] == _even_ends("I", size)[: 4 * count]
        and places[8 * count : 10 * count] == _even_ends("H", version_size)[: 2 * count]
    ):
        return size, version_size
    return 0, 0


class Index:
    """The index of a leaf, as kept in memory: the keys decoded, the rest as encoded.

    `numbers`, the number of each key, is set once all entries of the leaf were read. It finds a key
    with a few looks at memory instead of a dozen.
    """

    __slots__ = (
        "_count",
        "_places",
        "_places_at",
        "_steps",
        "_values_at",
        "crc",
        "kept_bytes",
        "keys",
        "numbers",
    )

    def __init__(self, raw: bytes, size: int) -> None:
        """From the bytes before the values, of a body of `size` bytes.

        Undecodable unless all of them are valid. Cost: 60 ns and 90 bytes a key.
        """
        self.keys = _checked_keys(raw, size)
        self.numbers: dict[str, int] | None = None
        count: int
        values_at: int
        keys_len: int
        count, values_at, keys_len, self.crc = HEADER.unpack_from(raw)
        self._count, self._values_at = count, values_at
        self._places_at = HEADER.size + keys_len
        self._places = raw[self._places_at :]  # value ends, checksums, version ends, versions
        # The length of each value and of each version, if all are equal; else (0, 0).
        self._steps = _steps(self._places, count, size - values_at, len(self._places) - 10 * count)
        self.kept_bytes = text_bytes("".join(self.keys)) + KEY_OVERHEAD * count + len(self._places)
        """An estimate of its memory, rather too high."""

    def number_keys(self) -> int:
        """Set `numbers`. Returns the bytes that it takes. Cost: 90 ns a key."""
        grown = _NUMBER_BYTES * self._count
        self.numbers = dict(zip(self.keys, _NUMBERS))
        self.kept_bytes += grown
        return grown

    def locate(self, number: int) -> tuple[int, int, int, bytes]:
        """The offset of an entry's value in the body, its length and checksum, and the version."""
        places, count = self._places, self._count
        (crc,) = _U32.unpack_from(places, 4 * count + 4 * number)
        size, version_size = self._steps
        if size:
            at = 10 * count + number * version_size
            version = places[at : at + version_size]
            return self._values_at + number * size, size, crc, version
        if number:
            start, end = _U32_PAIR.unpack_from(places, 4 * number - 4)
            version_start, version_end = _U16_PAIR.unpack_from(places, 8 * count + 2 * number - 2)
        else:
            start, version_start = 0, 0
            (end,) = _U32.unpack_from(places)
            (version_end,) = _U16.unpack_from(places, 8 * count)
        versions = 10 * count
        return (
            self._values_at + start,
            end - start,
            crc,
            places[versions + version_start : versions + version_end],
        )

    def crc_at(self, number: int) -> int:
        """The offset in the body of a value's checksum."""
        return self._places_at + 4 * self._count + 4 * number

    def version_at(self, number: int) -> int:
        """The offset in the body of a version."""
        start: int = (
            _U16.unpack_from(self._places, 8 * self._count + 2 * number - 2)[0] if number else 0
        )
        return self._places_at + 10 * self._count + start


def decode_keys(index: bytes | memoryview) -> list[str]:
    """The keys of a leaf, from its index or its body. Cost: 25 to 60 ns a key."""
    keys_len = HEADER.unpack_from(index)[2]
    blob = bytes(index[HEADER.size + 1 : HEADER.size + keys_len - 1])
    if b"\n" in blob:
        return [key.decode() for key in blob.split(_SEPARATOR)]
    return blob.replace(_SEPARATOR, b"\n").decode().split("\n")


def decode_leaf(
    body: bytes | memoryview,
    low: str | None = None,
    high: str | None = None,
    keys: list[str] | None = None,
) -> Columns:
    """The entries of a leaf with low <= key < high; None is no bound.

    `keys`: all keys of the leaf, if they are already decoded. Cost: 25 ns a key, and 0.3 us an
    entry within the bounds.
    """
    if keys is None:
        keys = decode_keys(body)
    return _entries(body, keys, *bounds(keys, low, high))


def bounds(keys: list[str], low: str | None, high: str | None) -> tuple[int, int]:
    """Which of `keys` are at least `low` and less than `high`: the first, and the one after."""
    start = 0 if low is None else bisect_left(keys, low)
    return start, len(keys) if high is None else bisect_left(keys, high)


def _entries(
    index: bytes | memoryview,
    keys: list[str],
    start: int,
    stop: int,
    values: bytes | memoryview | None = None,
) -> Columns:
    """Entries `start` to `stop`.

    `values`: those of them, concatenated. Without, `index` is the whole body of the leaf.
    """
    if start >= stop:
        return Columns([], [], [])
    count, index_len, keys_len, _ = HEADER.unpack_from(index)
    ends = HEADER.size + keys_len
    if values is None:
        first, last = value_span(index, start, stop)
        values = index[index_len + first : index_len + last]
    version_ends = ends + 8 * count
    first, last = _span(index, "H", version_ends, start, stop)
    versions = bytes(index[version_ends + 2 * count + first : version_ends + 2 * count + last])
    return Columns(
        keys if stop - start == count else keys[start:stop],
        _slices(bytes(values), index, "I", ends, start, stop),
        _slices(versions, index, "H", version_ends, start, stop),
    )


def value_span(index: bytes | memoryview, start: int, stop: int) -> tuple[int, int]:
    """Where, among the values of a leaf, those of entries `start` to `stop` begin and end."""
    return _span(index, "I", HEADER.size + HEADER.unpack_from(index)[2], start, stop)


def _span(
    index: bytes | memoryview, width: str, ends_at: int, start: int, stop: int
) -> tuple[int, int]:
    one = _U32 if width == "I" else _U16
    first = one.unpack_from(index, ends_at + one.size * (start - 1))[0] if start else 0
    return first, one.unpack_from(index, ends_at + one.size * (stop - 1))[0]


def _slices(
    blob: bytes, index: bytes | memoryview, width: str, ends_at: int, start: int, stop: int
) -> list[bytes]:
    """Items `start` to `stop`, of which `blob` consists, by the ends of type `width` at `ends_at`.

    Cost: 50 ns an item if all are of equal length, else 90 ns.
    """
    size = _SIZES[width]
    raw = bytes(index[ends_at + size * start : ends_at + size * stop])
    step, rest = divmod(len(blob), stop - start)
    even = step and not rest
    if even and raw == _even_ends(width, step)[size * start : size * stop]:
        return _equal_slices(blob, step)
    slices = []
    ends = struct.unpack(f"<{stop - start}{width}", raw)
    first = ends[-1] - len(blob)
    at = 0
    for end in ends:
        slices.append(blob[at : end - first])
        at = end - first
    return slices


def _equal_slices(blob: bytes, step: int) -> list[bytes]:
    """`blob` in pieces of `step` bytes. One call cuts many: a third of the time of slicing."""
    many, one = _slicers(step)
    whole = len(blob) - len(blob) % many.size
    slices = [*chain.from_iterable(many.iter_unpack(blob[:whole]))]
    slices += chain.from_iterable(one.iter_unpack(blob[whole:]))
    return slices


@lru_cache(16)
def _slicers(step: int) -> tuple[struct.Struct, struct.Struct]:
    return struct.Struct(f"{step}s" * _SLICED), struct.Struct(f"{step}s")


def check_order(body: bytes | memoryview) -> list[str]:
    """The keys of a leaf.

    Undecodable unless the keys ascend, the lengths fit and the values verify. Cost: 0.2 us an
    entry.
    """
    keys = checked_keys(body)
    count, index_len, keys_len, _ = HEADER.unpack_from(body)
    values = _slices(bytes(body[index_len:]), body, "I", HEADER.size + keys_len, 0, count)
    _check_values(body, values, 0)
    return keys


def index_keys(index: bytes, size: int, *, checked: bool) -> list[str]:
    """The keys of a leaf whose body has `size` bytes, from its index.

    Undecodable unless the index is valid; with `checked`, for an index that was found valid before,
    unless its checksum matches.
    """
    if not checked:
        return _checked_keys(index, size)
    check_index(index)
    return decode_keys(index)


def checked_keys(body: bytes | memoryview) -> list[str]:
    """The keys of a leaf. Undecodable unless its index is valid. Cost: 90 ns a key."""
    if len(body) < HEADER.size:
        raise Undecodable("a leaf is shorter than its header")
    index_len = HEADER.unpack_from(body)[1]
    if index_len > len(body):
        raise Undecodable("a leaf's lengths do not fit")
    return _checked_keys(bytes(body[:index_len]), len(body))


def checked_columns(
    index: bytes | memoryview,
    keys: list[str],
    start: int,
    stop: int,
    values: bytes | memoryview | None = None,
) -> Columns:
    """Entries `start` to `stop` of a leaf whose index was found valid.

    Undecodable unless their values verify. `values`: those of them, concatenated. Without, `index`
    is the whole body of the leaf. Cost: 0.25 us an entry.
    """
    columns = _entries(index, keys, start, stop, values)
    _check_values(index, columns.values, start)
    return columns


def _check_values(index: bytes | memoryview, values: list[bytes], start: int) -> None:
    """Undecodable unless `values`, which begin with that of entry `start`, verify."""
    count, _, keys_len, _ = HEADER.unpack_from(index)
    crcs_at = HEADER.size + keys_len + 4 * (count + start)
    if _little(array("I", map(crc32c, values))) != index[crcs_at : crcs_at + 4 * len(values)]:
        raise Undecodable("a leaf's value does not verify")


def check_leaf(body: bytes | memoryview) -> None:
    """Undecodable for anything that `encode_leaf` would not write. Cost: 0.5 us an entry."""
    check_order(body)
    if encode_leaf(*decode_leaf(body)) != bytes(body):
        raise Undecodable("a leaf is not what its entries encode to")


def patched_leaf(body: bytes, changes: dict[str, Change]) -> bytes | None:
    """The leaf with some values replaced by others of the same length.

    None if `changes` does anything else. Most changes that a compaction meets are of this kind:
    known keys with new values. Cost: a copy, and 4 us a change; decoding takes ten times that.
    """
    _, index_len, keys_len, _ = HEADER.unpack_from(body)
    if keys_len + len(body) - index_len >= MAX_LEAF_BYTES:
        return None  # its end may depend on the lengths of its values
    try:
        index = Index(body[:index_len], len(body))
    except Undecodable:
        return None  # decoding the leaf reports why
    patched = bytearray(body)
    for key, value, version in changes.values():
        number = bisect_left(index.keys, key)
        if value is None or number == len(index.keys) or index.keys[number] != key:
            return None
        start, size, _, old_version = index.locate(number)
        if size != len(value) or len(old_version) != len(version):
            return None
        version_at = index.version_at(number)
        patched[start : start + size] = value
        patched[version_at : version_at + len(version)] = version
        _U32.pack_into(patched, index.crc_at(number), crc32c(value))
    crc = crc32c(memoryview(patched)[HEADER.size : index_len], crc32c(body[: HEADER.size - 4]))
    _U32.pack_into(patched, HEADER.size - 4, crc)
    return bytes(patched)


def merged_columns(
    body: bytes,
    changes: dict[str, Change],
    low: str | None = None,
    high: str | None = None,
    keys: list[str] | None = None,
) -> Columns:
    """The entries of a leaf with low <= key < high, with `changes`, all within the bounds, applied.

    Cost: that of decoding the leaf, and 1 us a change if there are few, else 0.3 us an entry. If
    every entry is overwritten, as when an upstream resends its state, nothing is decoded. `keys`:
    as for `decode_leaf`.
    """
    if keys is None:
        keys = decode_keys(body)
    start, stop = bounds(keys, low, high)
    if len(changes) * 8 < stop - start:
        return _patched_columns(_entries(body, keys, start, stop), changes)
    if all(map(changes.__contains__, keys[start:stop])):
        return columns_of(changes)
    return columns_of(changes_of(_entries(body, keys, start, stop)) | changes)


def _patched_columns(columns: Columns, changes: dict[str, Change]) -> Columns:
    keys, values, versions = columns
    for key, value, version in changes.values():
        at = bisect_left(keys, key)
        present = at < len(keys) and keys[at] == key
        if value is None:
            if present:
                del keys[at], values[at], versions[at]
        elif present:
            values[at], versions[at] = value, version
        else:
            keys.insert(at, key)
            values.insert(at, value)
            versions.insert(at, version)
    return columns


def changes_of(columns: Columns) -> dict[str, Change]:
    """The entries by key."""
    return dict(zip(columns.keys, zip(*columns)))


def columns_of(changes: dict[str, Change], *, in_order: bool = False) -> Columns:
    """The changes that leave a live entry, in key order. `in_order`: `changes` are already."""
    rows = [*(changes.values() if in_order else map(changes.__getitem__, sorted(changes)))]
    if not all(map(_value_of, rows)):  # a delete, or an empty value
        rows = [change for change in rows if change[1] is not None]
    if not rows:
        return Columns([], [], [])
    return Columns(*map(list, zip(*rows, strict=True)))
