"""Messages on the wire, in whatever pieces they arrive."""

from __future__ import annotations

import asyncio
import itertools
import random
import re

import pytest
from counting import calls_of, work_of

from foldlog.protocol.updates import Delete, Purge, Put
from foldlog.protocol.upstream import UpstreamLost, UpstreamRefused
from foldlog.upstreams import nats_bulk, nats_wire
from foldlog.upstreams.nats_wire import Receiver, Run, Status, Wire, headers_of


class Parser:
    """Takes what is not for a receiver, as nats-py's does."""

    def __init__(self) -> None:
        self.units: list[bytes] = []

    def reset(self) -> None:
        self.units.clear()

    async def parse(self, data: bytes) -> None:
        self.units.append(data)


def message(key: bytes, number: int, value: bytes, headers: bytes = b"", sid: int = 7) -> bytes:
    reply = b"$JS.ACK.KV_b.c.1.%d.%d.99.3" % (number * 10, number)
    if not headers:
        return b"MSG $KV.b.%s %d %s %d\r\n%s\r\n" % (key, sid, reply, len(value), value)
    raw = b"NATS/1.0\r\n" + headers + b"\r\n\r\n"
    sizes = b"%d %d" % (len(raw), len(raw) + len(value))
    return b"HMSG $KV.b.%s %d %s %s\r\n%s%s\r\n" % (key, sid, reply, sizes, raw, value)


def status(line: bytes, number: int = 1) -> bytes:
    raw = b"NATS/1.0 " + line + b"\r\n\r\n"
    return b"HMSG _INBOX.x.%d 7 %d %d\r\n%s\r\n" % (number, len(raw), len(raw), raw)


OTHERS = [b"PING\r\n", b"MSG _INBOX.y.1 1 5\r\nother\r\n", b"+OK\r\n", b'INFO {"a":1}\r\n']
STREAM = [
    OTHERS[3],
    message(b"a", 1, b"1"),
    message("ü.\x0b".encode(), 2, b"MSG a 7 b 3\r\n123\r\n"),  # as if it were a message
    OTHERS[0],
    message(b"large", 3, b"v" * 70_000),
    status(b"100 Idle Heartbeat\r\nNats-Last-Consumer: 3"),
    message(b"a", 4, b"", b"KV-Operation: DEL"),
    OTHERS[1],
    message(b"b", 5, b"", b"KV-Operation: PURGE\r\nNats-Rollup: sub"),
    message(b"c", 6, b"", b"Nats-Marker-Reason: MaxAge"),
    message(b"d", 7, b"kept", b"My-Header: DEL"),
    OTHERS[2],
    status(b"408 Request Timeout\r\nNats-Pending-Messages: 12", 9),
]


def receiver_of(wire: Wire | None = None, subjects: str = "$KV.b.") -> Receiver:
    """A receiver; of subscription 7, if a wire is given."""
    receiver = Receiver("b", subjects, lambda: None)
    if wire is not None:
        wire.receivers[b"7"] = receiver
    return receiver


def taken(data: bytes) -> Run | Status:
    """The one thing that a receiver makes of data, all of which it takes."""
    receiver = receiver_of()
    assert receiver.take(data, 0, b"7") == len(data)
    (arrived,) = receiver.waiting
    return arrived


def received(pieces: list[bytes]) -> tuple[list[object], list[bytes]]:
    """What the receiver of subscription 7 and nats-py's parser get."""
    parser = Parser()
    wire = Wire(parser)
    receiver = receiver_of(wire)

    async def feed() -> None:
        for piece in pieces:
            await wire.parse(piece)

    asyncio.run(feed())
    assert receiver.error is None
    flat: list[object] = []
    for arrived in receiver.waiting:
        flat += arrived.updates if isinstance(arrived, Run) else [arrived]
    return flat, parser.units


def test_every_message_is_decoded_in_order_and_the_rest_is_left_to_nats_py():
    updates, others = received([b"".join(STREAM)])
    assert others == [OTHERS[3], OTHERS[0], OTHERS[1], OTHERS[2]]
    assert [type(each) for each in updates] == [
        Put,
        Put,
        Put,
        Status,
        Delete,
        Purge,
        Purge,
        Put,
        Status,
    ]
    assert [getattr(each, "key", None) for each in updates] == [
        *("a", "ü.\x0b", "large", None, "a", "b", "c", "d", None)
    ]
    assert updates[7] == Put("d", b"kept", updates[7].version)
    assert updates[7].version.as_u64() == 70
    assert (updates[3].code, updates[3].headers["Nats-Last-Consumer"]) == ("100", "3")
    assert (updates[8].number, updates[8].headers["Nats-Pending-Messages"]) == (9, "12")


