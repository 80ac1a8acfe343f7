"""Pull requests, one by one: what is asked for, what the answers mean, and when reading ends. The
test is the server; time is virtual."""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import SimpleNamespace

import pytest
from virtual_time import in_virtual_time

from foldlog.protocol.updates import UpdateColumns
from foldlog.protocol.upstream import UpstreamLost
from foldlog.upstreams import nats_pull
from foldlog.upstreams.nats_pull import HEARTBEAT_S, SILENCE_S, Pass, Piece, Pull
from foldlog.upstreams.nats_wire import Run, Status

pytest.importorskip("nats", reason="nats-py is not installed: the extra `nats`")

BATCH = 10


@pytest.fixture(autouse=True)
def _small_and_virtual(monkeypatch):
    monkeypatch.setattr(nats_pull, "REQUEST_MESSAGES", BATCH)
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(nats_pull, "time", clock)


class Server:
    """In the place of a connection. Keeps the requests, and answers when the test says so."""

    who = "b"

    def __init__(self, *reached: tuple[int, int]) -> None:
        self.requests: list[dict] = []
        self.pieces: list[Piece] = []
        """What was read."""
        self.sent = self.looks = 0
        self.is_lost = False
        self.reached = list(reached)
        """What a look at the consumer tells, in turn; the last one from then on."""
        self.pull = Pull(self, "NEXT", "_INBOX.x", "$KV.b.")

    def check(self) -> None:
        if self.is_lost:
            raise UpstreamLost("b: the connection is lost")

    async def tell(self, subject, body, reply):
        self.requests.append(json.loads(body))
        assert (subject, reply) == ("NEXT", f"_INBOX.x.{len(self.requests)}")

    async def where(self):
        self.looks += 1
        return self.reached.pop(0) if len(self.reached) > 1 else self.reached[0]

    def only(self, last=0, **options) -> Pass:
        return Pass(last, self.where, **options)

    def send(self, count=1, pending=0, size=1) -> None:
        """Deliver messages, as one run."""
        receiver = self.pull.receiver
        numbers = range(self.sent + 1, self.sent + count + 1)
        keys = [f"k.{n}" for n in numbers]
        puts = UpdateColumns(keys, [b""] * count, [n.to_bytes(8, "big") for n in numbers])
        self.sent = receiver.delivered = self.sent + count
        receiver.waiting.append(Run(puts, self.sent, self.sent * 100, pending, size * count))
        receiver.wake()

    def end(self, number, line, left=None, **headers) -> None:
        """End a request, or beat (number 0)."""
        if left is not None:
            headers["Nats-Pending-Messages"] = str(left)
        code, _, text = line.partition(" ")
        receiver = self.pull.receiver
        receiver.waiting.append(Status(number, code, text, headers))
        receiver.wake()

    def beat(self, delivered=None) -> None:
        told = {} if delivered is None else {"Nats-Last-Consumer": str(delivered)}
        self.end(0, "100 Idle Heartbeat", **told)

    async def ended(self) -> None:
        """Reading has ended: raises what it ended with."""
        await settled()
        assert self.task.done()
        self.task.result()


def keys(piece) -> list[str]:
    return [update.key for update in piece.updates]


@contextlib.asynccontextmanager
async def reading(server, only=None):
    """Read from the server, as a tail or as the pass `only`, for as long as the block runs."""

    async def read():
        async for piece in server.pull.pieces(only):
            server.pieces.append(piece)

    server.task = asyncio.ensure_future(read())
    await settled()
    try:
        yield
    finally:
        server.task.cancel()
        await asyncio.gather(server.task, return_exceptions=True)


async def settled() -> None:
    """Until everybody waits for something to arrive."""
    for _ in range(20):
        await asyncio.sleep(0)


# Requests.


@in_virtual_time
async def test_a_tail_asks_for_heartbeats_and_a_pass_for_what_there_is():
    limits = {"batch": BATCH, "max_bytes": nats_pull.REQUEST_BYTES}
    async with reading(server := Server()):
        tail = {"expires": 30_000_000_000, "idle_heartbeat": 1_000_000_000}
        assert server.requests[0] == limits | tail
    async with reading(server := Server(), server.only()):
        assert server.requests[0] == limits | {"no_wait": True}


@in_virtual_time
async def test_a_server_that_leaves_out_large_messages_is_asked_for_few_without_a_limit():
    async with reading(server := Server(), server.only(drops_oversize=True)):
        few = {"batch": nats_pull.UNLIMITED_MESSAGES, "no_wait": True}
        assert server.requests == [few] * 2


