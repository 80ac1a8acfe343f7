"""Local writes, messages from other actors, waiting for a store without blocking an event loop."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading

import pykka
import pytest
from actor_kit import (
    DEADLINE_S,
    FATAL,
    assert_whole,
    batch,
    cursor,
    in_thread,
    results,
    until,
    waiting,
)
from interrupts import Struck

from foldlog import (
    Apply,
    Compact,
    Delete,
    Export,
    Get,
    KeyExists,
    KvEntry,
    Page,
    Put,
    Range,
    RangePage,
    StoreClosed,
    VersionMismatch,
    VersionToken,
)
from foldlog.actors.base.mailbox import Inbox, Mail, reply
from foldlog.actors.store import internal, requests
from foldlog.actors.store.readers import Reader

ON_EACH_ENGINE = True

# Local writes.


def test_local_writes_carry_their_sequence_as_version_and_leave_the_cursor(open_store):
    store = open_store()
    store.apply(batch(1), cursor(41))
    assert store.put("k", b"1") == VersionToken.from_u64(2)
    assert store.create("new", b"2") == VersionToken.from_u64(3)
    assert store.get("k") == KvEntry("k", b"1", VersionToken.from_u64(2))
    assert store.delete("k") == VersionToken.from_u64(4)
    assert store.get("k") is None
    assert store.delete("never there") == VersionToken.from_u64(5)
    assert store.cursor() == cursor(41)
    assert store.snapshot().seq == 5


def test_conflicts_are_typed_and_write_nothing(open_store):
    store = open_store()
    version = store.put("k", b"1")
    stale = VersionToken.from_u64(99)
    with pytest.raises(KeyExists) as exists:
        store.create("k", b"2")
    assert (exists.value.key, exists.value.version) == ("k", version)
    for write in (
        lambda: store.update("k", b"2", expected=stale),
        lambda: store.delete("k", expected=stale),
    ):
        with pytest.raises(VersionMismatch) as mismatch:
            write()
        assert (mismatch.value.expected, mismatch.value.actual) == (stale, version)
    with pytest.raises(VersionMismatch) as mismatch:
        store.update("absent", b"2", expected=version)
    assert mismatch.value.actual is None
    with pytest.raises(TypeError):
        store.update("k", b"2", expected=b"raw")
    assert store.snapshot().seq == 1
    assert store.update("k", b"2", expected=version) == VersionToken.from_u64(2)
    assert store.delete("k", expected=VersionToken.from_u64(2)) == VersionToken.from_u64(3)
    assert store.create("k", b"again") == VersionToken.from_u64(4)


def test_a_conflict_within_a_commit_group_is_seen(open_store, steps):
    store = open_store()
    gate, first = steps.parked("writer.before_write", store.apply_async, batch(1), cursor(1))
    creating = [in_thread(store.create, "k", b"%d" % number) for number in range(8)]
    until(lambda: waiting(store) == 8, "all wait in the mailbox")
    gate.open()
    first.result(DEADLINE_S)
    outcomes = [future.exception(DEADLINE_S) for future in creating]
    assert sorted(type(error).__name__ for error in outcomes) == ["KeyExists"] * 7 + ["NoneType"]
    assert store.snapshot().seq == 2
    assert store.stats().groups == 2


# Messages.


def test_each_message_has_its_answer(open_store, tmp_path):
    store = open_store()
    assert store.writer.ask(Apply(batch(1), cursor(1)), timeout=DEADLINE_S) == 1
    assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S) == store.get("shared/0")
    assert store.reader.ask(Get("absent"), timeout=DEADLINE_S) is None
    assert store.reader.ask(Range("shared/"), timeout=DEADLINE_S) == store.range("shared/")
    assert store.writer.ask(Compact(), timeout=DEADLINE_S) is None
    manifest = store.writer.ask(Export(str(tmp_path / "artifact")), timeout=DEADLINE_S)
    assert manifest.cursor == cursor(1)
    with pytest.raises(FileExistsError):
        store.writer.ask(Export(str(tmp_path / "artifact")), timeout=DEADLINE_S)


def test_pages_of_one_range_come_from_one_snapshot_while_applies_go_on(open_store):
    store = open_store()
    store.apply([Put(f"k{number:03}", b"1") for number in range(100)], cursor(1))
    before = store.range("k")
    ask, entries, sizes = RangePage("k", limit=30), [], []
    number = 1
    while ask is not None:
        page = store.reader.ask(ask, timeout=DEADLINE_S)
        assert type(page) is Page
        entries += page.entries
        sizes.append(len(page.entries))
        ask = page.next
        number += 1
        store.apply(
            [Put(f"k{n:03}", b"%d" % number) for n in range(100)] + [Put(f"k{number:03}x", b"")],
            cursor(number),
        )
        store.apply([Delete("k050")], cursor(number))
        store.compact()
    assert entries == before
    assert sizes == [30, 30, 30, 10]
    assert len(store.range("k")) == 103


@pytest.mark.parametrize(
    ("count", "limit", "sizes"),
    [(0, 10, [0]), (10, 10, [10]), (11, 10, [10, 1]), (3, 1, [1, 1, 1])],
)
def test_pages_end_where_the_range_ends(open_store, count, limit, sizes):
    store = open_store()
    store.apply([Put(f"k{number:03}", b"") for number in range(count)], cursor(1))
    ask, found = RangePage("k", limit), []
    while ask is not None:
        page = store.reader.ask(ask, timeout=DEADLINE_S)
        found.append(len(page.entries))
        ask = page.next
    assert found == sizes


@pytest.mark.parametrize("limit", [0, -1])
def test_a_page_of_nothing_is_refused(open_store, limit):
    with pytest.raises(ValueError, match="limit"):
        open_store().reader.ask(RangePage("k", limit), timeout=DEADLINE_S)


class Greeting:
    """No message of foldlog's."""