@pytest.mark.parametrize("seed", range(20))
def test_it_does_not_matter_where_reads_from_the_socket_cut(seed):
    data, chance = b"".join(STREAM), random.Random(seed)
    cuts = sorted(chance.sample(range(len(data)), 400 if seed else 10))
    cuts = sorted({*cuts, *chance.sample(range(300), 100)})
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)])]
    assert received(pieces) == received([data])


def test_messages_may_be_cut_anywhere():
    """Also between a message and the end of its line."""
    data = message(b"a", 1, b"1") + OTHERS[0] + message(b"b", 2, b"") + message(b"c", 3, b"3")
    data += status(b"100 Beat") + OTHERS[1]
    whole = received([data])
    for cut in range(len(data)):
        assert received([data[:cut], data[cut:]]) == whole


def test_a_status_that_answers_no_request_has_the_number_0():
    assert taken(status(b"100 Beat").replace(b"_INBOX.x.1 ", b"_INBOX.x.beat ")).number == 0


def test_the_last_message_of_a_run_tells_its_position():
    run = taken(message(b"a", 1, b"xy") + message(b"b", 2, b"z"))
    assert (run.last, run.stored_ns, run.pending, run.size) == (20, 99, 3, 3)


@pytest.mark.parametrize(
    "reply",
    [
        "KV_b.c.1.7.1.99.3",
        "hub.ACC.KV_b.c.1.7.1.99.3",
        "hub.ACC.KV_b.c.1.7.1.99.3.random",
        "_.A.KV_b.c.1.7.1.99.3.5",
    ],
)
def test_a_domain_adds_tokens_to_a_reply(reply):
    receiver = receiver_of()
    data = b"MSG $KV.b.a 7 $JS.ACK.%s 2\r\nxy\r\n" % reply.encode()
    assert receiver.take(data, 0, b"7") == len(data)
    (run,) = receiver.waiting
    assert (run.last, run.stored_ns, run.pending, receiver.delivered) == (7, 99, 3, 1)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (message(b"a", 2, b""), UpstreamLost, "message 2 of the consumer came after 0"),
        (message(b"a\xff", 1, b""), UpstreamRefused, "key b'a\\\\xff' is not UTF-8"),
        (message(b"a", 1, b"").replace(b".10.1.", b".x.y."), UpstreamLost, "cannot be read"),
        (status(b"100 Beat").replace(b" 7 ", b" 7 reply "), UpstreamLost, "cannot be read"),
    ],
)
def test_what_cannot_be_held_ends_the_receiver_and_not_the_connection(data, error, text):
    """A key that is not UTF-8 ended nats-py's reading with an error in its log. All that the link
    saw was silence, again and again."""
    parser = Parser()
    wire = Wire(parser)
    receiver = receiver_of(wire)
    asyncio.run(wire.parse(data + message(b"z", 1, b"") + OTHERS[0]))
    assert parser.units == [OTHERS[0]]
    with pytest.raises(error, match=text):
        raise receiver.error
    assert not receiver.waiting


def test_a_status_of_an_older_server_is_read():
    """NATS 2.9 writes two spaces where the reply of a status would be. No status of it was read,
    and no mirror of it ever came into step."""
    told = taken(status(b"408 Requests Pending").replace(b" 7 ", b" 7  "))
    assert (told.number, told.code, told.text) == (1, "408", "Requests Pending")


def test_a_status_and_its_headers_are_read():
    raw = b"NATS/1.0 409 Message Size Exceeds MaxBytes\r\nNats-Pending-Bytes: 7\r\n\r\n"
    assert headers_of(raw) == {
        "Status": "409",
        "Description": "Message Size Exceeds MaxBytes",
        "Nats-Pending-Bytes": "7",
    }
    assert headers_of(b"NATS/1.0 503\r\n\r\n") == {"Status": "503", "Description": ""}
    assert headers_of(b"NATS/1.0\r\nA: b\r\n\r\n") == {"A": "b"}


@pytest.mark.parametrize("line", [b"\r\n", b"MSG a 7\r\n", b"MSG a 7 x\r\n", b"MSG a 7 1 x\r\n"])
def test_a_line_that_is_no_message_is_left_to_nats_py(line):
    updates, others = received([line + message(b"k", 1, b"") + OTHERS[0]])
    assert others == [line, OTHERS[0]]
    assert [update.key for update in updates] == ["k"]


