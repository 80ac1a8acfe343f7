"""The last batches of this process, in memory, for subscribers that resume from a cursor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from foldlog.protocol.decoding import decode_batches
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Batch, DecodedBatch, batches_body

BACKLOG_BYTES = 16 * 1024 * 1024
"""Bytes of encoded batches kept."""


class Past:
    """One thread adds batches; any thread may read them."""

    def __init__(self) -> None:
        # Sequence, cursor and item of each batch: plain values, see `Change`.
        self._batches: deque[tuple[int, bytes, bytes]] = deque()
        self._bytes = 0
        self._start_cursor = WatchCursor.none()

    def begin(self, cursor: WatchCursor) -> None:
        """Drop all batches; the past starts at `cursor`."""
        self._batches.clear()
        self._bytes = 0
        self._start_cursor = cursor

    def add(self, seq: int, batches: Sequence[Batch]) -> None:
        """Keep the batches after number `seq`, and drop the oldest."""
        past = self._batches
        for number, batch in enumerate(batches, seq + 1):
            past.append((number, bytes(batch.cursor), batch.item))
            self._bytes += len(batch.item)
        while self._bytes > BACKLOG_BYTES:
            _, cursor, item = past.popleft()
            self._bytes -= len(item)
            self._start_cursor = WatchCursor(cursor)

    def since(self, cursor: WatchCursor, seq: int) -> Iterator[tuple[int, DecodedBatch]] | None:
        """The batches after the one at `cursor`, up to number `seq`; None if they are not kept."""
        start, past = self._start_cursor, self._all()
        if start != cursor:
            at = next((at for at, entry in enumerate(past, 1) if entry[1] == cursor), None)
            if at is None:
                return None
            past = past[at:]
        return (
            (number, decode_batches(batches_body([item]), 1)[0])
            for number, _, item in past
            if number <= seq
        )

    def _all(self) -> list[tuple[int, bytes, bytes]]:
        while True:
            try:
                return list(self._batches)
            except RuntimeError:  # changed during the copy
                continue
