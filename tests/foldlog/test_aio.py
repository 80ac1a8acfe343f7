"""The asyncio API: no blocked loop, nothing lost to cancellation, no harm from a loop that ends."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, Steps, until

import foldlog
from foldlog import (
    Backpressure,
    Changed,
    CursorExpired,
    Delete,
    FoldlogError,
    KeyExists,
    Lagged,
    Put,
    RequestTimeout,
    StoreClosed,
    StoreFailed,
    StoreLocked,
    Synced,
    VersionMismatch,
    aio,
)
from foldlog.actors.base import mailbox
from foldlog.aio.bridge import Wake, bridge_here

ON_EACH_ENGINE = True

uvloop = pytest.importorskip("uvloop")

Main = Callable[[], Awaitable[Any]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Main], Any]:
    """Runs a coroutine function on a loop of its own, in the way of asyncio.run."""
    factory = None if request.param == "asyncio" else uvloop.new_event_loop

    def run(main: Main) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(asyncio.wait_for(main(), DEADLINE_S))  # type: ignore[arg-type]

    return run


def on_its_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a coroutine function, run by its fixture `run`."""

    @functools.wraps(test)
    def in_loop(**fixtures: Any) -> None:
        fixtures["run"](lambda: test(**fixtures))

    return in_loop


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    yield
    until(
        lambda: not [each for each in threading.enumerate() if each.name.startswith("foldlog")],
        "all threads ended",
    )


@on_its_loop
async def test_all_that_a_store_does_can_be_awaited(run: Any, path: Path, tmp_path: Path):
    async with aio.open(path, sync="never") as store:
        assert await store.apply([Put("a", b"1"), Put("b", b"2")], 7) == 1
        assert (store.get("a").value, int(store.cursor()), len(store)) == (b"1", 7, 2)
        version = await store.put("c", b"3")
        with pytest.raises(KeyExists):
            await store.create("c", b"4")
        with pytest.raises(VersionMismatch):
            await store.update("a", b"4", expected=version)
        await store.update("c", b"5", expected=version)
        await store.delete("b")
        assert dict(store.items()) == {"a": b"1", "c": b"5"}
        await store.wait_for(seq=4)
        await store.sync()
        assert store.synced_cursor == store.cursor()
        await store.compact()
        manifest = await store.export_to(tmp_path / "artifact")
        assert manifest.files
        with pytest.raises(FileExistsError):
            await store.export_to(tmp_path / "artifact")
        assert store.stats().compactions == 1
    with pytest.raises(StoreClosed):
        await store.put("a", b"")
    await store.close()


@pytest.mark.append_log("it is followed")
@on_its_loop
async def test_a_follower_is_awaited_for_what_was_put_here(run: Any, path: Path):
    async with aio.open(path) as store, aio.follow(path) as follower:
        for number in range(20):
            version = await store.put("k", b"%d" % number)
            await follower.wait_for(seq=version, timeout_s=DEADLINE_S)
            assert follower.get("k").value == b"%d" % number
        with pytest.raises(RequestTimeout, match="batch 99"):
            await follower.wait_for(seq=99, timeout_s=0.01)
        waiting = asyncio.create_task(follower.wait_for(5, DEADLINE_S))
        await asyncio.sleep(0)
        await follower.close()
        with pytest.raises(StoreClosed):
            await waiting


@on_its_loop
async def test_many_applies_in_flight_make_few_groups(run: Any, path: Path):
    async with aio.open(path, sync="always") as store:
        seqs = await asyncio.gather(*(store.apply([Put(f"{n}", b"")], n) for n in range(500)))
        assert seqs == list(range(1, 501)), "in the order of the calls"
        assert store.stats().groups < 100


@on_its_loop
async def test_a_large_batch_is_encoded_off_the_loop(run: Any, path: Path, monkeypatch: Any):
    monkeypatch.setattr("foldlog.aio.store.ENCODE_ON_LOOP", 10)
    async with aio.open(path) as store:
        await store.apply([Put(f"{n}", b"") for n in range(50)], 1)
        with pytest.raises(TypeError):
            await store.apply([Put(f"{n}", "text") for n in range(50)], 2)  # type: ignore
        assert len(store) == 50