@in_virtual_time
async def test_two_requests_are_open_and_another_one_once_half_is_served():
    async with reading(server := Server()):
        counts = [len(server.requests)]
        for count in (BATCH - 1, 1, BATCH, BATCH - 1, 1):
            server.send(count)
            await settled()
            counts.append(len(server.requests))
    assert counts == [2, 2, 3, 4, 4, 5]


@pytest.mark.parametrize(
    ("line", "left", "requests"),
    [
        ("408 Request Timeout", None, 3),  # all that the request asked for
        ("408 Request Timeout", BATCH, 3),
        ("408 Request Timeout", BATCH - 1, 2),  # one came, and will be counted as it is taken
        ("408 Request Timeout", 0, 2),
        ("408 Request Timeout", 1000, 4),  # more than was asked for: nothing is owed
        ("409 Batch Completed", None, 3),
        ("409 Batch Completed", 0, 2),
        ("408 Requests Pending", None, 3),
    ],
)
@in_virtual_time
async def test_what_a_request_that_ends_did_not_bring_is_asked_for_again(line, left, requests):
    async with reading(server := Server()):
        server.end(1, line, left)
        await settled()
        assert len(server.requests) == requests


@in_virtual_time
async def test_a_request_that_ends_counts_what_it_asked_for_and_not_what_is_asked_for_now():
    async with reading(server := Server()):
        server.end(1, "409 Exceeded MaxRequestBatch of 4", 0)  # both are open: 20 messages
        server.end(2, "408 Request Timeout")  # leaves 10
        await settled()
        assert len(server.requests) == 2
        server.end(7, "408 Request Timeout")  # of no request that is known: those of one, 4
        server.send(1)  # leaves 5
        await settled()
        assert len(server.requests) == 2
        server.send(1)
        await settled()
        assert [request["batch"] for request in server.requests[2:]] == [4]


@pytest.mark.parametrize(("limit", "batch"), [(1, 1), (4, 4), (BATCH + 1, BATCH)])
@in_virtual_time
async def test_a_servers_limit_makes_requests_smaller_and_never_larger(limit, batch):
    async with reading(server := Server()):
        for number in (1, 2):
            server.end(number, f"409 Exceeded MaxRequestBatch of {limit}", BATCH)
        await settled()
        assert {request["batch"] for request in server.requests[2:]} == {batch}


@in_virtual_time
async def test_no_more_than_the_newest_requests_are_remembered():
    async with reading(server := Server()):
        for _ in range(200):
            server.send(BATCH)
            await settled()
        assert (len(server.requests), len(server.pull._asked)) == (202, 64)


# A message for which a request has no bytes left.

TOO_LARGE = "409 Message Size Exceeds MaxBytes"


def asked(server, since) -> list[tuple[int, bool]]:
    """How many messages the requests after the first few ask for, and whether within a limit."""
    return [(request["batch"], "max_bytes" in request) for request in server.requests[since:]]


@in_virtual_time
async def test_a_message_over_the_limit_is_asked_for_alone_without_a_limit_and_then_all_goes_on():
    async with reading(server := Server()):
        server.end(1, TOO_LARGE, BATCH)
        await settled()
        assert asked(server, 2) == [(1, False)]
        server.beat()
        await settled()
        assert asked(server, 2) == [(1, False)]
        server.send()
        await settled()
        assert asked(server, 3) == [(BATCH, True)] * 2
        assert keys(server.pieces[-1]) == ["k.1"]


@in_virtual_time
async def test_a_request_that_brought_something_first_is_asked_again_with_its_limit():
    """Its bytes were used up: the message may well fit the next one."""
    async with reading(server := Server()):
        server.send(3)
        server.end(1, TOO_LARGE, BATCH - 3)
        await settled()
        assert asked(server, 2) == [(BATCH, True)] * 2


@in_virtual_time
async def test_a_request_for_one_message_that_brings_none_is_not_waited_for():
    async with reading(server := Server()):
        server.end(1, TOO_LARGE, BATCH)
        await settled()
        server.end(2, "408 Request Timeout", 0)  # an older one, which the 409 has ended
        await settled()
        assert len(server.requests) == 3
        server.end(3, "408 Request Timeout", 1)
        await settled()
        assert len(server.requests) == 5


# Ends that are failures.


