"""The environment's failure is no evidence about bytes: it passes through, and the file is as it
was."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from interrupts import strikes
from logfiles import (
    UNSYNCED,
    commit_all,
    forget_the_watermark,
    frames_of,
    some_batches,
    write_log,
)

from foldlog import AppendLogSnapshot, LogRegressedError, Put, WatchCursor
from foldlog.protocol import decoding, updates
from foldlog.protocol.decoding import Undecodable, decode_batches
from foldlog.protocol.updates import encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.fold import leaf
from foldlog.storage.formats.registry import load_intact, read_own_header
from foldlog.storage.log.files import OS_FILES, Files, ReadHandle
from foldlog.storage.log.sidecars import note
from foldlog.storage.log.sidecars.regression import lost_since
from foldlog.storage.log.tail import Tail
from foldlog.storage.repair.salvage import salvage_log
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import Fault, FaultyFiles


class SoftTimeLimit(Exception):
    """What a task queue's signal handler raises."""


FAILURES = [MemoryError(), SoftTimeLimit(), TimeoutError()]
DECODERS = [
    (decoding.msgpack, "unpackb"),
    (decoding, "_usual_item"),
    (decoding, "_decode_item"),
    (leaf, "decode_keys"),
]


@pytest.fixture
def raw(path):
    return write_log(path, some_batches(3, 40), base=some_batches(3))


def read_by_engine(path: Any, **options: Any) -> None:
    engine = Engine(path, files=UNSYNCED, **options)
    try:
        engine.fold.range("")
    finally:
        engine.log.abandon()


def readers(path: Any) -> list[Any]:
    return [
        lambda: read_by_engine(path),
        lambda: read_by_engine(path, on_damage="cut"),
        lambda: AppendLogSnapshot.open(path, files=UNSYNCED),
        lambda: load_intact(ReadHandle(OS_FILES, path)).fold.range(""),
        lambda: load_intact(ReadHandle(OS_FILES, path)).fold.get("last"),
        lambda: Tail(OS_FILES, path).poll(),
        lambda: verify_log(path),
        lambda: salvage_log(path, path.with_name("saved.log")),
    ]


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize(("module", "name"), DECODERS, ids=[name for _, name in DECODERS])
def test_a_decoder_that_is_stopped_says_nothing_of_the_bytes(
    path, raw, module, name, failure, number, monkeypatch
):
    """A log was opened by a process short of memory, with on_damage="cut": synced batches were cut
    off as undecodable."""

    def stopped(*_arguments: Any, **_options: Any) -> Any:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stopped)
        try:
            readers(path)[number]()
        except BaseException as error:
            assert error is failure  # noqa: PT017 - any other error is one too many
    assert path.read_bytes() == raw or number == 2
    assert not list(path.parent.glob("*.torn-*"))


def test_what_msgpack_raises_for_bytes_is_all_that_counts_as_damage():
    for body in (
        b"\xc1",
        b"\x91",
        b"\x91" * 2000,
        b"\x90\x90",
        b"\x91\x94\xc4\x00\x91\xa1\xff",
        b"",
    ):
        with pytest.raises(Undecodable):
            decode_batches(body, 1)
        with pytest.raises(Undecodable):
            decode_batches(body.ljust(5000, b"\x90"), 1)
    for body in (b"\x81\x90\xc0", b"\x81\xa1a\xc1", b"\x81\x07\xc0\xc0", b"\xd4\x05x", b"\x80" * 2):
        with pytest.raises(Undecodable):
            decoding.unpack_map(body)


@pytest.mark.parametrize("operation", ["read", "read_into"])
@pytest.mark.parametrize("torn", [False, True])
def test_a_read_that_fails_is_an_error_of_the_disk_wherever_it_comes(path, raw, torn, operation):
    raw = raw[:-9] if torn else raw
    path.write_bytes(raw)
    readers = [
        lambda files: load_intact(ReadHandle(files, path)).fold.range(""),
        lambda files: Tail(files, path).poll(),
        lambda files: verify_log(path, files=files),
        lambda files: Engine(path, files=files, on_damage="cut").log.abandon(),
    ]
    for reader in readers:
        for nth in range(1, 100):
            files = FaultyFiles(Fault(operation, nth, lasting=True))
            try:
                reader(files)
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017
                assert path.read_bytes() == raw
            if not files.fired:
                break
        else:
            pytest.fail("no end of reads")
        path.write_bytes(raw)


