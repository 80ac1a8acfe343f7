"""A link whose upstream, hooks or store misbehave, as a test scripts it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import virtual_time
from scripted_upstream import Marked, Plain, Scripted, at, filled
from upstream_kit import DEADLINE_S, mirrored, until
from virtual_link import MemorySink, drive, failed, live, reached

import foldlog
from foldlog import (
    LinkState,
    Put,
    StoreClosed,
    VersionToken,
    WatchCursor,
)
from foldlog.actors.base.mailbox import Inbox
from foldlog.actors.link import attachment
from foldlog.actors.link import link as link_module
from foldlog.actors.link.intake import UNRESTED, Intake, LinkConfig
from foldlog.actors.link.link import Link
from foldlog.actors.link.progress import Progress
from foldlog.mirror import TURN_BYTES, TURN_UPDATES, _Sink
from foldlog.protocol.errors import Backpressure
from foldlog.protocol.updates import MAX_KEY_BYTES, encode_batch
from foldlog.protocol.upstream import (
    UpstreamLost,
    UpstreamMissing,
    UpstreamOversize,
    UpstreamRefused,
)
from foldlog.testing import Fault, FaultyFiles


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    """Do not wait for what a script confirms at once, nor between the restarts of a link."""
    monkeypatch.setattr(attachment, "CONFIRM_S", 0.05)
    monkeypatch.setattr(link_module.random, "uniform", lambda low, high: 0.0)


def values(mirror) -> dict[str, bytes]:
    return dict(mirror.snapshot().items())


def true(upstream) -> dict[str, bytes]:
    return {key: put.value for key, put in upstream.live.items()}


# A server that returns.


@pytest.mark.parametrize("error", [UpstreamLost, UpstreamMissing])
@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_a_server_that_returns_is_asked_within_half_a_second(monkeypatch, error, jitter):
    """So that its first update comes within a second, however long it was away. Each attempt fails
    at once here, as a refused connection does; time is virtual."""
    monkeypatch.setattr(link_module.random, "random", lambda: jitter)
    asked_s: list[float] = []

    class Away(Plain):
        async def identify(self):
            asked_s.append(asyncio.get_running_loop().time())
            link._stopping = len(asked_s) == 200
            raise error("away")

    class Sink:
        def snapshot(self):
            return None

    link = Link("away", Sink(), Away(), LinkConfig())
    virtual_time.run(link._main())
    waits_s = [later - earlier for earlier, later in itertools.pairwise(asked_s)]
    assert max(waits_s) < 0.501
    assert waits_s[-1] >= 0.25  # and a server that stays away is not asked without a pause


# In virtual time: when it attaches again, and when it gives up.


class Failing(Scripted):
    """Each look at it fails with the next of `errors`, while there are any."""

    def __init__(self, *errors: BaseException) -> None:
        super().__init__()
        self.errors, self.closed = list(errors), 0

    async def identify(self):
        if self.errors:
            raise self.errors.pop(0)
        return await super().identify()

    async def close(self):
        self.closed += 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UpstreamLost("away"), "away"),
        (UpstreamMissing("no bucket"), "no bucket"),
        (ConnectionResetError("reset"), "reset"),
        (TimeoutError(), "TimeoutError"),
        (foldlog.StoreFailed("the disk"), "the disk"),
    ],
)
def test_what_may_pass_is_tried_again_and_is_no_restart(error, reason):
    upstream, sink = Failing(error), MemorySink()
    link = drive(sink, upstream, live)
    assert link.states[:3] == [
        (LinkState.ATTACHING, ""),
        (LinkState.LOST, reason),
        (LinkState.LOST, reason),
    ]
    assert link.states[3] == (LinkState.ATTACHING, reason)
    assert (sink.restarts, link.stats().attaches) == ([], 2)
    assert upstream.closed == 2, "once an attachment"


@pytest.mark.parametrize("error", [UpstreamRefused("no"), UpstreamOversize("k is large", "k")])
def test_what_cannot_pass_is_not_tried_again(error):
    async def waits(link):
        await failed(link)
        await asyncio.sleep(10)
        assert link.stats().attaches == 1
        assert (link.error, link.reason) == (error, str(error))
        link.accept_reset()  # none is held
        await asyncio.sleep(10)
        assert link.state is LinkState.FAILED

    link = drive(MemorySink(), Failing(error), waits)
    assert LinkState.LOST not in [state for state, _ in link.states]


def test_attempts_are_counted_from_the_last_confirmation_on(monkeypatch):
    attempts = []

    def noted(attempt, jitter):
        attempts.append(attempt)
        return 0.01

    class Breaks(Failing):
        async def changes(self, after, prefixes):
            async for piece in super().changes(after, prefixes):
                yield piece
                if len(attempts) == 5:
                    raise UpstreamLost("broken")

    monkeypatch.setattr(link_module, "retry_delay_s", noted)
    away, missing = UpstreamLost("away"), UpstreamMissing("gone")
    upstream = Breaks(away, away, away, missing, away)
    drive(MemorySink(), upstream, lambda link: reached(lambda: len(attempts) == 6))
    assert attempts == [1, 2, 3, link_module.MISSING_ATTEMPT, 5, 0]


def test_a_bug_restarts_the_link_with_growing_delays_and_at_last_fails_it(monkeypatch):
    monkeypatch.setattr(link_module.random, "uniform", lambda low, high: low)
    bugs = [RuntimeError(f"bug {number}") for number in range(9)]
    upstream, sink = Failing(*bugs), MemorySink()

    async def waits(link):
        await failed(link)
        await asyncio.sleep(10)
        assert link.error is bugs[3]

    link = drive(sink, upstream, waits, max_restarts=3)
    assert [restart.reason for restart in sink.restarts] == [
        f"RuntimeError: bug {number}" for number in range(3)
    ]
    assert [restart.delay_s for restart in sink.restarts] == [0.0, 0.05, 0.1]
    assert (LinkState.LOST, "RuntimeError: bug 2") in link.states


def test_restarts_long_ago_do_not_count(monkeypatch):
    now_s = itertools.count(step=11.0)
    clock = SimpleNamespace(monotonic=lambda: next(now_s), time=lambda: 0.0)
    monkeypatch.setattr(link_module, "time", clock)
    monkeypatch.setattr(link_module.random, "uniform", lambda low, high: low)
    upstream, sink = Failing(*[RuntimeError("bug")] * 9), MemorySink()
    drive(sink, upstream, live, max_restarts=2, restart_window_s=22.0)
    assert len(sink.restarts) == 9
    assert {restart.delay_s for restart in sink.restarts[1:]} != {0.0}


def test_a_link_whose_store_is_closed_ends_and_one_whose_store_has_failed_does_not():
    sink = MemorySink()

    async def closed(link):
        await live(link)
        sink.error = foldlog.StoreFailed("the disk")
        await reached(lambda: link.state is LinkState.LOST)
        assert link.reason == "the disk"
        await asyncio.sleep(5)
        assert not link._task.done()
        sink.error = StoreClosed("closed")
        await reached(lambda: link._task.done())
        assert link._task.exception() is None

    drive(sink, Failing(), closed, audit_interval_s=1.0)


def test_a_link_that_is_not_attached_does_not_know_how_far_it_is():
    class Breaks(Failing):
        async def changes(self, after, prefixes):
            async for piece in super().changes(after, prefixes):
                yield piece
                if self.errors:
                    raise UpstreamLost("broken")

    upstream = Breaks()

    async def lost(link):
        await live(link)
        assert link.stats().lag == 0
        upstream.errors = [UpstreamLost("away")] * 999
        await reached(lambda: link.state is LinkState.LOST)
        assert link.stats().lag is None

    drive(MemorySink(), upstream, lost)


# An attachment that ends.


def test_a_client_library_that_cancels_its_own_work_does_not_end_the_link(path):
    """A client cancelled the requests that waited when its connection was lost. The link took that
    for its own end, and the mirror said that it was closed."""

    class Cancels(Scripted):
        cancelled = 0

        async def changes(self, after, prefixes):
            if self.cancelled < 2:
                self.cancelled += 1
                raise asyncio.CancelledError
            async for piece in super().changes(after, prefixes):
                yield piece

    upstream = Cancels()
    upstream.put("k", b"1")
    with mirrored(path, upstream) as mirror:
        assert (upstream.cancelled, mirror.stats().link.attaches) == (2, 3)


def test_a_store_that_a_hook_finds_closed_is_not_taken_for_the_mirrors_own(path):
    def parse(update):
        raise StoreClosed("another store of the program")

    upstream = Scripted()
    upstream.put("k")
    with foldlog.mirror(path, upstream, parse=parse) as mirror:
        until(lambda: mirror.link.state is LinkState.FAILED)
        with pytest.raises(StoreClosed, match="another store"):
            mirror.wait_synced(30)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), OSError("hook"), EOFError()])
def test_whatever_a_hook_raises_is_the_links_failure(path, error):
    """An OSError of a hook passed for a lost connection, for ever; an exit ended the thread."""

    def parse(update):
        raise error

    upstream = Scripted()
    upstream.put("k")
    with foldlog.mirror(path, upstream, parse=parse) as mirror:
        until(lambda: mirror.link.state is LinkState.FAILED)
        assert type(error).__name__ in mirror.stats().restarts[-1].reason
        assert len(mirror.stats().restarts) == 5


def test_the_hook_is_called_for_a_batch_that_is_written_while_the_link_detaches(path):
    """The connection was lost while a batch was being written. It was written, and the hook never
    heard of it."""
    writing, go_on = threading.Event(), threading.Event()

    class Breaks(Scripted):
        broken = False

        async def changes(self, after, prefixes):
            async for piece in super().changes(after, prefixes):
                yield piece

        async def revisions(self, prefixes):
            if not self.broken and len(self.updates) > 1:
                self.broken = True
                await asyncio.to_thread(writing.wait, 30)
                raise UpstreamLost("the connection broke")
            return await super().revisions(prefixes)

        async def close(self):
            go_on.set()

    def hook(call):
        if call.operation == "write" and armed.is_set():
            writing.set()
            assert go_on.wait(30)

    armed, applied = threading.Event(), []
    upstream, files = Breaks(), FaultyFiles(hook=hook)
    upstream.put("a", b"1")
    with foldlog.mirror(
        path,
        upstream,
        files=files,
        audit_interval_s=0.01,
        on_applied=lambda updates, cursor: applied.extend(u.key for u in updates),
    ) as mirror:
        mirror.wait_synced(30)
        go_on.clear()
        armed.set()
        upstream.put("b", b"2" * TURN_BYTES)  # the link's thread does not write so much itself
        until(lambda: upstream.broken and mirror.stats().link.attaches == 2)
        armed.clear()
        until(lambda: values(mirror) == true(upstream))
        mirror.wait_synced(30)
    assert applied == ["a", "b"]


def test_a_store_that_refuses_a_batch_is_tried_again_from_its_cursor(path):
    """The cursor is written with the data: what the disk refused is asked for again."""
    upstream, files = Scripted(), FaultyFiles()
    upstream.put("k.0", b"0")
    with mirrored(path, upstream, files=files) as mirror:
        files.arm(*(Fault("write", nth=nth, error=28) for nth in range(1, 4)))
        for number in range(1, 6):
            upstream.put(f"k.{number}", b"%d" % number)
        until(lambda: mirror.link.state is LinkState.LOST)
        until(lambda: values(mirror) == true(upstream))
        assert len(files.fired) >= 1
        assert mirror.cursor() == at(6)
        assert mirror.stats().link.resets == 0


def test_a_disk_that_stalls_holds_up_the_link_and_no_read(path):
    """The link's thread may be the one that writes: it waits with the disk, then goes on."""
    writing, go_on = threading.Event(), threading.Event()

    def hook(call):
        if call.operation == "write" and armed.is_set():
            writing.set()
            assert go_on.wait(60)

    armed, upstream = threading.Event(), Scripted()
    upstream.put("a", b"1")
    with mirrored(path, upstream, files=FaultyFiles(hook=hook)) as mirror:
        armed.set()
        upstream.put("b", b"2")
        try:
            assert writing.wait(30)
            assert values(mirror) == {"a": b"1"}
            assert mirror.stats().link.state is LinkState.LIVE
        finally:
            armed.clear()
            go_on.set()
        until(lambda: values(mirror) == true(upstream))
        assert mirror.stats().link.attaches == 1