@on_its_loop
async def test_opening_tells_what_the_plain_one_tells_and_leaves_nothing(run: Any, path: Path):
    store = await aio.open(path)
    with pytest.raises(StoreLocked):
        await aio.open(path)
    with pytest.raises(ValueError, match="sync"):
        async with aio.open(path, sync="sometimes"):  # type: ignore[arg-type]
            pass
    await store.close()
    with pytest.raises(TypeError, match="async with"), store:
        pass


@on_its_loop
async def test_an_opening_that_is_cancelled_leaves_nothing_open(run: Any, path: Path, steps: Steps):
    gate = steps.park("writer.start")
    opening = asyncio.ensure_future(aio.open(path, step=steps)._open())
    await asyncio.to_thread(gate.wait_until_reached)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    gate.open()
    while True:
        try:
            store = await aio.open(path)
            break
        except StoreLocked:
            await asyncio.sleep(0.01)
    await store.close()


@pytest.mark.append_log("it is followed")
@on_its_loop
async def test_a_mirror_is_awaited_and_refuses_to_be_written(run: Any, path: Path, tmp_path: Path):
    async with aio.open(tmp_path / "origin.log") as origin:
        await origin.put("a", b"1")
        upstream = foldlog.upstreams.LogFile(tmp_path / "origin.log")
        async with aio.mirror(path, upstream) as mirror:
            await mirror.wait_synced(DEADLINE_S)
            assert mirror.get("a").value == b"1"
            for write in (mirror.put("b", b""), mirror.apply([], 9), mirror.delete("a")):
                with pytest.raises(foldlog.FoldlogError, match="is a mirror"):
                    await write


@pytest.mark.append_log("it is followed")
@on_its_loop
async def test_a_probe_on_the_loop_asks_store_mirror_and_follower_for_their_health(
    run: Any, path: Path, tmp_path: Path
):
    """A service on a loop that answers a readiness probe found no `health` on what it had opened."""
    async with aio.open(path) as store:
        upstream = foldlog.upstreams.LogFile(path)
        async with (
            aio.follow(path) as follower,
            aio.mirror(tmp_path / "mirror.log", upstream) as mirror,
        ):
            for opened in (store, follower, mirror):
                assert opened.health() == foldlog.Health(foldlog.Status.READY, ())
    for closed in (store, follower, mirror):
        assert not closed.health().is_serving


# Watches.


@on_its_loop
async def test_a_watch_tells_the_state_then_changes_in_order(run: Any, path: Path):
    async with aio.open(path) as store:
        await store.apply([Put(f"a/{n:03}", b"") for n in range(600)], 1)
        seen: list[str] = []
        async with store.watch("a/") as watch:
            async for event in watch:
                if isinstance(event, Synced):
                    break
                seen.append(event.update.key)
            assert seen == [f"a/{n:03}" for n in range(600)]
            await store.apply([Put("b", b""), Put("a/x", b"1"), Delete("a/000")], 2)
            events = [await watch.next(DEADLINE_S) for _ in range(2)]
            assert [event.update.key for event in events] == ["a/x", "a/000"]
            assert await watch.next(0.01) is None
        assert watch.ended
        assert [event async for event in watch] == []


@on_its_loop
async def test_a_watch_goes_on_from_a_cursor_or_says_that_it_cannot(run: Any, path: Path):
    async with aio.open(path) as store:
        for number in range(1, 5):
            await store.apply([Put(f"{number}", b"")], number)
        async with store.watch(since=2) as watch:
            events = [await watch.next(DEADLINE_S) for _ in range(3)]
        assert [type(event) for event in events] == [Changed, Changed, Synced]
        with pytest.raises(CursorExpired):
            await store.watch(since=77).next()
        with pytest.raises(TypeError):
            await store.watch(since="1").next()  # type: ignore[arg-type]


@on_its_loop
async def test_a_watch_that_is_too_slow_is_told_that_it_lagged(
    run: Any, path: Path, monkeypatch: Any
):
    monkeypatch.setattr("foldlog.actors.feeds.ring.RING_GROUPS", 8)
    async with aio.open(path, sync="never") as store, store.watch() as watch:
        assert isinstance(await watch.next(), Synced)
        for number in range(50):
            await store.put("k", b"%d" % number)
        assert isinstance(await watch.next(DEADLINE_S), Lagged)
        values = []
        while values[-1:] != [b"49"]:
            event = await watch.next(DEADLINE_S)
            if isinstance(event, Changed):
                values.append(event.update.value)
        assert len(values) < 50