@pytest.fixture
def regressed(path):
    """A log whose last batch is lost, though it was synced: only the note tells."""
    engine = Engine(path)
    commit_all(engine, some_batches(3))
    engine.sync()
    engine.log.abandon()
    raw = path.read_bytes()
    path.write_bytes(raw[: frames_of(raw)[-1].start])
    return path


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE, errno.ENOMEM])
def test_a_note_that_cannot_be_read_just_now_hides_no_regression(regressed, error):
    """The last synced batch was lost. A reader that had no descriptor left for the note served what
    remained."""
    path = regressed
    for reader in (
        lambda files: load_intact(ReadHandle(files, path)),
        lambda files: Tail(files, path).poll(),
        lambda files: verify_log(path, files=files),
    ):
        for nth in range(1, 100):
            files = FaultyFiles(Fault(nth=nth, error=error))
            try:
                report = reader(files)
            except LogRegressedError:
                pass
            except OSError as raised:
                assert raised.errno == error  # noqa: PT017
            else:
                assert not report.ok
            if not files.fired:
                break
        else:
            pytest.fail("no end of calls")


def test_a_soft_time_limit_hides_no_regression(regressed):
    """A signal handler raised TimeoutError, which is an OSError, while the note was read: as if
    there were none."""

    def limit() -> None:
        raise TimeoutError

    with ReadHandle(OS_FILES, regressed) as handle:
        size = regressed.stat().st_size
        log_id = read_own_header(handle).log_id
        for strike in strikes(act=limit):
            try:
                lost = strike.run(lambda: lost_since(handle, log_id, 2, size))
            except TimeoutError:
                continue
            assert lost.seq == 3


def test_a_boot_id_that_cannot_be_read_just_now_is_not_that_of_another_boot(path, raw, monkeypatch):
    """A process without a free descriptor took a damaged frame for one that a power loss had torn,
    and cut it."""
    frame = frames_of(raw)[-2]
    raw = raw[: frame.start] + frame.raw[:-100] + bytes(100)
    path.write_bytes(raw)
    forget_the_watermark(path)

    class Descriptors:
        def read_text(self, encoding: str) -> str:
            raise OSError(errno.EMFILE, "none left")

    monkeypatch.setattr(note, "_boot", "")
    with monkeypatch.context() as patch:
        patch.setattr(note, "_BOOT_ID", Descriptors())
        for reader in (lambda: load_intact(ReadHandle(OS_FILES, path)), lambda: Engine(path)):
            with pytest.raises(OSError, match="none left"):
                reader()
    assert path.read_bytes() == raw
    monkeypatch.setattr(note, "_BOOT_ID", path / "no such file")
    assert note.boot_id() == ""


