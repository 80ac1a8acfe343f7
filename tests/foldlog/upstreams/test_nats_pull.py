"""Pull requests, one by one: what is asked for, what the answers mean, and when reading ends. The
test is the server; time is virtual."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
import virtual_time

from foldlog.protocol.updates import UpdateColumns
from foldlog.protocol.upstream import UpstreamLost
from foldlog.upstreams import nats_pull
from foldlog.upstreams.nats_pull import HEARTBEAT_S, SILENCE_S, Pass, Pull
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

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.sent = self.looks = 0
        self.is_lost = False
        self.reached = [(0, 0)]
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


def run(script):
    """Run a test, given a server and the event loop."""

    async def main():
        return await script(Server(), asyncio.get_running_loop())

    return virtual_time.run(main())


async def settled() -> None:
    """Until everybody waits for something to arrive."""
    for _ in range(20):
        await asyncio.sleep(0)


def reading(server, only=None):
    """The pieces that are read, as a list that grows; and the task that reads."""
    pieces = []

    async def read():
        async for piece in server.pull.pieces(only):
            pieces.append(piece)  # noqa: PERF401 - one by one

    return pieces, asyncio.ensure_future(read())


async def let_go(task) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def keys(piece) -> list[str]:
    return [update.key for update in piece.updates]


# Requests.


def test_a_tail_asks_for_heartbeats_and_a_pass_for_what_there_is():
    async def script(server, loop):
        _, task = reading(server)
        await settled()
        await let_go(task)
        tail = server.requests[0]
        server = Server()
        _, task = reading(server, server.only())
        await settled()
        await let_go(task)
        return tail, server.requests[0]

    limits = {"batch": BATCH, "max_bytes": nats_pull.REQUEST_BYTES}
    assert run(script) == (
        limits | {"expires": 30_000_000_000, "idle_heartbeat": 1_000_000_000},
        limits | {"no_wait": True},
    )


def test_a_server_that_leaves_out_large_messages_is_asked_for_few_without_a_limit():
    async def script(server, loop):
        _, task = reading(server, server.only(drops_oversize=True))
        await settled()
        await let_go(task)
        return server.requests

    assert run(script) == [{"batch": nats_pull.UNLIMITED_MESSAGES, "no_wait": True}] * 2


def test_two_requests_are_open_and_another_one_once_half_is_served():
    async def script(server, loop):
        _, task = reading(server)
        await settled()
        counts = [len(server.requests)]
        for count in (BATCH - 1, 1, BATCH, BATCH - 1, 1):
            server.send(count)
            await settled()
            counts.append(len(server.requests))
        await let_go(task)
        return counts

    assert run(script) == [2, 2, 3, 4, 4, 5]


@pytest.mark.parametrize(
    ("line", "left", "asks"),
    [
        ("408 Request Timeout", None, True),  # all that the request asked for
        ("408 Request Timeout", BATCH, True),
        ("408 Request Timeout", BATCH - 1, False),  # one came, and will be counted as it is taken
        ("408 Request Timeout", 0, False),
        ("409 Batch Completed", None, True),
        ("409 Batch Completed", 0, False),
        ("408 Requests Pending", None, True),
    ],
)
def test_what_a_request_that_ends_did_not_bring_is_asked_for_again(line, left, asks):
    async def script(server, loop):
        _, task = reading(server)
        await settled()
        server.end(1, line, left)
        await settled()
        await let_go(task)
        return len(server.requests)

    assert run(script) == (3 if asks else 2)


def test_a_request_that_ends_counts_what_it_asked_for_and_not_what_is_asked_for_now():
    async def script(server, loop):
        _, task = reading(server)
        await settled()
        server.end(1, "409 Exceeded MaxRequestBatch of 4", 0)  # both are open: 20 messages
        server.end(2, "408 Request Timeout")  # leaves 10
        await settled()
        counts = [len(server.requests)]
        server.end(7, "408 Request Timeout")  # of no request that is known: those of one, 4
        server.send(1)  # leaves 5
        await settled()
        counts.append(len(server.requests))
        server.send(1)
        await settled()
        await let_go(task)
        return [*counts, len(server.requests), server.requests[-1]["batch"]]

    assert run(script) == [2, 2, 3, 4]


def test_more_ends_than_were_asked_for_leave_nothing_owed():
    async def script(server, loop):
        _, task = reading(server)
        await settled()
        server.end(1, "408 Request Timeout", 1000)
        await settled()
        await let_go(task)
        return len(server.requests)

    assert run(script) == 4


@pytest.mark.parametrize(("limit", "batch"), [(1, 1), (4, 4), (BATCH + 1, BATCH)])
def test_a_servers_limit_makes_requests_smaller_and_never_larger(limit, batch):
    async def script(server, loop):
        _, task = reading(server)
        await settled()
        for number in (1, 2):
            server.end(number, f"409 Exceeded MaxRequestBatch of {limit}", BATCH)
        await settled()
        await let_go(task)
        return {request["batch"] for request in server.requests[2:]}

    assert run(script) == {batch}


def test_no_more_than_the_newest_requests_are_remembered():
    async def script(server, loop):
        _, task = reading(server)
        for _ in range(200):
            await settled()
            server.send(BATCH)
        await settled()
        await let_go(task)
        return len(server.requests), len(server.pull._asked)

    assert run(script) == (202, 64)


# A message for which a request has no bytes left.


def test_a_message_over_the_limit_is_asked_for_alone_without_a_limit_and_then_all_goes_on():
    async def script(server, loop):
        pieces, task = reading(server)
        await settled()
        server.end(1, "409 Message Size Exceeds MaxBytes", BATCH)
        await settled()
        alone = server.requests[2:]
        server.beat()
        await settled()
        still = server.requests[2:]
        server.send()
        await settled()
        await let_go(task)
        return alone, still, server.requests[3:], keys(pieces[-1])

    alone, still, after, got = run(script)
    assert [(request["batch"], "max_bytes" in request) for request in alone] == [(1, False)]
    assert still == alone
    assert [(request["batch"], "max_bytes" in request) for request in after] == [(BATCH, True)] * 2
    assert got == ["k.1"]


def test_a_request_that_brought_something_first_is_asked_again_with_its_limit():
    """Its bytes were used up: the message may well fit the next one."""

    async def script(server, loop):
        _, task = reading(server)
        await settled()
        server.send(3)
        server.end(1, "409 Message Size Exceeds MaxBytes", BATCH - 3)
        await settled()
        await let_go(task)
        return [(request["batch"], "max_bytes" in request) for request in server.requests[2:]]

    assert run(script) == [(BATCH, True)] * 2


def test_a_request_for_one_message_that_brings_none_is_not_waited_for():
    async def script(server, loop):
        _, task = reading(server)
        await settled()
        server.end(1, "409 Message Size Exceeds MaxBytes", BATCH)
        await settled()
        server.end(2, "408 Request Timeout", 0)  # an older one, which the 409 has ended
        await settled()
        counts = [len(server.requests)]
        server.end(3, "408 Request Timeout", 1)
        await settled()
        await let_go(task)
        return [*counts, len(server.requests)]

    assert run(script) == [3, 5]


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
def test_an_unexpected_end_is_told_and_ends_reading(line):
    async def script(server, loop):
        _, task = reading(server)
        await settled()
        server.end(1, line)
        await settled()
        assert task.done()
        await task

    with pytest.raises(UpstreamLost, match=f"b: {line}"):
        run(script)


# Heartbeats and silence.


def test_a_heartbeat_tells_that_nothing_is_pending_and_silence_tells_nothing():
    async def script(server, loop):
        pieces, task = reading(server)
        server.send(pending=5)
        await asyncio.sleep(0.1)
        server.beat(1)
        await asyncio.sleep(0.1)
        server.beat()  # of an old server, which does not say what it sent
        await settled()
        told = [(len(piece.updates), piece.pending) for piece in pieces]
        await asyncio.sleep(2.9)
        assert len(pieces) == 3
        await let_go(task)
        return told

    assert run(script) == [(1, 5), (0, 0), (0, 0)]


def test_a_piece_that_leaves_something_waiting_does_not_tell_what_is_pending(monkeypatch):
    monkeypatch.setattr(nats_pull, "PIECE_UPDATES", 2)

    async def script(server, loop):
        pieces, task = reading(server)
        for _ in range(3):
            server.send(1, pending=7)
        await settled()
        await let_go(task)
        return [(len(piece.updates), piece.pending, piece.last) for piece in pieces]

    assert run(script) == [(2, None, 2), (1, 7, 3)]


def test_a_server_is_let_go_of_only_after_the_whole_silence():
    async def script(server, loop):
        _, task = reading(server)
        for _ in range(5):
            await asyncio.sleep(nats_pull.SILENCE_S - 0.5)
            server.beat()
        await asyncio.sleep(nats_pull.SILENCE_S)
        assert not task.done()
        await asyncio.sleep(nats_pull.HEARTBEAT_S)
        assert task.done()
        await task

    with pytest.raises(UpstreamLost, match="no heartbeat"):
        run(script)


def test_silence_is_counted_from_when_the_first_request_is_made():
    """The consumer was made before, which may take its time."""

    async def script(server, loop):
        await asyncio.sleep(100)
        pieces, task = reading(server)
        await asyncio.sleep(nats_pull.SILENCE_S - 0.5)
        assert not task.done()
        await let_go(task)
        return pieces

    assert run(script) == []


def test_messages_that_a_heartbeat_tells_of_and_that_never_came_are_a_gap():
    async def script(server, loop):
        _, task = reading(server)
        server.send(2)
        server.beat(2)
        await settled()
        assert not task.done()
        server.beat(3)
        await settled()
        assert task.done()
        await task

    with pytest.raises(UpstreamLost, match="messages up to 3 of the consumer are lost"):
        run(script)


def test_a_lost_connection_is_noticed_at_once():
    async def script(server, loop):
        _, task = reading(server)
        await settled()
        server.is_lost = True
        server.pull.receiver.wake()
        await settled()
        assert task.done()
        await task

    with pytest.raises(UpstreamLost, match="the connection is lost"):
        run(script)


def test_what_came_before_a_failure_is_taken_before_the_failure_is_told():
    async def script(server, loop):
        pieces, task = reading(server)
        await settled()
        server.send(2)
        server.pull.receiver.fail(UpstreamLost("b: a gap"))
        await settled()
        assert task.done()
        return [keys(piece) for piece in pieces], str(task.exception())

    assert run(script) == ([["k.1", "k.2"]], "b: a gap")


# Passes.


def test_a_pass_makes_large_pieces_of_what_comes_and_ends_when_nothing_is_left(monkeypatch):
    monkeypatch.setattr(nats_pull, "PIECE_UPDATES", 5)

    async def script(server, loop):
        pieces, task = reading(server, server.only())
        await settled()
        for count in (2, 2, 2, 1):
            server.send(count, pending=9)
            await settled()
        assert [len(piece.updates) for piece in pieces] == [6]
        server.end(1, "404 No Messages")
        await settled()
        assert task.done()
        return [(len(piece.updates), piece.last, piece.stored_ns) for piece in pieces]

    assert run(script) == [(6, 6, 600), (1, 7, 700)]


def test_a_pass_asks_for_more_while_it_fills_a_piece():
    async def script(server, loop):
        _, task = reading(server, server.only())
        counts = []
        for _ in range(3):
            await settled()
            counts.append(len(server.requests))
            server.send(BATCH)
        await let_go(task)
        return counts

    assert run(script) == [2, 3, 4]


def test_a_pass_over_nothing_has_no_pieces():
    async def script(server, loop):
        pieces, task = reading(server, server.only())
        await asyncio.sleep(0.1)
        server.end(1, "404 No Messages")
        await settled()
        assert task.done()
        return pieces

    assert run(script) == []


@pytest.mark.parametrize("size", [99, 100])
def test_a_piece_is_full_once_it_has_its_bytes(monkeypatch, size):
    monkeypatch.setattr(nats_pull, "PIECE_BYTES", 100)

    async def script(server, loop):
        pieces, task = reading(server, server.only())
        await settled()
        server.send(size=size)
        await settled()
        server.end(1, "404 No Messages")
        server.send(size=1)
        await settled()
        await let_go(task)
        return [len(piece.updates) for piece in pieces]

    assert run(script) == ([1, 1] if size == 100 else [2])


def refuse(server, times) -> None:
    for _ in range(times):
        server.end(1, "408 Requests Pending", 0)


def test_a_pass_is_looked_at_after_a_number_of_refusals_in_a_row():
    async def script(server, loop):
        server.reached = [(1, 9)]
        _, task = reading(server, server.only(last=9))
        await settled()
        looks = []
        for times in (nats_pull.MAX_REFUSALS - 1, 1, nats_pull.MAX_REFUSALS - 1, 1):
            refuse(server, times)
            await settled()
            looks.append(server.looks)
        for interrupt in (lambda: server.end(1, "408 Request Timeout", 0), server.send):
            refuse(server, nats_pull.MAX_REFUSALS - 1)
            interrupt()
            await settled()
        refuse(server, nats_pull.MAX_REFUSALS - 1)
        await settled()
        looks.append(server.looks)
        await let_go(task)
        return looks

    assert run(script) == [0, 1, 1, 2, 2]


def test_a_pass_is_looked_at_after_half_of_the_silence():
    async def script(server, loop):
        server.reached = [(0, 9)]
        pieces, task = reading(server, server.only(last=9))
        looks = []
        for time_s in (nats_pull.SILENCE_S / 2 + 0.1, 0.5, 0.5):  # every half a heartbeat
            await asyncio.sleep(time_s)
            looks.append(server.looks)
        assert task.done()
        return looks, pieces

    assert run(script) == ([0, 1, 2], [])


ENDS = {
    "reached, and all is taken": ([(2, 9)], True),
    "past the end": ([(2, 10)], True),
    "one short of the end": ([(2, 8)], False),
    "one is still under way": ([(3, 9)], False),
    "more was taken than it had sent by then": ([(1, 9)], True),
    "it moved between two looks": ([(1, 8), (2, 9)], False),
}


@pytest.mark.parametrize("case", sorted(ENDS))
def test_a_pass_whose_end_is_not_told_ends_once_two_looks_say_that_all_is_taken(case):
    """A message that the consumer had sent, and that had not come yet, was left out of a pass: an
    audit then took its key for one that the upstream does not have."""

    async def script(server, loop):
        server.reached, ended = list(ENDS[case][0]), ENDS[case][1]
        pieces, task = reading(server, server.only(last=9))
        await settled()
        server.send(2)
        await settled()
        for _ in range(2):
            refuse(server, nats_pull.MAX_REFUSALS)
            await settled()
        assert server.looks == 2
        assert task.done() is ended
        await let_go(task)
        return [keys(piece) for piece in pieces]

    assert run(script) == ([["k.1", "k.2"]] if ENDS[case][1] else [])


def test_a_message_that_comes_during_a_look_belongs_to_the_pass():
    async def script(server, loop):
        server.reached = [(1, 9)]
        tell = server.where

        async def where():
            if server.looks == 1:
                server.send()
            return await tell()

        pieces, task = reading(server, Pass(9, where))
        await settled()
        server.end(1, "408 Requests Pending", 0)
        await settled()
        for _ in range(2):
            refuse(server, nats_pull.MAX_REFUSALS)
            await settled()
        assert not task.done()
        server.end(1, "404 No Messages")
        await settled()
        assert task.done()
        return [keys(piece) for piece in pieces]

    assert run(script) == [["k.1"]]


def test_a_pass_from_which_a_message_may_have_been_left_out_is_not_taken_for_complete():
    async def script(server, loop):
        server.reached = [(1, 9)]
        _, task = reading(server, server.only(last=9))
        await settled()
        server.end(1, "409 Message Size Exceeds MaxBytes", BATCH)
        server.send()
        for _ in range(2):
            refuse(server, nats_pull.MAX_REFUSALS)
            await settled()
        await task

    with pytest.raises(UpstreamLost, match="messages are pending that do not come"):
        run(script)


# What waiting takes, and when it ends.

MESSAGES = 50


class Quiet:
    """A connection that holds, and takes every request."""

    who = "b"

    def check(self):
        pass

    async def tell(self, subject, body, reply):
        pass


def run_of(number: int) -> Run:
    return Run(UpdateColumns(["k"], [b"1"], [b""]), number, 0, 0, 1)


def test_waiting_for_messages_takes_one_timer_rather_than_one_for_each():
    async def timers():
        loop = asyncio.get_running_loop()
        pull, made, call_later = Pull(Quiet(), "s", "i", "$KV.b."), [], loop.call_later

        def counted(delay_s, *arguments):
            made.append(delay_s)
            return call_later(delay_s, *arguments)

        loop.call_later = counted
        pieces = pull.pieces()
        for number in range(1, MESSAGES + 1):
            loop.call_soon(pull.receiver._add, run_of(number))
            assert (await anext(pieces)).last == number
        await pieces.aclose()
        pull.close()
        return made

    assert virtual_time.run(timers()) == [HEARTBEAT_S / 2]


def test_a_consumer_that_is_silent_for_too_long_is_lost():
    async def lost_after():
        loop = asyncio.get_running_loop()
        pull = Pull(Quiet(), "s", "i", "$KV.b.")
        pieces = pull.pieces()
        loop.call_soon(pull.receiver._add, run_of(1))
        assert (await anext(pieces)).last == 1
        heard = loop.time()
        with pytest.raises(UpstreamLost, match="no heartbeat"):
            await anext(pieces)
        return loop.time() - heard

    assert SILENCE_S < virtual_time.run(lost_after()) <= SILENCE_S + HEARTBEAT_S