def test_a_message_that_comes_in_many_reads_is_not_searched_at_each(monkeypatch):
    """Else the work for a large one would be the square of its size."""
    units, unit = [], nats_wire._unit

    def counted(data, at):
        units.append(at)
        return unit(data, at)

    monkeypatch.setattr(nats_wire, "_unit", counted)
    data = message(b"large", 1, b"v" * 10_000)
    (update,), _ = received([data[at : at + 100] for at in range(0, len(data), 100)])
    assert len(update.value) == 10_000
    assert len(units) < 10


def test_what_is_received_and_what_fails_wakes_the_reader_and_the_first_failure_counts():
    woken = []
    receiver = Receiver("b", "$KV.b.", lambda: woken.append(receiver.error))
    data = message(b"a", 1, b"") + status(b"100 Beat")
    assert receiver.take(data, receiver.take(data, 0, b"7"), b"7") == len(data)
    first, second = UpstreamLost("first"), UpstreamLost("second")
    receiver.fail(first)
    receiver.fail(second)
    assert woken[0] is None
    assert woken[-2:] == [first, first]
    assert [type(arrived) for arrived in receiver.waiting] == [Run, Status]


def test_a_new_connection_begins_with_nothing_of_the_one_before():
    parser = Parser()
    wire = Wire(parser)
    receiver = receiver_of(wire)
    asyncio.run(wire.parse(OTHERS[0] + message(b"half", 1, b"1")[:-5]))
    wire.reset()
    assert parser.units == []
    asyncio.run(wire.parse(message(b"whole", 1, b"1")))
    (run,) = receiver.waiting
    assert [update.key for update in run.updates] == ["whole"]


def test_headers_are_decoded_once_unless_they_are_long():
    nats_wire._cached_removal.cache_clear()
    start = b"NATS/1.0\r\nKV-Operation: DEL\r\nX: "
    for size in (nats_wire.CACHED_HEADER_BYTES, nats_wire.CACHED_HEADER_BYTES + 1) * 2:
        assert nats_wire._removal(start + b"x" * (size - len(start) - 4) + b"\r\n\r\n") is Delete
    found = nats_wire._cached_removal.cache_info()
    assert (found.hits, found.misses) == (1, 1)


# Large reads.


def plain_run(numbers: range, value: bytes = b"v" * 60) -> bytes:
    return b"".join(message(b"k.%05d" % number, number, value) for number in numbers)


def headed_run(numbers: range, headers: bytes = b"Nats-Msg-Size: 60") -> bytes:
    """As in a pass that asks for headers alone."""
    return b"".join(message(b"k.%05d" % number, number, b"", headers) for number in numbers)


def random_stream(chance: random.Random) -> bytes:
    """Runs of messages of every form, with whatever else comes between them."""
    parts: list[bytes] = []
    number = 1
    forms = [
        lambda key, at: message(key, at, chance.randbytes(chance.choice((0, 9, 80, 900)))),
        lambda key, at: message(key, at, b"line\r\nline\r\n"),
        lambda key, at: message(key, at, b"\r\nMSG $KV.b.x 7 $JS.ACK.KV_b.c.1.1.%d.1.1 0\r\n" % at),
        lambda key, at: message(key, at, b"", b"Nats-Msg-Size: %d" % chance.randrange(2000)),
        lambda key, at: message(key, at, b"", b"KV-Operation: DEL"),
        lambda key, at: message(key, at, b"", b"KV-Operation: PURGE\r\nNats-Rollup: sub"),
        lambda key, at: message(key, at, b"", b"Nats-Marker-Reason: MaxAge"),
        lambda key, at: message(key, at, b"value", b"My-Header: KV-Operation"),
        # A value that goes on as if it were the next message.
        lambda key, at: message(key, at, b"\r\n" + headed_run(range(at + 1, at + 2))[:-2], b"A: b"),
        lambda key, at: (
            message(key, 1, b"of another subscription", sid=8)
            + message(key, at, b"as long: 23 bytes as it")
        ),
    ]
    while number < 400:
        form = chance.choice(forms)
        for _ in range(chance.choice((1, 2, 60))):
            key = chance.choice(("k.%d", "\u00fc.\x0b%d", "KV-Operation:%d")) % number
            parts.append(form(key.encode(), number))
            number += 1
        if chance.random() < 0.3:
            parts.append(chance.choice((*OTHERS, status(b"100 Idle Heartbeat"))))
    return b"".join(parts)


