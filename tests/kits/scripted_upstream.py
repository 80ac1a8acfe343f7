"""An upstream in memory, whose every answer a test can script by overriding a method."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from foldlog import Delete, Put, VersionToken, WatchCursor
from foldlog.protocol.updates import Update
from foldlog.protocol.upstream import Changes, Identity, Prefixes, Revisions

BEAT_S = 0.005

P = TypeVar("P", bound="Plain")


def at(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number) if number else WatchCursor.none()


class Plain:
    """Changes 1, 2, ... of one incarnation. Tells no state: nothing audits its mirrors."""

    origin = b"n" * 16 + b"1" * 8

    def __init__(self) -> None:
        self.updates: list[Update] = []

    def put(self, key: str, value: bytes = b"") -> None:
        self.updates.append(Put(key, value, VersionToken.from_u64(len(self.updates) + 1)))

    def delete(self, key: str) -> None:
        self.updates.append(Delete(key, VersionToken.from_u64(len(self.updates) + 1)))

    @property
    def live(self) -> dict[str, Put]:
        live: dict[str, Put] = {}
        for update in self.updates:
            live.pop(update.key, None)
            if isinstance(update, Put):
                live[update.key] = update
        return live

    def mark(self, position: int) -> bytes:
        return b""

    async def identify(self) -> Identity:
        return Identity(self.origin, at(0), at(len(self.updates)))

    async def changes(self, after: WatchCursor, prefixes: Prefixes) -> AsyncIterator[Changes]:
        done = after.as_u64() or 0
        while True:
            new = self.updates[done : done + 1]
            done += len(new)
            yield Changes(new, at(done), len(self.updates) - done, self.mark(done))
            if not new:
                await asyncio.sleep(BEAT_S)


class Scripted(Plain):
    """With a state, and the versions of its keys."""

    async def state(self, prefixes: Prefixes) -> AsyncIterator[Changes]:
        last = len(self.updates)
        yield Changes(list(self.live.values()), at(last), None, self.mark(last))

    async def revisions(self, prefixes: Prefixes) -> Revisions:
        versions = {key: bytes(put.version) for key, put in self.live.items()}
        return Revisions(versions, at(len(self.updates)))


class InPieces(Scripted):
    """Its state comes in pieces, of a change each: a later one overrides an earlier one."""

    async def state(self, prefixes: Prefixes) -> AsyncIterator[Changes]:
        for update in self.updates:
            yield Changes([update], at(len(self.updates)))


class Marked(Scripted):
    """With marks: in another past of it, the same positions have other marks."""

    past = b"1"

    def mark(self, position: int) -> bytes:
        return self.past + position.to_bytes(7, "big")

    async def recalls(self, position: WatchCursor, mark: bytes) -> bool | None:
        return mark == self.mark(position.as_u64() or 0)


def filled(kind: type[P], *values: bytes) -> P:
    """An upstream with k.0, k.1, ... of these values."""
    upstream = kind()
    for number, value in enumerate(values):
        upstream.put(f"k.{number}", value)
    return upstream