# Another past of the upstream.


def test_a_doubt_about_values_outlives_the_attachment_in_which_it_arose(path):
    """The upstream was restored from a copy, and no longer has the message at the cursor: only the
    values tell. The tail moved the cursor to a message that the upstream does have, and then the
    connection was lost, before the audit was done. The next attachment trusted that cursor."""

    class Restored(Marked):
        lost = False

        async def recalls(self, position, mark):
            return (
                None if position == at(3) and self.lost else await super().recalls(position, mark)
            )

        async def state(self, prefixes):
            if self.lost == "now":
                until_moved = asyncio.to_thread(moved.wait, 30)
                await until_moved
                self.lost = True
                raise UpstreamLost("the connection broke")
            async for piece in super().state(prefixes):
                yield piece

    moved = threading.Event()
    upstream = Restored()
    for number in range(3):
        upstream.put(f"k.{number}", b"old")
    mirrored(path, upstream).close()
    upstream.updates[1] = upstream.updates[1]._replace(value=b"new")
    upstream.put("k.3", b"new")
    upstream.past, upstream.lost = b"2", "now"
    with mirrored(path, upstream, on_applied=lambda updates, cursor: moved.set()) as mirror:
        assert values(mirror) == true(upstream)
        assert mirror.cursor() == at(4)
        assert mirror.stats().link.attaches == 2
    with mirrored(path, upstream) as mirror:
        assert mirror.stats().link.mended == 0