@pytest.mark.parametrize(
    "line",
    [
        "409 Consumer Deleted",
        "409 Leadership Change",
        "409 Exceeded MaxRequestBatch of 0",
        "409 Exceeded MaxWaiting",
        "503 No Responders",
        "503 Message Size Exceeds MaxBytes",
        "503 Exceeded MaxRequestBatch of 4",
        "503 Batch Completed",
        "408x",
    ],
)
@in_virtual_time
async def test_an_unexpected_end_is_told_and_ends_reading(line):
    async with reading(server := Server()):
        server.end(1, line)
        with pytest.raises(UpstreamLost, match=f"b: {line}"):
            await server.ended()


# Heartbeats and silence.


@in_virtual_time
async def test_a_heartbeat_tells_that_nothing_is_pending_and_silence_tells_nothing():
    async with reading(server := Server()):
        server.send(pending=5)
        await asyncio.sleep(0.1)
        server.beat(1)
        await asyncio.sleep(0.1)
        server.beat()  # of an old server, which does not say what it sent
        await asyncio.sleep(2.9)
        assert [(len(piece.updates), piece.pending) for piece in server.pieces] == [
            (1, 5),
            (0, 0),
            (0, 0),
        ]


@in_virtual_time
async def test_a_piece_that_leaves_something_waiting_does_not_tell_what_is_pending(monkeypatch):
    monkeypatch.setattr(nats_pull, "PIECE_UPDATES", 2)
    async with reading(server := Server()):
        for _ in range(3):
            server.send(1, pending=7)
        await settled()
        told = [(len(piece.updates), piece.pending, piece.last) for piece in server.pieces]
        assert told == [(2, None, 2), (1, 7, 3)]


@in_virtual_time
async def test_a_server_is_let_go_of_only_after_the_whole_silence():
    async with reading(server := Server()):
        for _ in range(5):
            await asyncio.sleep(SILENCE_S - 0.5)
            server.beat()
        await asyncio.sleep(SILENCE_S)
        assert not server.task.done()
        await asyncio.sleep(HEARTBEAT_S)
        with pytest.raises(UpstreamLost, match="no heartbeat"):
            await server.ended()


@in_virtual_time
async def test_silence_is_counted_from_when_the_first_request_is_made():
    """The consumer was made before, which may take its time."""
    server = Server()
    await asyncio.sleep(100)
    async with reading(server):
        await asyncio.sleep(SILENCE_S - 0.5)
        assert not server.task.done()
        assert server.pieces == []


@in_virtual_time
async def test_messages_that_a_heartbeat_tells_of_and_that_never_came_are_a_gap():
    async with reading(server := Server()):
        server.send(2)
        server.beat(2)
        await settled()
        assert not server.task.done()
        server.beat(3)
        with pytest.raises(UpstreamLost, match="messages up to 3 of the consumer are lost"):
            await server.ended()


@in_virtual_time
async def test_a_lost_connection_is_noticed_at_once():
    async with reading(server := Server()):
        server.is_lost = True
        server.pull.receiver.wake()
        with pytest.raises(UpstreamLost, match="the connection is lost"):
            await server.ended()


@in_virtual_time
async def test_what_came_before_a_failure_is_taken_before_the_failure_is_told():
    async with reading(server := Server()):
        server.send(2)
        server.pull.receiver.fail(UpstreamLost("b: a gap"))
        with pytest.raises(UpstreamLost, match="b: a gap"):
            await server.ended()
        assert list(map(keys, server.pieces)) == [["k.1", "k.2"]]


# Passes.

NOTHING_LEFT = "404 No Messages"


@in_virtual_time
async def test_a_pass_makes_large_pieces_of_what_comes_and_ends_when_nothing_is_left(monkeypatch):
    monkeypatch.setattr(nats_pull, "PIECE_UPDATES", 5)
    async with reading(server := Server(), server.only()):
        for count in (2, 2, 2, 1):
            server.send(count, pending=9)
            await settled()
        assert [len(piece.updates) for piece in server.pieces] == [6]
        server.end(1, NOTHING_LEFT)
        await server.ended()
        told = [(len(piece.updates), piece.last, piece.stored_ns) for piece in server.pieces]
        assert told == [(6, 6, 600), (1, 7, 700)]


@in_virtual_time
async def test_a_pass_asks_for_more_while_it_fills_a_piece():
    async with reading(server := Server(), server.only()):
        for count in (2, 3, 4):
            assert len(server.requests) == count
            server.send(BATCH)
            await settled()


@in_virtual_time
async def test_a_pass_over_nothing_has_no_pieces():
    async with reading(server := Server(), server.only()):
        await asyncio.sleep(0.1)
        server.end(1, NOTHING_LEFT)
        await server.ended()
        assert server.pieces == []