@on_its_loop
async def test_cancelling_the_one_who_waits_for_an_event_loses_none(run: Any, path: Path):
    """A consumer with a time limit: events decoded while it was cancelled must still arrive."""
    async with aio.open(path, sync="never") as store, store.watch() as watch:
        assert isinstance(await watch.next(), Synced)

        async def feed() -> None:
            for number in range(300):
                await store.put("k", b"%d" % number)

        feeding = asyncio.create_task(feed())
        seen = []
        while len(seen) < 300:
            waiting = asyncio.create_task(watch.next())
            for _ in range(len(seen) % 5):
                await asyncio.sleep(0)
            waiting.cancel()
            try:
                seen.append(int((await waiting).update.value))
            except asyncio.CancelledError:
                event = await watch.next(DEADLINE_S)
                seen.append(int(event.update.value))
        assert seen == list(range(300))
        await feeding


@on_its_loop
async def test_a_watch_ends_with_its_store_and_when_it_is_closed(run: Any, path: Path):
    async def collect(watch: aio.AsyncWatch) -> list[Any]:
        return [event async for event in watch]

    store = await aio.open(path)
    watches = [store.watch() for _ in range(3)]
    tasks = [asyncio.create_task(collect(watch)) for watch in watches]
    await watches[2].next(0.0)
    while not store.store._core.feeds.wanted:
        await asyncio.sleep(0.001)
    watches[0].close()
    assert (await tasks[0])[-1:] in ([], [Synced(store.cursor(), 0)])
    await store.close()
    await asyncio.gather(*tasks[1:])
    assert all(watch.ended for watch in watches)


@on_its_loop
async def test_a_watch_that_is_dropped_costs_the_writer_nothing_more(run: Any, path: Path):
    async with aio.open(path) as store:
        async for _ in store.watch():
            break
        while store.store._core.feeds.wanted:
            await asyncio.sleep(0.001)


def test_a_watch_belongs_to_the_loop_that_first_reads_it(path: Path):
    store = aio.AsyncStore(foldlog.open(path))
    watch = store.watch()
    assert isinstance(asyncio.run(watch.next()), Synced)
    with pytest.raises(FoldlogError, match="belongs to the event loop"):
        asyncio.run(watch.next())
    asyncio.run(store.close())


# Cancelling.


async def outcome_of_cancelling(task: asyncio.Future[Any]) -> str | None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    return aio.outcome(caught.value)


@on_its_loop
async def test_a_call_that_is_cancelled_is_withdrawn_if_it_was_not_begun(
    run: Any, path: Path, steps: Steps
):
    async with aio.open(path, step=steps) as store:
        gate = steps.park("writer.before_write")
        first = asyncio.create_task(store.put("first", b""))
        await asyncio.to_thread(gate.wait_until_reached)
        second = asyncio.create_task(store.put("second", b""))
        third = asyncio.create_task(store.put("third", b""))
        await asyncio.sleep(0)
        assert await outcome_of_cancelling(second) == "withdrawn"
        first.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await first
        assert aio.outcome(caught.value) == "unknown"
        assert "will carry it out" in caught.value.__notes__[0]
        gate.open()
        await third
        assert list(store) == ["first", "third"]


@on_its_loop
async def test_a_timeout_of_asyncios_own_tells_the_outcome_too(run: Any, path: Path, steps: Steps):
    async def expire_once_reached(limit: asyncio.Timeout) -> None:
        await asyncio.to_thread(gate.wait_until_reached)
        limit.reschedule(asyncio.get_running_loop().time())

    async def put_until_it_is_begun(store: aio.Store) -> None:
        async with asyncio.timeout(None) as limit:
            expiring = asyncio.create_task(expire_once_reached(limit))
            await store.put("a", b"")
        await expiring

    async with aio.open(path, step=steps) as store:
        gate = steps.park("writer.before_write")
        with pytest.raises(TimeoutError) as caught:
            await put_until_it_is_begun(store)
        assert aio.outcome(caught.value) == "unknown"
        with pytest.raises(RequestTimeout, match="withdrawn"):
            await store.put("b", b"", timeout_s=0.01)
        gate.open()
        await store.put("c", b"")
        assert list(store) == ["a", "c"]
        assert aio.outcome(ValueError()) is None


