"""The environment's failure is no evidence about bytes: it passes through, and the file is as it
was."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from logfiles import UNSYNCED, some_batches, write_log

from foldlog import AppendLogSnapshot, Put, WatchCursor
from foldlog.protocol import decoding, updates
from foldlog.protocol.decoding import Undecodable, decode_batches
from foldlog.protocol.updates import encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.fold import leaf
from foldlog.storage.formats.registry import load_intact
from foldlog.storage.log.files import OS_FILES, ReadHandle
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
