"""Reading a consumer of JetStream by pull requests, without loss.

The number of messages requested gives back-pressure, the consumer's sequence proves that none was
lost (see `nats_wire`), and heartbeats show that the server is alive. On any gap, silence or
unexpected answer, reading ends with UpstreamLost, and the link attaches again.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, NamedTuple

from foldlog.protocol.updates import UpdateColumns
from foldlog.protocol.upstream import UpstreamLost
from foldlog.upstreams.nats_connection import Connection
from foldlog.upstreams.nats_wire import Receiver, Run, Status

REQUEST_MESSAGES = 4000
REQUEST_BYTES = 8 * 1024 * 1024
UNLIMITED_MESSAGES = 25
"""Messages of a request without a limit on its bytes. What two of them bring, at 1 MiB a message,
is within what a server keeps for a client."""
PIECE_UPDATES = 1000
PIECE_BYTES = 1024 * 1024
EXPIRES_S = 30.0
HEARTBEAT_S = 1.0
SILENCE_S = 3.0
"""After this long without a message or heartbeat, the consumer is considered dead."""
MAX_REFUSALS = 8
"""After this many refusals in a row, look for the end of a pass."""
_LIMIT = re.compile(r"exceeded maxrequestbatch of (\d+)")


class Piece(NamedTuple):
    """What was received since the last piece."""

    updates: UpdateColumns
    last: int = 0
    """The stream sequence of the last message; 0 if there was none."""
    pending: int | None = None
    """Messages waiting upstream after these, if known."""
    stored_ns: int = 0
    """When the last message was stored."""
    size: int = 0
    """Bytes of values."""


class Pass(NamedTuple):
    """Reading that ends: one pass over what a stream holds."""

    last: int
    """The stream's last sequence when the pass began: up to there it has to be complete."""
    where: Callable[[], Awaitable[tuple[int, int]]]
    """Where the consumer is: the messages it has sent, and the stream sequence it has reached."""
    drops_oversize: bool = False
    """True for a server that leaves out the message for which a request has no bytes left."""