# What cannot be held, cannot be sent, or is not confirmed.


def test_a_key_over_the_limit_is_skipped_as_a_value_is_and_is_not_mended(path):
    """It failed the link, whatever `on_oversize` said."""
    upstream, long = Scripted(), "k" * (MAX_KEY_BYTES + 1)
    upstream.put(long, b"1")
    upstream.put("l", b"1")
    with foldlog.mirror(path, upstream, on_oversize="skip", audit_interval_s=0.001) as mirror:
        mirror.wait_synced(30)
        upstream.put(long, b"2")
        until(lambda: mirror.cursor() == at(3))
        audits = mirror.stats().link.audits
        until(lambda: mirror.stats().link.audits > audits + 3)
        link = mirror.stats().link
        assert (values(mirror), link.mended, link.skipped, link.attaches) == ({"l": b"1"}, 0, 1, 1)
        upstream.delete(long)
        until(lambda: mirror.cursor() == at(4))
        assert mirror.stats().link.skipped == 0


def test_an_upstream_that_does_not_let_go_is_left(path, monkeypatch):
    """Its close never ended, and so the link never attached again."""
    monkeypatch.setattr(link_module, "CLOSE_S", 0.05)

    class Clings(Scripted):
        closes = 0

        async def changes(self, after, prefixes):
            if not self.closes:
                raise UpstreamLost("the connection broke")
            async for piece in super().changes(after, prefixes):
                yield piece

        async def close(self):
            self.closes += 1
            await asyncio.Event().wait()

    upstream = Clings()
    upstream.put("k", b"1")
    with mirrored(path, upstream) as mirror:
        assert (upstream.closes, mirror.stats().link.attaches) == (1, 2)
    until(lambda: upstream.closes == 2)