@pytest.mark.parametrize(("size", "pieces"), [(99, [2]), (100, [1, 1])])
@in_virtual_time
async def test_a_piece_is_full_once_it_has_its_bytes(monkeypatch, size, pieces):
    monkeypatch.setattr(nats_pull, "PIECE_BYTES", 100)
    async with reading(server := Server(), server.only()):
        server.send(size=size)
        await settled()
        server.end(1, NOTHING_LEFT)
        server.send(size=1)
        await settled()
        assert [len(piece.updates) for piece in server.pieces] == pieces


async def refuse(server, times=nats_pull.MAX_REFUSALS) -> None:
    for _ in range(times):
        server.end(1, "408 Requests Pending", 0)
    await settled()


@in_virtual_time
async def test_a_pass_is_looked_at_after_a_number_of_refusals_in_a_row():
    few = nats_pull.MAX_REFUSALS - 1
    async with reading(server := Server((1, 9)), server.only(last=9)):
        for times, looks in ((few, 0), (1, 1), (few, 1), (1, 2)):
            await refuse(server, times)
            assert server.looks == looks
        for interrupt in (lambda: server.end(1, "408 Request Timeout", 0), server.send):
            await refuse(server, few)
            interrupt()
            await settled()
        await refuse(server, few)
        assert server.looks == 2


@in_virtual_time
async def test_a_pass_is_looked_at_after_half_of_the_silence():
    async with reading(server := Server((0, 9)), server.only(last=9)):
        for looks, time_s in enumerate((SILENCE_S / 2 + 0.1, 0.5, 0.5)):  # every half a heartbeat
            await asyncio.sleep(time_s)
            assert server.looks == looks
        await server.ended()
        assert server.pieces == []


ENDS = {
    "reached, and all is taken": ([(2, 9)], True),
    "past the end": ([(2, 10)], True),
    "one short of the end": ([(2, 8)], False),
    "one is still under way": ([(3, 9)], False),
    "more was taken than it had sent by then": ([(1, 9)], True),
    "it moved between two looks": ([(1, 8), (2, 9)], False),
}


@pytest.mark.parametrize("case", sorted(ENDS))
@in_virtual_time
async def test_a_pass_whose_end_is_not_told_ends_once_two_looks_say_that_all_is_taken(case):
    """A message that the consumer had sent, and that had not come yet, was left out of a pass: an
    audit then took its key for one that the upstream does not have."""
    reached, ends = ENDS[case]
    async with reading(server := Server(*reached), server.only(last=9)):
        server.send(2)
        await settled()
        for _ in range(2):
            await refuse(server)
        assert server.looks == 2
        assert server.task.done() is ends
        assert list(map(keys, server.pieces)) == ([["k.1", "k.2"]] if ends else [])


@in_virtual_time
async def test_a_message_that_comes_during_a_look_belongs_to_the_pass():
    server = Server((1, 9))

    async def where():
        if server.looks == 1:
            server.send()
        return await server.where()

    async with reading(server, Pass(9, where)):
        await refuse(server, 1)
        for _ in range(2):
            await refuse(server)
        assert not server.task.done()
        server.end(1, NOTHING_LEFT)
        await server.ended()
        assert list(map(keys, server.pieces)) == [["k.1"]]


@in_virtual_time
async def test_a_pass_from_which_a_message_may_have_been_left_out_is_not_taken_for_complete():
    async with reading(server := Server((1, 9)), server.only(last=9)):
        server.end(1, TOO_LARGE, BATCH)
        server.send()
        for _ in range(2):
            await refuse(server)
        with pytest.raises(UpstreamLost, match="messages are pending that do not come"):
            await server.task


# What waiting takes, and when it ends.

MESSAGES = 50


@in_virtual_time
async def test_waiting_for_messages_takes_one_timer_rather_than_one_for_each(monkeypatch):
    loop, server, made = asyncio.get_running_loop(), Server(), []
    call_later = loop.call_later

    def counted(delay_s, *arguments):
        made.append(delay_s)
        return call_later(delay_s, *arguments)

    monkeypatch.setattr(loop, "call_later", counted)
    async with contextlib.aclosing(server.pull.pieces()) as pieces:
        for number in range(1, MESSAGES + 1):
            loop.call_soon(server.send)
            assert (await anext(pieces)).last == number
    server.pull.close()
    assert made == [HEARTBEAT_S / 2]