@pytest.mark.parametrize("message", [Greeting(), "text", None, 7, {"cmd": "stop"}])
def test_an_unknown_message_is_a_type_error_to_the_asker_and_a_log_line_for_the_teller(
    open_store, caplog, message
):
    store = open_store()
    for ref in (store.writer, store.reader):
        with pytest.raises(TypeError, match=type(message).__name__):
            ref.ask(message, timeout=DEADLINE_S)
        with caplog.at_level(logging.ERROR, "foldlog"):
            caplog.clear()
            ref.tell(message)
            until(lambda: caplog.records, "it is logged")
        assert ref.is_alive()
    with pytest.raises(TypeError):
        store.writer.ask(Get("k"), timeout=DEADLINE_S)
    with pytest.raises(TypeError):
        store.reader.ask(Apply([], cursor(1)), timeout=DEADLINE_S)
    assert store.stats().restarts == ()


@pytest.mark.parametrize(
    "bad",
    [
        Apply([Put("k", "text")], cursor(1)),
        Apply([Put("\ud800", b"")], cursor(1)),
        Apply([], b"raw"),
        Apply(None, cursor(1)),
    ],
)
def test_a_bad_apply_is_an_error_to_the_asker_and_an_error_line_for_the_teller(
    open_store, caplog, bad
):
    store = open_store()
    with pytest.raises((TypeError, ValueError)):
        store.writer.ask(bad, timeout=DEADLINE_S)
    with caplog.at_level(logging.ERROR, "foldlog"):
        store.writer.tell(bad)
        until(
            lambda: [
                record for record in caplog.records if "Apply was told" in record.getMessage()
            ],
            "it is logged",
        )
    assert store.apply(batch(1), cursor(1)) == 1
    assert store.stats().restarts == ()