def test_a_batch_waits_for_room_in_the_mailbox_and_is_written_once():
    fed: list[WatchCursor] = []

    class Sink:
        keeps_marks = True

        def feed(self, batch, rewound):
            fed.append(batch.cursor)
            if len(fed) < 3:
                raise Backpressure("the mailbox is full")
            written: Future[int] = Future()
            written.set_result(1)
            return written

    async def apply():
        intake = Intake(Sink(), LinkConfig(), Progress("mailbox"))
        await intake.apply([Put("k", b"1", VersionToken.from_u64(1))], at(1), b"")
        return intake.position

    assert virtual_time.run(apply()) == at(1)
    assert fed == [at(1)] * 3


class Written:
    """A store that has written each batch by the time that `feed` returns."""

    keeps_marks = True

    def feed(self, batch, rewound):
        written: Future[int] = Future()
        written.set_result(1)
        return written


def test_a_batch_that_is_written_at_once_takes_no_pass_of_the_loop():
    """Each update took six passes of the event loop and woke three threads, at 1,000 a second as
    much as half of a core."""
    intake = Intake(Written(), LinkConfig(), Progress("passes"))
    for number in range(1, UNRESTED):
        with pytest.raises(StopIteration):
            intake.apply([Put("k", b"1")], at(number), b"").send(None)
        assert intake.position == at(number)


def test_an_upstream_that_always_has_more_lets_the_loop_run():
    """Or nothing else on it would run: no audit, and no cancellation when the mirror is closed."""

    async def apply():
        intake, ran = Intake(Written(), LinkConfig(), Progress("rests")), []
        asyncio.get_running_loop().call_soon(ran.append, "another")
        for number in range(1, UNRESTED + 1):
            assert not ran
            await intake.apply([Put("k", b"1")], at(number), b"")
        return list(ran)

    assert virtual_time.run(apply()) == ["another"]


class IdleWriter:
    """Writes in a caller's turn as `outcome` says; what it is offered waits."""

    def __init__(self, outcome, own_fault=False):
        self.outcome, self.own_fault, self.turns, self.inbox = outcome, own_fault, 0, Inbox()

    def work_in_turn(self, mail):
        self.turns += 1
        return self.outcome(mail)

    def is_own_fault(self, error):
        return self.own_fault


