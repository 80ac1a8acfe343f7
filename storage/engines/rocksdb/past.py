"""The last batches of this process, in memory, for subscribers that resume from a cursor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from foldlog.protocol.decoding import decode_batches
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Batch, DecodedBatch, batches_body

BACKLOG_BYTES = 16 * 1024 * 1024
"""Bytes of encoded batches kept."""


class _Kept(NamedTuple):
    start_seq: int
    start_cursor: bytes
    batches: deque[tuple[int, bytes, bytes]]
    """Number, cursor and item of each batch: plain values, see `Change`."""


class Past:
    """One thread adds batches; any thread may read them.

    An exception may strike between any two steps of adding, and a reader may look there. So `since`
    returns batches only if none is missing, and a batch after a gap starts the past anew.
    """

    def __init__(self, seq: int, cursor: WatchCursor) -> None:
        """The past starts after batch `seq`, at `cursor`."""
        self.begin(seq, cursor)

    def begin(self, seq: int, cursor: WatchCursor) -> None:
        """Drop all batches; the past starts after batch `seq`, at `cursor`."""
        self._kept = _Kept(seq, bytes(cursor), deque())
        self._bytes = 0

    def add(self, seq: int, cursor: WatchCursor, batches: Sequence[Batch]) -> None:
        """Keep the batches after number `seq`, which is at `cursor`, and drop the oldest."""
        kept = self._kept
        if (kept.batches[-1][0] if kept.batches else kept.start_seq) != seq:
            self.begin(seq, cursor)
            kept = self._kept
        past = kept.batches
        for number, batch in enumerate(batches, seq + 1):
            self._bytes += len(batch.item)
            past.append((number, bytes(batch.cursor), batch.item))
        while self._bytes > BACKLOG_BYTES and past:
            seq, start, item = past.popleft()
            self._bytes -= len(item)
            self._kept = _Kept(seq, start, past)

    def since(self, cursor: WatchCursor, seq: int) -> Iterator[tuple[int, DecodedBatch]] | None:
        """The batches after the one at `cursor`, up to number `seq`; None if not all are kept."""
        kept = self._kept
        batches = _copied(kept.batches)
        position = kept.start_seq
        if kept.start_cursor != cursor:
            at = next((at for at, entry in enumerate(batches, 1) if entry[1] == cursor), None)
            if at is None:
                return None
            position, batches = batches[at - 1][0], batches[at:]
        batches = [entry for entry in batches if entry[0] <= seq]
        numbers = [number for number, _, _ in batches]
        if position > seq or numbers != list(range(position + 1, seq + 1)):
            return None
        return ((number, decode_batches(batches_body([item]), 1)[0]) for number, _, item in batches)


def _copied(batches: deque[tuple[int, bytes, bytes]]) -> list[tuple[int, bytes, bytes]]:
    while True:
        try:
            return list(batches)
        except RuntimeError:  # changed during the copy
            continue