class StruckFiles(Files):
    """Files whose call of one kind is struck, once, by a signal handler's TimeoutError."""

    def __init__(self, operation: str, nth: int = 1) -> None:
        self._left, real = nth, getattr(super(), operation)

        def struck(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise TimeoutError
            return real(*arguments, **options)

        setattr(self, operation, struck)


@pytest.mark.parametrize("operation", ["create", "sync", "write", "access", "replace"])
def test_a_soft_time_limit_ends_an_open_that_compacts(path, operation):
    """It was taken for a failure of the compaction, and the program never learned of it."""
    write_log(path, some_batches(3), sealed=False)
    for nth in range(1, 50):
        try:
            _, snap = AppendLogSnapshot.open(path, files=StruckFiles(operation, nth))
        except TimeoutError:
            continue
        assert not snap.report.compaction_error
        snap.close()
        break


def test_a_soft_time_limit_after_a_rename_poisons_nothing(path):
    snap = AppendLogSnapshot.open(path, files=StruckFiles("sync_dir", 2))[1]
    snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
    with pytest.raises(TimeoutError):
        snap.compact()
    snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.close()
    with AppendLogSnapshot.open(path)[1] as snap:
        assert list(snap) == ["a", "b"]


def test_a_soft_time_limit_while_a_write_is_settled_undoes_nothing(path):
    """A write was complete when it was struck; struck again, it was cut off, though a follower may
    have read it."""

    class Files(StruckFiles):
        def write(self, fd: int, data: bytes, offset: int) -> int:
            taken = super().write(fd, data, offset)
            if data.count(b"struck"):
                self._left = 1
                raise TimeoutError
            return taken

    files = Files("fstat", -1)
    snap = AppendLogSnapshot.open(path, files=files)[1]
    with pytest.raises(TimeoutError):
        snap.apply([Put("struck", b"1")], WatchCursor.from_u64(1))
    snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    assert list(snap) == ["b", "struck"]
    snap.close()


# Memory that holds what failed.


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt, SoftTimeLimit])
def test_a_batch_that_could_not_be_encoded_leaves_nothing_to_the_next_one(
    path, failure, monkeypatch
):
    """A MemoryError left a batch in the packer's buffer: the next one was written behind it,
    answered, and unreadable."""
    real = updates.msgpack.Packer

    class Packer:
        """Fails where msgpack does: what it has packed by then stays in its buffer."""

        def __init__(self) -> None:
            self.inner, self.fails = real(autoreset=False), True

        def pack(self, item: Any) -> bytes:
            self.inner.pack(item)
            if self.fails:
                self.fails = False
                raise failure
            data = self.inner.bytes()
            self.inner.reset()
            return data

    monkeypatch.setattr(updates._packers, "packer", Packer())
    with AppendLogSnapshot.open(path)[1] as snap:
        with pytest.raises(failure):
            snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
        assert snap.verify().ok
    with AppendLogSnapshot.open(path)[1] as snap:
        assert list(snap.snapshot()) == ["b"]


def test_a_handler_may_encode_while_a_batch_is_encoded(monkeypatch):
    inner: list[Any] = []

    real = updates.msgpack.Packer

    class Packer:
        def pack(self, item: Any) -> bytes:
            if not inner:
                inner.append(None)
                inner[0] = encode_batch([Put("inner", b"1")], WatchCursor.from_u64(1))
            return real().pack(item)

    monkeypatch.setattr(updates._packers, "packer", Packer())
    outer = encode_batch([Put("outer", b"2")], WatchCursor.from_u64(2))
    for batch, key in ((outer, "outer"), (inner[0], "inner")):
        assert decode_batches(b"\x91" + batch.item, 1)[0].keys == [key]


def test_a_large_batch_keeps_no_memory_once_it_is_encoded():
    encode_batch([Put("a", bytes(4 * 1024 * 1024))], WatchCursor.none())
    assert updates._packers.packer is None
    encode_batch([Put("a", b"1")], WatchCursor.none())
    assert updates._packers.packer is not None


def test_a_follower_that_could_not_fold_what_it_read_reads_it_again(path, monkeypatch):
    """The place was moved before the fold was made: a MemoryError in between, and the follower
    lacked the batch for ever."""
    with AppendLogSnapshot.open(path)[1] as snap:
        tail = Tail(OS_FILES, path)
        tail.poll()
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        with monkeypatch.context() as patch:
            patch.setattr(
                "foldlog.storage.log.tail._Gathered.fold",
                lambda *_: (_ for _ in ()).throw(MemoryError),
            )
            with pytest.raises(MemoryError):
                tail.poll()
        tail.poll()
        assert tail.fold.get("a").value == b"1"


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([], "1 to 65535 batches"),
        ([b"x"] * 65_536, "1 to 65535 batches"),
        ([b"x" * 500] * 2, "over the limit"),
    ],
    ids=["none", "too many", "too long"],
)
def test_a_group_that_no_reader_takes_is_refused(path, items, why, monkeypatch):
    """Batches of 16 MiB each became one frame of 1.09 GB: it was answered, and no reader took
    it."""
    monkeypatch.setattr("foldlog.storage.log.log.MAX_BODY_BYTES", 1000)
    engine = Engine(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=why):
        engine.log.append(items)
    assert path.read_bytes() == before
    engine.close()
