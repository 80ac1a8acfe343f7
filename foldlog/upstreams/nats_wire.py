"""Messages of JetStream as they arrive on the wire, decoded in runs.

nats-py makes an object, a coroutine call and a queue entry of each message, at 20 us. `Wire` takes
the place of its parser: messages of a subscription that is being read go to their `Receiver`, which
decodes all that a read from the socket brought in one loop, at 2 us each. All else goes to nats-py.

    MSG  SUBJECT SID REPLY SIZE\\r\\n PAYLOAD \\r\\n
    HMSG SUBJECT SID REPLY HEADER_SIZE SIZE\\r\\n HEADERS PAYLOAD \\r\\n
    REPLY := $JS.ACK.[DOMAIN.ACCOUNT.]STREAM.CONSUMER.DELIVERED.SEQUENCE.CONSUMER_SEQUENCE.TIME
             .PENDING[.RANDOM]

A message without a reply is a status: a heartbeat, or the end of a request.
"""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from foldlog.protocol.updates import Delete, Purge, UpdateColumns
from foldlog.protocol.upstream import UpstreamError, UpstreamLost, UpstreamRefused
from foldlog.upstreams.nats_bulk import MIN_BYTES, BulkDecoder

CACHED_HEADER_BYTES = 256
"""Longer headers are decoded each time."""
FEW, PAUSE = 16, 16
"""Where the bulk decoder takes fewer messages of a read than `FEW`, it is not tried for the next
`PAUSE` reads: their values may all contain line ends."""
# OverflowError and struct.error: for a sequence beyond 64 bits.
_UNREADABLE = (UpstreamError, ValueError, IndexError, OverflowError, struct.error)
_MARKER = "Nats-Marker-Reason"
_OPERATION = "KV-Operation"
_MESSAGE = (
    rb"H?MSG %s([^ ]++) (\d++) \$JS\.ACK\.(?:[^. ]++\.[^. ]++\.)??[^. ]++\.[^. ]++\.\d++"
    rb"\.(\d++)\.(\d++)\.(\d++\.[^ ]++) (?:(\d++) )?(\d++)\r\n"
)
"""The line of a message: key, subscription, sequence, consumer sequence, time and what follows,
header size and size. The name of a bucket's stream is no number: this tells the tokens that a
domain adds. The same for all consumers of a bucket, since compiling it takes milliseconds."""


class Run(NamedTuple):
    """Consecutive messages of a consumer."""

    updates: UpdateColumns
    last: int
    """The stream sequence of the last message."""
    stored_ns: int
    """When the last message was stored."""
    pending: int
    """Messages waiting upstream after these."""
    size: int
    """Bytes of values."""


class Status(NamedTuple):
    """A message without content."""

    number: int
    """The request that it answers."""
    code: str
    text: str
    headers: dict[str, str]


class Receiver:
    """What has arrived on one subscription and was not taken yet, in order.

    Checks that the consumer's sequence has no gap. The first failure ends it: `error`.
    """

    def __init__(self, who: str, subjects: str, wake: Callable[[], None]) -> None:
        """`subjects`: the prefix of all subjects, which is cut off; `wake` is called when something
        arrives."""
        self._who, self._prefix, self.wake = who, subjects.encode(), wake
        self._subjects = re.escape(self._prefix)
        self.waiting: deque[Run | Status] = deque()
        self.delivered = 0
        """The consumer sequence of the last message."""
        self.error: UpstreamError | None = None
        self._message: re.Pattern[bytes] | None = None
        self._bulk: BulkDecoder | None = None
        self._pause = 0  # reads for which it is not tried

    def take(self, data: bytes, at: int, sid: bytes) -> int:
        """Decode the complete messages of `sid` in `data` from `at` on, up to the first one that is
        not. Returns where that begins. Whatever it raises is for `fail`."""
        if self._message is None:
            self._message = re.compile(_MESSAGE % self._subjects)
        if self._pause:
            self._pause -= 1
        elif len(data) - at >= MIN_BYTES:
            at = self._take_bulk(data, at, sid)
        match, end = self._message.match, len(data)
        updates = UpdateColumns([], [], [])
        size, number, last = 0, self.delivered, None
        while found := match(data, at):
            key, of, sequence, told, _, header_size, length = found.groups()
            body = found.end()
            stop = body + int(length)
            if stop + 2 > end or of != sid:
                break
            number += 1
            if int(told) != number:
                raise self._gap(int(told), number - 1)
            kind = None
            if header_size is not None:
                header, body = body, body + int(header_size)
                kind = _removal(data[header:body])
            updates.keys.append(key.decode())
            updates.versions.append(int(sequence).to_bytes(8, "big"))
            if kind is None:
                updates.values.append(data[body:stop])
                size += stop - body
            else:
                updates.values.append(None if kind is Delete else False)
            at, last = stop + 2, found
        if last is not None:
            self._note(updates, number, int(last[3]), last[5], size)
        return self._take_status(data, at, sid)

    def _take_bulk(self, data: bytes, at: int, sid: bytes) -> int:
        """Decode the messages that the bulk decoder takes. Returns where the next one begins."""
        if self._bulk is None:
            assert self._message is not None
            found = self._message.match(data, at)
            if found is None:
                return at
            tokens = data.count(b".", found.end(2), found.start(3)) - 2
            removing = (_OPERATION.encode(), _MARKER.encode())
            self._bulk = BulkDecoder(self._prefix, sid, tokens, _removal, removing)
        before = self.delivered
        while bulk := self._bulk.take(data, at, self.delivered):
            updates, at = bulk.updates, bulk.end
            self._note(updates, self.delivered + len(updates), bulk.last, bulk.rest, bulk.size)
            if len(data) - at < MIN_BYTES:
                return at
        if self.delivered - before < FEW:
            self._pause = PAUSE
        return at

    def _note(
        self, updates: UpdateColumns, delivered: int, last: int, rest: bytes, size: int
    ) -> None:
        """Add decoded messages. `rest`: the end of the last one's reply."""
        self.delivered = delivered
        stored_ns, pending, *_ = rest.split(b".")
        self._add(Run(updates, last, int(stored_ns), int(pending), size))

    def _take_status(self, data: bytes, at: int, sid: bytes) -> int:
        """Decode a status at `at`, if there is a complete one of `sid`. Returns where it ends."""
        stop, found = _unit(data, at)
        if found != sid or stop > len(data):
            return at
        body = data.index(b"\r\n", at) + 2
        parts = data[at : body - 2].split()  # NATS 2.9 writes two spaces where a reply would be
        if len(parts) != 5 or parts[0] != b"HMSG":
            raise ValueError("neither a message of JetStream nor a status")
        headers = headers_of(data[body : stop - 2])
        number = parts[1].rpartition(b".")[2]
        code, text = headers.get("Status", ""), headers.get("Description", "")
        self._add(Status(int(number) if number.isdigit() else 0, code, text, headers))
        return stop

    def _gap(self, number: int, before: int) -> UpstreamLost:
        reason = f"{self._who}: message {number} of the consumer came after {before}"
        return UpstreamLost(reason)

    def fail(self, error: Exception) -> None:
        """End with the failure of `take`."""
        if isinstance(error, UnicodeDecodeError):
            raw = bytes(error.object)[:80]
            error = UpstreamRefused(f"{self._who}: key {raw!r} is not UTF-8")
        elif not isinstance(error, UpstreamError):
            error = UpstreamLost(f"{self._who}: a message cannot be read")
        self.error = self.error or error
        self.wake()

    def _add(self, arrived: Run | Status) -> None:
        self.waiting.append(arrived)
        self.wake()