def sink_of(writer, sync="interval") -> _Sink:
    return _Sink(SimpleNamespace(config=SimpleNamespace(sync=sync)), writer)


def batch_of(size: int, updates: int = 1):
    return encode_batch([Put("k", bytes(size))] * updates, at(1))


def test_what_is_read_while_many_updates_wait_is_handed_over():
    """Else each read of the socket would be a batch of its own: five times as many as when the
    next batch grows while one is written."""
    writer = IdleWriter(lambda mail: True)
    sink_of(writer).feed(batch_of(1, TURN_UPDATES), "")
    sink_of(writer).feed(batch_of(1, TURN_UPDATES + 1), "")
    assert (writer.turns, len(writer.inbox)) == (1, 1)


@pytest.mark.parametrize(
    ("is_idle", "size", "sync", "turns", "offered"),
    [
        (True, 100, "interval", 1, 0),
        (True, 100, "never", 1, 0),
        (False, 100, "interval", 1, 1),
        (True, TURN_BYTES, "interval", 0, 1),  # large: the next is received meanwhile
        (True, 100, "always", 0, 1),  # an fsync would keep heartbeats from being heard
    ],
)
def test_a_small_batch_is_written_by_the_link_while_the_writer_is_idle(
    is_idle, size, sync, turns, offered
):
    writer = IdleWriter(lambda mail: is_idle)
    sink_of(writer, sync).feed(batch_of(size), "")
    assert (writer.turns, len(writer.inbox)) == (turns, offered)


def test_a_batch_that_the_writer_dies_of_in_the_links_turn_is_answered_once():
    """A batch that is withdrawn is not written; one that was begun is the writer's to settle, and
    is not given to it a second time."""

    def dies(begin):
        def outcome(mail):
            assert not begin or mail.message.start()
            raise MemoryError

        return outcome

    with pytest.raises(MemoryError):
        sink_of(IdleWriter(dies(begin=False))).feed(batch_of(1), "")
    for begin, own_fault in ((True, False), (True, True), (False, True)):
        writer = IdleWriter(dies(begin), own_fault)
        answer = sink_of(writer).feed(batch_of(1), "")
        assert not answer.done()
        assert len(writer.inbox) == 0


# Its thread.


def link_to(upstream, **config) -> Link:
    return Link("threaded", MemorySink(), upstream, LinkConfig(**config))


def test_a_link_that_a_hook_of_its_own_stops_does_not_wait_for_itself():
    upstream = filled(Plain, b"a")
    link = link_to(upstream, on_applied=lambda updates, cursor: link.stop())
    assert repr(link) == "<foldlog link attaching>"
    link.start()
    link.thread.join(DEADLINE_S)
    assert (link.state, link.updates, link.error) == (LinkState.CLOSED, 1, None)


def test_stopping_asks_again_and_waits_no_longer_than_it_may():
    """A client library swallowed the cancellation."""
    reading, go_on = threading.Event(), threading.Event()

    class Clings(Plain):
        async def changes(self, after, prefixes):
            while not go_on.is_set():
                reading.set()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
            await asyncio.Event().wait()
            yield

    link = link_to(Clings())
    link.start()
    assert reading.wait(DEADLINE_S)
    link.stop(0.0)
    assert link.thread.is_alive()
    go_on.set()
    link.stop(DEADLINE_S)
    assert not link.thread.is_alive()
    assert link.state is LinkState.CLOSED
    link.stop()  # its loop is closed


def test_in_a_forked_child_a_link_is_not_waited_for_and_its_loop_is_left_alone():
    link = link_to(Plain())
    link._pid, link._loop, link.thread = -1, object(), object()
    link.stop()
    assert link._stopping


@pytest.mark.parametrize(
    ("error", "reason"), [(ValueError("a bug"), "a bug"), (SystemExit(3), "SystemExit(3)")]
)
def test_a_link_that_dies_of_what_it_does_not_expect_has_failed(monkeypatch, error, reason):
    link = link_to(Plain())

    async def die():
        raise error

    monkeypatch.setattr(link, "_main", die)
    link.start()
    link.thread.join(DEADLINE_S)
    assert (link.state, link.reason) == (LinkState.FAILED, reason)
    assert isinstance(link.error, ValueError | foldlog.FoldlogError)