class Pull:
    """Requests messages from the consumer at `subject`. They arrive in a receiver."""

    def __init__(self, connection: Connection, subject: str, inbox: str, subjects: str) -> None:
        """`subject`: of the API; `subjects`: the prefix of the stream's subjects."""
        self._connection, self._subject, self._inbox = connection, subject, inbox
        self._woken = asyncio.Event()
        self.receiver = Receiver(connection.who, subjects, self._woken.set)
        self._batch, self._bytes = REQUEST_MESSAGES, REQUEST_BYTES
        self._number = 0
        self._asked: dict[int, int] = {}  # messages asked for by each of the newest requests
        # Messages that the server may still deliver. It serves open requests in turn, so what is
        # left of each one is known only once it ends.
        self._credit = 0
        self._wants_single = False  # request one message, without a limit on its size
        self._single = 0  # the request that does
        self._refusals = 0  # in a row, with nothing else in between
        self._looked: tuple[int, int] | None = None
        self._was_short = False  # a message was over what was left of the requests
        self._pending: int | None = None
        self._heard = time.monotonic()
        self._ended = False
        # Wakes what waits, now and then. One timer, rather than one for each message.
        self._tick: asyncio.TimerHandle | None = None

    async def pieces(self, only: Pass | None = None) -> AsyncGenerator[Piece, None]:
        """The messages in pieces. Those of a pass end when nothing is pending."""
        once = only is not None
        if only is not None and only.drops_oversize:
            self._batch, self._bytes = UNLIMITED_MESSAGES, 0
        await self._ask(once)
        heard = self._heard = time.monotonic()
        while True:
            await self._wait()
            piece = self._take()
            if only is not None:  # nobody needs parts of a pass early: use fewer, larger pieces
                while not self._ended and not _is_full(len(piece.updates), piece.size):
                    await self._ask(once)
                    await self._wait()
                    piece = self._take(piece)
                    if self._is_stuck():
                        await self._look(only)
            if piece.updates or (self._heard > heard and not once):  # silence proves nothing
                yield piece
            if self._ended:
                return
            heard = self._heard
            await self._ask(once)

    async def _wait(self) -> None:
        """Wait until something has arrived, for half a heartbeat at most."""
        self._woken.clear()
        if self.receiver.error is None and not self.receiver.waiting:
            self._connection.check()
            if self._tick is None:
                self._tick = asyncio.get_running_loop().call_later(HEARTBEAT_S / 2, self._on_tick)
            await self._woken.wait()
        if self.receiver.waiting:
            return
        if self.receiver.error is not None:
            raise self.receiver.error
        if time.monotonic() - self._heard > SILENCE_S:
            raise UpstreamLost(f"{self._connection.who}: no heartbeat for {SILENCE_S} s")

    def _on_tick(self) -> None:
        self._tick = None
        self._woken.set()

    def close(self) -> None:
        """Stop the timer."""
        if self._tick is not None:
            self._tick.cancel()

    async def _ask(self, once: bool) -> None:
        """Keep enough requests open. The server may send no more than they ask for."""
        while not self._single and self._credit <= self._batch:
            self._number += 1
            count = 1 if self._wants_single else self._batch
            request: dict[str, Any] = {"batch": count}
            if self._bytes and not self._wants_single:
                request["max_bytes"] = self._bytes
            if once:
                request["no_wait"] = True
            else:
                request["expires"] = int(EXPIRES_S * 1e9)
                request["idle_heartbeat"] = int(HEARTBEAT_S * 1e9)
            if self._wants_single:
                self._wants_single, self._single = False, self._number
            self._credit += count
            self._asked[self._number] = count
            if len(self._asked) > 64:
                del self._asked[next(iter(self._asked))]
            await self._connection.tell(
                self._subject, json.dumps(request).encode(), f"{self._inbox}.{self._number}"
            )

    def _is_stuck(self) -> bool:
        quiet_s = time.monotonic() - self._heard
        return self._refusals >= MAX_REFUSALS or quiet_s > SILENCE_S / 2

    async def _look(self, only: Pass) -> None:
        """End the pass if the consumer is past its end, all that it sent is taken, and it has not
        moved since the last look.

        A server may count more messages as pending than there are (seen with NATS 2.9, when keys
        are written meanwhile). It then neither answers a request nor says that nothing is pending.
        """
        self._refusals = 0
        before, self._looked = self._looked, await only.where()
        sent, reached = self._looked
        taken = self.receiver.delivered if not self.receiver.waiting else -1
        if self._looked == before and reached >= only.last and sent <= taken:
            if self._was_short:  # perhaps it was left out
                reason = f"{self._connection.who}: messages are pending that do not come"
                raise UpstreamLost(reason)
            self._ended = True

    def _take(self, first: Piece | None = None) -> Piece:
        """The messages received, added to `first`, up to the size of a piece."""
        waiting = self.receiver.waiting
        updates = UpdateColumns([], [], []) if first is None else first.updates
        size = 0 if first is None else first.size
        last: Run | None = None
        if waiting:
            self._heard = time.monotonic()
        while waiting and not _is_full(len(updates), size):
            arrived = waiting.popleft()
            if isinstance(arrived, Status):
                self._on_status(arrived)
                continue
            last = arrived
            self._refusals = 0
            if updates:
                updates.extend(arrived.updates)
            else:
                updates = arrived.updates
            size += arrived.size
            self._credit -= len(arrived.updates)
            self._single, self._pending = 0, arrived.pending
        pending = self._pending if not waiting else None
        if last is not None:
            return Piece(updates, last.last, pending, last.stored_ns, size)
        return (first or Piece(updates))._replace(pending=pending)

    def _on_status(self, status: Status) -> None:
        """Handle a heartbeat, or the end of a request."""
        code, text, headers = status.code, status.text.lower(), status.headers
        who, delivered = self._connection.who, self.receiver.delivered
        if code == "100":
            told = headers.get("Nats-Last-Consumer")
            if told is not None and int(told) > delivered:
                raise UpstreamLost(f"{who}: messages up to {told} of the consumer are lost")
            self._pending = 0  # idle although requests are open: nothing is pending
            return
        asked = self._asked.pop(status.number, self._batch)
        unserved = headers.get("Nats-Pending-Messages", "")
        left = int(unserved) if unserved.isdigit() else asked
        self._credit = max(self._credit - left, 0)
        if status.number == self._single:
            self._single = 0
        self._refusals = self._refusals + 1 if "requests pending" in text else 0
        if code == "404":
            self._ended = True
        elif code == "409" and "message size exceeds" in text:
            # The message at hand fits no open request: the server has ended them all.
            self._credit, self._wants_single = 0, left == asked  # it brought nothing
            self._was_short = True
        elif code == "409" and (limit := _LIMIT.search(text)) and int(limit[1]) > 0:
            self._batch = min(self._batch, int(limit[1]))
        elif code != "408" and not (code == "409" and "batch completed" in text):
            raise UpstreamLost(f"{who}: {code} {status.text}")


def _is_full(updates: int, size: int) -> bool:
    return updates >= PIECE_UPDATES or size >= PIECE_BYTES