@on_its_loop
async def test_a_full_mailbox_is_waited_for_in_order_and_no_longer_than_asked(
    run: Any, path: Path, steps: Steps
):
    async with aio.open(path, step=steps, mailbox_batches=2) as store:
        gate = steps.park("writer.before_write")
        tasks = [asyncio.create_task(store.apply([], number)) for number in range(1, 30)]
        await asyncio.to_thread(gate.wait_until_reached)
        with pytest.raises(Backpressure):
            await store.apply([], 99, timeout_s=0.02)
        late = asyncio.create_task(store.apply([], 98))
        await asyncio.sleep(0.005)
        assert await outcome_of_cancelling(late) == "withdrawn"
        gate.open()
        assert await asyncio.gather(*tasks) == list(range(1, 30))


@on_its_loop
async def test_a_failed_store_exports_what_its_readers_see(
    run: Any, path: Path, steps: Steps, tmp_path: Path
):
    """The plain store did, but the one for event loops raised StoreFailed."""
    async with aio.open(path, step=steps, max_restarts=0) as store:
        await store.apply([Put("a", b"1")], 7)
        steps.crash("writer.before_write", times=None)
        with pytest.raises(StoreFailed):
            await store.apply([Put("a", b"2")], 8)
        manifest = await store.export_to(tmp_path / "artifact")
        assert int(manifest.cursor) == 7
        with pytest.raises(FileExistsError):
            await store.export_to(tmp_path / "artifact")
        steps.mend()


@on_its_loop
async def test_a_large_batch_gets_in_before_small_ones_of_other_threads(
    run: Any, path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
):
    """Tasks had no place in the mailbox's line: small batches of threads took each room."""
    monkeypatch.setattr(mailbox, "PLACE_S", DEADLINE_S)  # the machine may be slow
    async with aio.open(path, step=steps, mailbox_bytes=10_000) as store:
        inbox = store.store._supervisor.writer.inbox
        gate = steps.park("writer.before_write")
        first = asyncio.create_task(store.apply([], 1))
        await asyncio.to_thread(gate.wait_until_reached)
        second = store.store.apply_async([Put("a", bytes(6_000))], 2)
        large = asyncio.create_task(store.apply([Put("large", bytes(50_000))], 3))
        while len(inbox._line) < 1:
            await asyncio.sleep(0.001)
        small = asyncio.create_task(asyncio.to_thread(store.store.put, "small", b""))
        while len(inbox._line) < 2:
            await asyncio.sleep(0.001)
        gate.open()
        assert [await first, await asyncio.wrap_future(second), await large] == [1, 2, 3]
        assert int(await small) == 4
        assert not inbox._line


# The ends of loops.


@pytest.mark.parametrize("ending", ["return", "raise", "cancel"])
def test_a_loop_that_ends_with_calls_in_flight_harms_nobody(
    run: Any, path: Path, steps: Steps, caplog: Any, ending: str
):
    store = foldlog.open(path, step=steps)
    gate = steps.park("writer.before_write")
    face = aio.AsyncStore(store)
    tasks: list[Any] = []

    async def main() -> None:
        watch = face.watch()
        await watch.next()
        calls = [face.put(f"{number}", b"") for number in range(5)]
        tasks.extend(map(asyncio.ensure_future, (*calls, watch.next(), face.wait_for(seq=99))))
        await asyncio.to_thread(gate.wait_until_reached)
        if ending == "raise":
            raise LookupError
        if ending == "cancel":
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(1)

    if ending == "return":
        run(main)
    else:
        with pytest.raises((LookupError, asyncio.CancelledError)):
            run(main)
    gate.open()
    store.put("after", b"")
    assert store.state is foldlog.State.RUNNING
    assert "after" in store
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    run(face.close)