class Wire:
    """Stands between nats-py's connection and its parser. Subscriptions in `receivers`, by their
    number, are read here."""

    def __init__(self, parser: Any) -> None:
        """`parser`: a nats.protocol.parser.Parser that has received nothing yet."""
        self._parser = parser
        self._held = bytearray()  # the beginning of a message
        self._needed = 0  # bytes of it, as far as known
        self.receivers: dict[bytes, Receiver] = {}

    def reset(self) -> None:
        """Forget what was received."""
        self._held.clear()
        self._parser.reset()

    async def parse(self, data: bytes = b"") -> None:
        """Take what a read from the socket brought."""
        if self._held:
            self._held += data
            if len(self._held) < self._needed:
                return
            data = bytes(self._held)
            self._held.clear()
        at = 0
        while at < len(data):
            end, sid = _unit(data, at)
            if end > len(data):
                break
            receiver = self.receivers.get(sid)
            if receiver is None:
                await self._parser.parse(data[at:end])
                at = end
            elif receiver.error is not None:
                at = end
            else:
                try:
                    at = receiver.take(data, at, sid)
                except _UNREADABLE as error:
                    receiver.fail(error)
        else:
            return
        self._held += data[at:]
        self._needed = end - at


def _unit(data: bytes, at: int) -> tuple[int, bytes]:
    """Where the line or message at `at` ends, past the end of `data` if it is incomplete; and the
    number of its subscription, if it is a message."""
    stop = data.find(b"\r\n", at)
    if stop < 0:
        return len(data) + 1, b""
    if not data.startswith((b"MSG ", b"HMSG "), at):
        return stop + 2, b""
    parts = data[at:stop].split(b" ")
    if len(parts) < 4 or not parts[-1].isdigit():
        return stop + 2, b""
    return stop + 2 + int(parts[-1]) + 2, parts[2]


def _removal(raw: bytes) -> type[Delete] | type[Purge] | None:
    """What the headers of a message make it, if not a Put. Cached: most have the same headers."""
    return _cached_removal(raw) if len(raw) <= CACHED_HEADER_BYTES else _parsed_removal(raw)


def _parsed_removal(raw: bytes) -> type[Delete] | type[Purge] | None:
    headers = headers_of(raw)
    if headers.get(_OPERATION) == "DEL":
        return Delete
    return Purge if headers.get(_OPERATION) == "PURGE" or _MARKER in headers else None


_cached_removal = lru_cache(maxsize=256)(_parsed_removal)


def headers_of(raw: bytes) -> dict[str, str]:
    """The headers of a message. Its status, if it has one, is in `Status` and `Description`."""
    first, *lines = raw.decode("utf-8", "replace").split("\r\n")
    _, _, status = first.partition(" ")
    fields = (line.partition(":") for line in lines if line)
    headers = {name.strip(): value.strip() for name, _, value in fields}
    if status.strip():
        code, _, description = status.strip().partition(" ")
        headers |= {"Status": code, "Description": description.strip()}
    return headers


def nanoseconds(time_text: str) -> int:
    """A time in the server's notation, 2026-01-02T03:04:05.123456789Z, in nanoseconds since
    1970."""
    whole, _, fraction = time_text.rstrip("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp())
    return seconds * 1_000_000_000 + int(fraction.ljust(9, "0") or 0)
