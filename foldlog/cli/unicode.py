"""A real change stream included with every Python: the history of the Unicode character database.

`unicodedata` contains two versions of it, 3.2.0 and a current one. The stream has four steps:

    1  every named character of 3.2.0                                  puts
    2  what was changed or added since                                 puts
    3  compatibility ideographs and presentation forms are removed     deletes
    4  they are purged; ideographs of the basic plane come back        purge and put at one cursor

Each change has a version (30200 is 3.2.0) and a cursor.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from foldlog.protocol.tokens import VersionToken
from foldlog.storage.fold.snapshot import FoldSnapshot

ALL_CODE_POINTS = range(0x110000)
IDEOGRAPHS = (range(0xF900, 0xFB00),)
LEAVING = (*IDEOGRAPHS, range(0xFB50, 0xFE00), range(0x2F800, 0x2FA20))

Model = dict[str, tuple[str, int]]
"""key -> (value, version): what the log must hold at the end."""


class Database:
    """One version of the Unicode character database."""

    def __init__(self, source: Any) -> None:
        self._source = source  # the module, or its `ucd_3_2_0`, which has the same functions
        major, minor, update = source.unidata_version.split(".")
        self.version = int(major) * 10_000 + int(minor) * 100 + int(update)

    def describe(self, code: int) -> str | None:
        """The value for a code point: name;category;direction;decomposition. None if it has no
        name."""
        char, source = chr(code), self._source
        name = source.name(char, "")
        if not name:
            return None
        fields = (source.category(char), source.bidirectional(char), source.decomposition(char))
        return ";".join((name, *fields))


OLD, NEW = Database(unicodedata.ucd_3_2_0), Database(unicodedata)


def key_of(code: int) -> str:
    """The key of a code point: U+0041."""
    return f"U+{code:04X}"


class History:
    """The change stream as lines of JSON, and the resulting state as a plain dict. Cost: about 1
    s."""

    def __init__(self, code_points: Sequence[int] = ALL_CODE_POINTS) -> None:
        self.lines: list[bytes] = []
        self.model: Model = {}
        self.steps: list[tuple[str, int]] = []
        """(description, number of changes) of each step."""
        self._cursor = 0
        leaving = [code for part in LEAVING for code in part if code in code_points]
        newest = unicodedata.unidata_version
        for what, codes, take in (
            ("the characters of Unicode 3.2.0", code_points, self._add_old),
            (f"what Unicode {newest} changed and added", code_points, self._add_new),
            ("compatibility ideographs and presentation forms deleted", leaving, self._delete),
            ("the same purged, and some put back", leaving, self._purge),
        ):
            before = len(self.lines)
            for code in codes:
                take(code)
            self.steps.append((what, len(self.lines) - before))

    def _add_old(self, code: int) -> None:
        value = OLD.describe(code)
        if value is not None:
            self._put(key_of(code), value, OLD.version)

    def _add_new(self, code: int) -> None:
        key, value = key_of(code), NEW.describe(code)
        held = self.model.get(key)
        if value is None:
            if held is not None:
                self._remove("delete", key)
        elif held is None or held[0] != value:
            self._put(key, value, NEW.version)

    def _delete(self, code: int) -> None:
        if key_of(code) in self.model:
            self._remove("delete", key_of(code))

    def _purge(self, code: int) -> None:
        self._remove("purge", key_of(code))
        value = NEW.describe(code)
        if value is not None and any(code in part for part in IDEOGRAPHS):
            self._put(key_of(code), value, NEW.version, same_position=True)

    def _put(self, key: str, value: str, version: int, *, same_position: bool = False) -> None:
        self.model[key] = (value, version)
        self._line({"op": "put", "key": key, "value": value, "version": version}, same_position)

    def _remove(self, op: str, key: str) -> None:
        self.model.pop(key, None)
        self._line({"op": op, "key": key, "version": NEW.version}, False)

    def _line(self, fields: dict[str, str | int], same_position: bool) -> None:
        self._cursor += not same_position
        fields["cursor"] = self._cursor
        self.lines.append(json.dumps(fields).encode())


def differences(fold: FoldSnapshot, model: Model) -> Iterator[str]:
    """The keys whose entries differ or are out of order: first in the log's order, then those that
    only the dict has."""
    expected = dict(model)
    last = ""
    for block in fold.blocks():
        for key, value, version in block:
            held = expected.pop(key, None)
            if (
                held is None
                or value != held[0].encode()
                or version != VersionToken.from_u64(held[1])
                or key <= last
            ):
                yield key
            last = key
    yield from expected