def test_several_loops_in_several_threads_share_a_store(path: Path):
    store = foldlog.open(path, sync="never")
    face = aio.AsyncStore(store)

    async def main(number: int) -> int:
        async with face.watch("k") as watch:
            assert isinstance(await watch.next(), (Synced, Changed))
            for n in range(100):
                version = await face.put(f"k{number}/{n}", b"")
                await face.wait_for(seq=version)
        return number

    def in_loop(number: int) -> None:
        if number % 2:
            asyncio.run(main(number))
        else:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(main(number))

    threads = [threading.Thread(target=in_loop, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(store) == 400
    asyncio.run(face.close())


@pytest.mark.append_log("its program opens a log")
@pytest.mark.parametrize(
    "end",
    ["pass", "raise SystemExit(0)", "asyncio.get_running_loop().stop(); await asyncio.sleep(9)"],
)
def test_a_program_that_forgets_to_close_ends_promptly(path: Path, end: str):
    program = f"""
import asyncio, foldlog
from foldlog import aio
async def main():
    store = await aio.open({str(path)!r})
    globals()["store"] = store
    await store.put("a", b"1")
    globals()["watch"] = store.watch()
    await watch.next()
    asyncio.ensure_future(watch.next()); asyncio.ensure_future(watch.next())
    {end}
try:
    asyncio.run(main())
except (RuntimeError, SystemExit):
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    with foldlog.open(path) as store:
        assert store.get("a").value == b"1"
        assert store.report.sealed


@on_its_loop
async def test_no_call_starts_a_thread(run: Any, path: Path):
    async with aio.open(path) as store:
        watches = [store.watch() for _ in range(10)]
        for watch in watches:
            await watch.next()
        before = set(threading.enumerate())
        await asyncio.gather(*(store.put(f"{n}", b"") for n in range(50)))
        for watch in watches:
            await watch.next(DEADLINE_S)
        started = set(threading.enumerate()) - before
        # The store's syncer watches the file from its first look on, whoever calls.
        assert not [each for each in started if "Inotify" not in type(each).__name__]


@pytest.mark.slow
def test_the_loop_is_not_held_up_by_a_feeder_at_full_speed(path: Path):
    """The longest delay of the loop under a feeder and a watch at full speed.

    It is compared with the same load without a store.
    """

    async def longest_delay(busy: Callable[[], Awaitable[None]]) -> float:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(busy())
        longest, ends = 0.0, loop.time() + 3
        while loop.time() < ends:
            due = loop.time() + 0.001
            await asyncio.sleep(0.001)
            longest = max(longest, loop.time() - due)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return longest

    async def main() -> tuple[float, float]:
        async def plain() -> None:
            while True:
                await asyncio.sleep(0)

        without = await longest_delay(plain)
        async with aio.open(path) as store, store.watch() as watch:

            async def feed() -> None:
                number = 0
                while True:
                    number += 1
                    await store.apply([Put(f"{number % 5000}", b"x" * 100)], number)

            async def both() -> None:
                async with asyncio.TaskGroup() as group:
                    for _ in range(8):
                        group.create_task(feed())
                    async for _ in watch:
                        pass

            return without, await longest_delay(both)

    without, with_store = asyncio.run(main())
    print(f"longest delay of the loop: {without * 1e3:.1f} ms without, {with_store * 1e3:.1f} with")
    assert with_store <= without + 0.05


# Typed views.


@on_its_loop
async def test_a_typed_view_reads_at_once_and_awaits_its_writes(run: Any, path: Path):
    async with aio.open(path, sync="never") as store:
        flags = aio.view(store, "json", "flags/")
        version = await flags.put("flags/beta", {"percent": 5})
        assert store.get("flags/beta").version == version
        assert (flags["flags/beta"], list(flags), len(flags)) == ({"percent": 5}, ["flags/beta"], 1)
        assert foldlog.view(store, "json", "flags/")["flags/beta"] == {"percent": 5}
        await flags.delete("flags/beta")
        assert "flags/beta" not in flags
        with pytest.raises(KeyError):
            await flags.delete("flags/beta")


@pytest.mark.append_log("it is followed")
@on_its_loop
async def test_a_typed_view_stores_nothing_of_a_bad_key_or_value(run: Any, path: Path):
    async with aio.open(path, sync="never") as store:
        flags = aio.view(store, "json", "flags/")
        with pytest.raises(foldlog.KeyOutsideView):
            await flags.put("other", 1)
        with pytest.raises(foldlog.KeyOutsideView):
            await flags.delete("other")
        with pytest.raises(foldlog.EncodeError):
            await flags.put("flags/a", object())
        assert len(store) == 0
        for bad in (store.store, store.snapshot(), None):
            with pytest.raises(TypeError):
                aio.view(bad, "json")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            aio.view(store, "json", 7)  # type: ignore[arg-type]
        async with aio.follow(path) as follower:
            with pytest.raises(TypeError, match="read-only"):
                await aio.view(follower, "json").put("flags/a", 1)
            with pytest.raises(TypeError, match="read-only"):
                await aio.view(follower, "json").delete("flags/a")


class ShortOfMemoryOnce:
    """A codec of text, for the first value of which there is no memory."""

    def __init__(self) -> None:
        self.strikes = [MemoryError()]

    def encode(self, value: str) -> bytes:
        return value.encode()

    def decode(self, raw: bytes) -> str:
        while self.strikes:
            raise self.strikes.pop()
        return raw.decode()


@on_its_loop
async def test_a_decoding_watch_offers_again_what_there_was_no_memory_to_decode(
    run: Any, path: Path
):
    """The event was lost."""
    async with aio.open(path) as store:
        await store.put("a", b"1")
        async with aio.view(store, ShortOfMemoryOnce()).watch() as watch:
            with pytest.raises(MemoryError):
                await watch.next(DEADLINE_S)
            event = await watch.next(DEADLINE_S)
            assert isinstance(event, foldlog.Decoded)
            assert (event.key, event.value) == ("a", "1")


@pytest.mark.append_log("it is followed")
@on_its_loop
async def test_a_typed_view_is_watched_with_decoded_values_and_survives_bad_ones(
    run: Any, path: Path
):
    async with aio.open(path, sync="never") as store, aio.follow(path) as follower:
        async with aio.view(follower, "json", "n/").watch() as watch:
            assert isinstance(await watch.next(DEADLINE_S), Synced)
            await aio.view(store, "json", "n/").put("n/1", [1, 2])
            await store.put("n/2", b"no JSON")
            await store.delete("n/1")
            events = [await watch.next(DEADLINE_S) for _ in range(3)]
        assert isinstance(events[0], foldlog.Decoded)
        assert (events[0].key, events[0].value) == ("n/1", [1, 2])
        assert isinstance(events[1], foldlog.Undecodable)
        assert isinstance(events[2], foldlog.Removed)
        assert watch.ended == "closed by its subscriber"
        assert [event async for event in watch] == []


@on_its_loop
async def test_tasks_that_sleep_in_watches_are_woken_only_by_what_they_watch(
    run: Any, path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each batch woke every task that watched anything."""
    woken: list[Any] = []
    call = Wake.__call__

    def noted(wake: Wake) -> None:
        woken.append(wake)
        call(wake)

    async with aio.open(path, sync="never") as store:
        watches = [store.watch(f"{number:03}/") for number in range(100)]
        for watch in watches:
            assert isinstance(await watch.next(DEADLINE_S), Synced)
        await store.put("first", b"")
        tasks = [asyncio.create_task(watch.next(DEADLINE_S)) for watch in watches]
        # All share one thread, which is done with them once it is done with this.
        await asyncio.sleep(0)
        await store._off_loop(lambda: None)
        with monkeypatch.context() as patch:
            patch.setattr(Wake, "__call__", noted)
            await store.put("other", b"")
            assert woken == []
            await store.put("007/k", b"")
            assert woken == [watches[7]._wake]
            assert (await tasks[7]).update.key == "007/k"
        for task in tasks:
            task.cancel()


# Found by reading what had just been written.


@on_its_loop
async def test_a_watch_that_is_closed_while_it_begins_tells_nothing_and_is_not_fed(
    run: Any, path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It subscribed after it had been closed, and told the state."""
    async with aio.open(path) as store:
        await store.put("a", b"1")
        watch = store.watch()
        snapshot = store.snapshot

        def close_meanwhile() -> Any:
            watch.close()
            return snapshot()

        monkeypatch.setattr(store, "snapshot", close_meanwhile)
        assert await watch.next(DEADLINE_S) is None
        assert watch.ended == "closed by its subscriber"
        assert not store.store._core.feeds.wanted


@on_its_loop
async def test_a_watch_has_not_ended_while_there_are_events_to_read(run: Any, path: Path):
    """Who read it while it had not ended missed the last chunk."""
    async with aio.open(path) as store:
        watch = store.watch()
        assert isinstance(await watch.next(), Synced)
        for number in (1, 2, 3):
            await store.apply([Put("a", b"%d" % number)], number)
    told = []
    while watch.ended is None:
        event = await watch.next(DEADLINE_S)
        told += [event.seq] if isinstance(event, Changed) else []
    assert told == [1, 2, 3]
    assert "closed" in watch.ended


@on_its_loop
async def test_a_chunk_that_is_still_decoded_off_the_loop_when_the_store_closes_is_waited_for(
    run: Any, path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A call was cancelled, the next one found the store closed, and both decoded."""
    store = await aio.open(path)
    await store.put("a", b"1")
    watch, begun, go_on = store.watch(), threading.Event(), threading.Event()
    snapshot = store.snapshot

    def gated() -> Any:
        begun.set()
        assert go_on.wait(DEADLINE_S)
        return snapshot()

    monkeypatch.setattr(store, "snapshot", gated)
    cancelled = asyncio.create_task(watch.next())
    while not begun.is_set():
        await asyncio.sleep(0.001)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)

    def let_go_once_both_are_there() -> None:
        until(lambda: len(watch._turn.line) == 2, "the other one waits")
        go_on.set()

    letting = threading.Thread(target=let_go_once_both_are_there)
    letting.start()
    assert isinstance(await watch.next(DEADLINE_S), Changed)
    assert isinstance(await watch.next(DEADLINE_S), Synced)
    letting.join(DEADLINE_S)
    await closing


@on_its_loop
async def test_closing_again_waits_for_the_closing_that_was_cancelled(
    run: Any, path: Path, steps: Steps
):
    store = await aio.open(path, step=steps)
    gate = steps.park("writer.stop")
    first = asyncio.create_task(store.close())
    await asyncio.to_thread(gate.wait_until_reached)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    gate.open()
    await second
    assert store.state is foldlog.State.CLOSED


@on_its_loop
async def test_a_store_is_closed_though_no_thread_can_be_started(
    run: Any, path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`close` took this for a store that was closed already, and left it open."""

    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("can't start new thread")

    store = aio.AsyncStore(foldlog.open(path))
    monkeypatch.setattr(store._thread, "submit", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        await store.watch().next()
    await store.close()
    assert store.state is foldlog.State.CLOSED


class Interrupted(Exception):
    """What a signal handler raises."""


def test_a_loop_that_was_interrupted_while_it_was_woken_is_woken_again():
    """From then on no answer and no event reached it."""
    called: list[str] = []

    def interrupt() -> None:
        raise Interrupted

    async def main() -> None:
        loop, bridge = asyncio.get_running_loop(), bridge_here()
        real = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *_: interrupt()  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            bridge.post(lambda: called.append("a"))
        loop.call_soon_threadsafe = real  # type: ignore[method-assign]
        loop.set_exception_handler(lambda loop, context: called.append("reported"))
        bridge.post(interrupt)
        bridge.post(lambda: called.append("b"))
        while called != ["a", "reported", "b"]:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


@on_its_loop
async def test_a_large_batch_that_is_cancelled_or_late_while_it_is_encoded_is_withdrawn(
    run: Any, path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Encoding off the loop was within no deadline, and its cancellation told no outcome."""
    monkeypatch.setattr("foldlog.aio.store.ENCODE_ON_LOOP", 1)
    batch = [Put("a", b""), Put("b", b"")]
    async with aio.open(path) as store:
        go_on = threading.Event()
        held = store._thread.submit(lambda: go_on.wait(DEADLINE_S))
        with pytest.raises(RequestTimeout, match="withdrawn"):
            await store.apply(batch, 1, timeout_s=0.01)
        task = asyncio.create_task(store.apply(batch, 2))
        await asyncio.sleep(0)
        assert await outcome_of_cancelling(task) == "withdrawn"
        reopening = asyncio.create_task(store.reopen())
        await asyncio.sleep(0)
        assert await outcome_of_cancelling(reopening) == "withdrawn"
        go_on.set()
        await asyncio.wrap_future(held)
        assert len(store) == 0


@pytest.mark.append_log("it is followed")
def test_a_follower_works_and_is_closed_in_a_forked_child(path: Path):
    """The thread for work off the loop was not there: a watch, and closing, waited for ever."""
    with foldlog.open(path) as store:
        store.put("a", b"1")
        follower = aio.AsyncFollower(foldlog.follow(path))

        async def read() -> None:
            async with asyncio.timeout(DEADLINE_S):
                assert isinstance(await follower.watch().next(), Changed)

        asyncio.run(read())
        child = os.fork()
        if not child:
            try:
                asyncio.run(read())
                asyncio.run(asyncio.wait_for(follower.close(), DEADLINE_S))
                closed = follower.state is foldlog.FollowerState.CLOSED
            finally:
                os._exit(0 if closed else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        asyncio.run(follower.close())