@pytest.mark.parametrize("seed", range(30))
def test_a_large_read_is_decoded_as_its_messages_are_one_by_one(seed, monkeypatch):
    chance = random.Random(seed)
    data = random_stream(chance)
    cuts = [0, *sorted(chance.sample(range(1, len(data)), 4)), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(cuts)]
    monkeypatch.setattr(nats_wire, "FEW", 0)  # tried at each read
    in_bulk = received(pieces)
    monkeypatch.setattr(nats_wire, "MIN_BYTES", len(data) + 1)
    assert in_bulk == received(pieces)


@pytest.mark.parametrize("run", [plain_run, headed_run])
def test_a_large_read_takes_no_loop_over_its_messages(run):
    """Each message took a turn of the loop, and a tuple that the garbage collector visited: half of
    the processor time of a load."""

    def lines(count: int) -> int:
        receiver = receiver_of()
        data = run(range(1, count + 1))
        work = work_of(receiver.take, data, 0, b"7")
        assert sum(len(each.updates) for each in receiver.waiting) == count
        return work.lines

    assert lines(1000) - lines(500) <= 500 * 2  # slicing the versions


@pytest.mark.parametrize("run", [plain_run, headed_run])
@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_message_is_not_taken_before_its_last_byte(run, missing):
    receiver = receiver_of()
    data = run(range(1, 301))
    at = receiver.take(data[:-missing], 0, b"7")
    assert (at, receiver.delivered) == (len(run(range(1, 300))), 299)


def test_the_consumers_of_a_bucket_share_what_is_compiled(monkeypatch):
    """Compiling took 20 ms of each attachment and of each audit, more than to read 5,000 keys."""
    compiled = calls_of(monkeypatch, re._compiler, "compile")
    for sid, consumer in ((7, b"c"), (8, b"d"), (9, b"e")):
        receiver = receiver_of(subjects="$KV.bucket-of-its-own.")
        data = b"".join(message(b"k", number, bytes(60), sid=sid) for number in range(1, 101))
        data = data.replace(b"KV_b.c.", b"KV_b.%s." % consumer)
        data = data.replace(b"$KV.b.", b"$KV.bucket-of-its-own.")
        assert receiver.take(data, 0, b"%d" % sid) == len(data)
        assert receiver.delivered == 100
    assert len(compiled) == 3  # one message, many of them, and many with headers alone


def test_values_that_all_contain_line_ends_are_not_tried_in_bulk_at_each_read(monkeypatch):
    receiver = receiver_of()
    tried = calls_of(monkeypatch, nats_bulk.BulkDecoder, "take")
    number = 1
    for _ in range(3 * nats_wire.PAUSE):
        data = plain_run(range(number, number + 100), b"line\r\nline\r\n" * 4)
        assert receiver.take(data, 0, b"7") == len(data)
        number += 100
    assert receiver.delivered == number - 1
    assert len(tried) == 3


@pytest.mark.parametrize("run", [plain_run, headed_run])
def test_a_gap_within_a_large_read_is_noticed(run):
    receiver = receiver_of()
    with pytest.raises(UpstreamLost, match="message 302 of the consumer came after 300"):
        receiver.take(run(range(1, 301)) + run(range(302, 601)), 0, b"7")


def test_a_key_within_a_large_read_that_is_not_utf_8_is_named():
    receiver = receiver_of()
    data = plain_run(range(1, 301)) + message(b"a\xff", 301, b"") + plain_run(range(302, 401))
    with pytest.raises(UnicodeDecodeError) as raised:
        receiver.take(data, 0, b"7")
    receiver.fail(raised.value)
    with pytest.raises(UpstreamRefused, match="key b'a\\\\xff' is not UTF-8"):
        raise receiver.error


@pytest.mark.parametrize("count", [1, 300])
def test_a_sequence_beyond_64_bits_ends_the_receiver(count):
    wire = Wire(Parser())
    receiver = receiver_of(wire)
    data = plain_run(range(1, count + 1)).replace(
        b".%d.%d.99" % (count * 10, count), b".%d.%d.99" % (2**64, count)
    )
    asyncio.run(wire.parse(data))
    with pytest.raises(UpstreamLost, match="cannot be read"):
        raise receiver.error