class Counter(pykka.ThreadingActor):
    """An application's actor: told to add, it asks the store's reader and tells its writer."""

    use_daemon_thread = True

    def __init__(self, store):
        super().__init__()
        self.reader, self.writer = store.reader, store.writer

    def on_receive(self, message):
        name, number = message
        entry = self.reader.ask(Get(name), timeout=DEADLINE_S)
        total = int(entry.value if entry else 0) + number
        return self.writer.ask(Apply([Put(name, b"%d" % total)], cursor(total)), timeout=DEADLINE_S)


def test_actors_of_an_application_read_and_write_by_message_through_crashes(open_store, steps):
    store = open_store()
    counters = [Counter.start(store) for _ in range(3)]
    try:
        for number in range(1, 21):
            if number % 5 == 0:
                steps.crash(
                    ["writer.after_write", "reader.handle"][number % 2], FATAL[number // 5 - 1]
                )
            for name, counter in enumerate(counters):
                counter.ask((f"counter/{name}", 1), timeout=DEADLINE_S)
        assert [
            entry.value for entry in store.reader.ask(Range("counter/"), timeout=DEADLINE_S)
        ] == [b"20"] * 3
        assert all(counter.is_alive() for counter in counters)
    finally:
        for counter in counters:
            counter.stop()


def test_what_one_thread_tells_is_written_in_its_order(open_store):
    store = open_store()
    for number in range(1, 101):
        store.writer.tell(Apply(batch(number), cursor(number)))
    assert store.writer.ask(Apply(batch(101), cursor(101)), timeout=DEADLINE_S) == 101
    assert assert_whole(store.snapshot()) == 101


# Event loops.


def test_awaiting_an_apply_does_not_block_the_event_loop(open_store, steps):
    store = open_store()
    gate = steps.park("writer.before_write")

    async def main() -> tuple[int, int]:
        answer = asyncio.wrap_future(store.apply_async(batch(1), cursor(1)))
        ticks = 0
        while not gate.reached.is_set() or ticks < 100:
            await asyncio.sleep(0)
            ticks += 1
        assert not answer.done()
        gate.open()
        return await asyncio.wait_for(answer, DEADLINE_S), ticks

    seq, ticks = asyncio.run(main())
    assert seq == 1
    assert ticks >= 100


def test_many_awaited_applies_share_commit_groups_and_one_that_fails_fails_alone(open_store, steps):
    store = open_store()
    steps.crash("writer.before_write")

    async def main() -> list[object]:
        sent = [
            asyncio.wrap_future(store.apply_async(batch(number), cursor(number)))
            for number in range(1, 51)
        ]
        return await asyncio.wait_for(asyncio.gather(*sent), DEADLINE_S)

    assert asyncio.run(main()) == list(range(1, 51))


def test_a_task_that_is_cancelled_withdraws_its_batch(open_store, steps):
    store = open_store()
    gate, first = steps.parked("writer.before_write", store.apply_async, batch(1), cursor(1))

    async def main() -> None:
        task = asyncio.ensure_future(asyncio.wrap_future(store.apply_async(batch(2), cursor(2))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    gate.open()
    assert first.result(DEADLINE_S) == 1
    assert store.apply(batch(3), cursor(3)) == 2
    assert store.get("batch/000002") is None


def test_readers_share_their_mailbox_so_a_long_range_holds_up_one_of_them(open_store, steps):
    store = open_store(readers=2)
    store.put("k", b"v")
    gate, slow = steps.parked("reader.handle", store.reader.ask, Range(""), block=False)
    assert results(
        [in_thread(lambda: store.reader.ask(Get("k"), timeout=DEADLINE_S)) for _ in range(20)]
    )
    gate.open()
    assert len(slow.get(timeout=DEADLINE_S)) == 1
    assert threading.active_count() > 1


def test_an_ask_for_one_key_is_served_on_the_asker_s_thread_while_a_reader_is_idle(
    open_store, monkeypatch
):
    """Waking a thread and being woken costs ten times as much as the look-up."""
    store = open_store(readers=2)
    store.put("k", b"v")
    served = []
    answer = Reader.answer

    def noted(reader, mail):
        served.append((type(mail.message), threading.get_ident()))
        answer(reader, mail)

    monkeypatch.setattr(Reader, "answer", noted)
    assert store.reader.ask(Get("k"), timeout=DEADLINE_S).value == b"v"
    assert store.reader.ask(Get("k"), block=False).get(timeout=0.0).value == b"v"
    assert len(store.reader.ask(Range("k"), timeout=DEADLINE_S)) == 1
    here = threading.get_ident()
    assert [(kind, thread == here) for kind, thread in served] == [
        (Get, True),
        (Get, True),
        (Range, False),
    ]


@pytest.mark.parametrize("message", [Get("k"), Range("k")])
def test_a_signal_handler_may_ask_within_an_ask(open_store, monkeypatch, message):
    """The handler runs in the turn that its own thread has taken: the one reader cannot serve it."""
    store = open_store(readers=1)
    store.put("k", b"v")
    inner = []
    answer = Reader.answer

    def interrupted(reader, mail):
        if not inner:
            inner.append(None)
            inner.append(store.reader.ask(message, timeout=DEADLINE_S))
        answer(reader, mail)

    monkeypatch.setattr(Reader, "answer", interrupted)
    assert store.reader.ask(Get("k"), timeout=DEADLINE_S).value == b"v"
    assert inner[1] is not None


def test_an_interrupt_in_a_reader_s_turn_reaches_the_caller_and_the_reader_lives_on(
    open_store, monkeypatch
):
    store = open_store(readers=1)
    store.put("k", b"v")
    answer = Reader.answer

    def struck(reader, mail):
        monkeypatch.setattr(Reader, "answer", answer)
        raise KeyboardInterrupt

    monkeypatch.setattr(Reader, "answer", struck)
    with pytest.raises(KeyboardInterrupt):
        store.reader.ask(Get("k"))
    assert store.reader.ask(Get("k"), timeout=DEADLINE_S).value == b"v"
    assert len(store.reader.ask(Range("k"), timeout=DEADLINE_S)) == 1


def test_an_asker_is_answered_though_the_caller_whose_turn_it_was_served_in_is_struck(
    open_store, monkeypatch
):
    """Its request had an outcome and its reply none when the exception came. The restart took the
    request for answered, and the asker waited for ever."""
    asked: list[pykka.Future[int]] = []
    strikes = iter([Struck])

    def ask(name: str) -> None:
        if name == "writer.before_write" and not asked:
            asked.append(store.writer.ask(Apply(batch(2), cursor(2)), block=False))

    def struck_reply(*answer: object) -> None:
        for strike in strikes:
            raise strike
        reply(*answer)

    store = open_store(step=ask)
    monkeypatch.setattr(requests, "reply", struck_reply)
    with pytest.raises(Struck):
        store.apply(batch(1), cursor(1))
    assert asked[0].get(timeout=DEADLINE_S) == 2
    assert store.cursor() == cursor(2)


INTERNAL = [
    kind
    for _, kind in inspect.getmembers(internal, inspect.isclass)
    if kind.__module__ == internal.__name__
]


@pytest.mark.parametrize("kind", INTERNAL, ids=lambda kind: kind.__name__)
def test_a_store_that_closes_does_not_report_its_own_messages_as_lost(kind, caplog):
    """A file event during a close was logged as a message to an actor that cannot serve it: 'Look'.

    A user who had told a message would have to read that. Nobody had.
    """

    class Anything:
        def __getattr__(self, name):
            return lambda *_: None

    message = kind(*(Anything() for _ in inspect.signature(kind).parameters))
    inbox = Inbox()
    inbox.put(Mail(message))
    inbox.end(lambda: StoreClosed("closed"))
    assert not inbox.mails
    assert not caplog.records
