"""The origin: whose position the cursor is. It stands beside the cursor, wherever that goes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

import foldlog
from foldlog import (
    AppendLogSnapshot,
    Delete,
    ForeignFileError,
    InvalidFormatError,
    Put,
    WatchCursor,
)
from foldlog.protocol import frames
from foldlog.protocol.decoding import decode_batches
from foldlog.protocol.tokens import MAX_ORIGIN_BYTES, NAME_BYTES
from foldlog.protocol.updates import batches_body, encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.formats.slipstream.log import SLIPSTREAM
from foldlog.storage.log import scan
from foldlog.storage.log.sidecars.note import is_own
from foldlog.storage.log.sidecars.origins import (
    ORIGIN_BYTES,
    ORIGIN_MAGIC,
    origin_path,
    pack_origin,
    parse_origin,
)

ORIGIN = b"n" * NAME_BYTES + b"incarnation one."
OTHER = b"n" * NAME_BYTES + b"incarnation two."


STRANGERS = {
    "a link": lambda path: path.symlink_to(path.parent / "elsewhere"),
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "a file": lambda path: path.write_text("the origin of the species"),
}


def tree(folder):
    """All that is in a directory: by name the inode, the mode and the size."""
    return {file.name: (*file.lstat()[:2], file.lstat().st_size) for file in folder.iterdir()}


def at(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number)


def fed(path, *origins, format=None):
    """An engine that was fed one batch of each origin."""
    engine = Engine(path, format=format)
    for number, origin in enumerate(origins, 1):
        engine.commit([encode_batch([Put(f"k{number}", b"v")], at(number), origin)])
    return engine


def read(path, **options):
    """The log's origin and cursor."""
    engine = Engine(path, **options)
    try:
        return engine.fold.origin, engine.fold.cursor()
    finally:
        engine.close()


def export(path):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.export_to(path.parent / "artifact")
    return path.parent / "artifact"


@pytest.mark.parametrize("format", ["foldlog", "slipstream-v2"])
def test_the_origin_survives_reopening_and_compaction(path, format):
    engine = fed(path, ORIGIN, format=format)
    assert engine.fold.origin == ORIGIN
    engine.close()
    engine = Engine(path)
    assert (engine.fold.origin, engine.fold.cursor()) == (ORIGIN, at(1))
    engine.compact()
    assert engine.fold.origin == ORIGIN
    engine.commit([encode_batch([Delete("k1")], at(2), ORIGIN)])
    engine.compact()
    engine.close()
    engine = Engine(path)
    assert (engine.fold.origin, engine.fold.cursor(), len(engine.fold)) == (ORIGIN, at(2), 0)
    engine.close()


@pytest.mark.parametrize("format", ["foldlog", "slipstream-v2"])
def test_a_cursor_of_nobody_has_no_origin(path, format):
    fed(path, ORIGIN, b"", format=format).close()
    assert read(path) == (b"", at(2))


def test_batches_carried_over_by_a_compaction_keep_their_origin(path):
    engine = fed(path, ORIGIN)
    rewrite = engine.begin_compaction()
    engine.commit([encode_batch([Put("late", b"")], at(2), OTHER)])
    rewrite.write()
    assert engine.finish_compaction(rewrite).origin == OTHER
    engine.close()
    assert read(path) == (OTHER, at(2))


def test_local_writes_leave_the_origin_beside_the_cursor(path):
    fed(path, ORIGIN).close()
    with foldlog.open(path) as store, foldlog.follow(path) as follower:
        store.put("local", b"")
        assert store.snapshot().origin == ORIGIN
        follower.wait_for(at(1), timeout_s=60)
        assert follower.snapshot().origin == ORIGIN
    with foldlog.open(path) as store:
        store.apply([Put("fed by hand", b"")], at(7))
        assert store.snapshot().origin == b""


def test_an_artifact_has_the_origin_of_its_cursor(path):
    fed(path, ORIGIN).close()
    artifact = export(path)
    with AppendLogSnapshot.import_artifact(artifact, path.parent / "copy.log")[1] as copy:
        assert copy.snapshot().origin == ORIGIN
        assert copy.verify().ok


def test_a_reader_from_before_origins_refuses_the_frame_as_a_newer_one(path, monkeypatch):
    fed(path, ORIGIN).close()
    monkeypatch.setattr(scan, "KNOWN_FLAGS", frames.FLAG_SYNC_EACH)
    with pytest.raises(InvalidFormatError, match="newer"):
        Engine(path)


@pytest.mark.parametrize("bad", [b"", b"o" * 33, "text", None, 7])
def test_an_origin_that_is_none_is_not_read(bad):
    item = msgpack.packb([b"", [], [], [], bad])
    with pytest.raises(ValueError, match="origin"):
        decode_batches(batches_body([item]), 1)


@pytest.mark.parametrize(("bad", "error"), [("text", TypeError), (b"o" * 33, ValueError)])
def test_an_origin_that_is_none_is_not_written(bad, error):
    with pytest.raises(error, match="an origin"):
        encode_batch([], at(1), bad)


def test_a_crash_between_a_batch_and_its_note_leaves_a_name_without_an_incarnation(
    path, monkeypatch
):
    """The records of slipstream-v2 have no place for an origin. Noted after its batch alone, a
    crash in between would leave the former origin beside the cursor of the new one, and a mirror of
    the former would resume from a foreign position."""
    engine = fed(path, ORIGIN, format="slipstream-v2")
    monkeypatch.setattr(type(engine.log), "append", crash)
    with pytest.raises(KeyboardInterrupt):
        engine.commit([encode_batch([Put("k", b"")], at(9), OTHER)])
    engine.log.abandon()
    monkeypatch.undo()
    assert read(path) == (ORIGIN[:NAME_BYTES], at(1))
    assert not SLIPSTREAM.keeps_origin


@pytest.mark.parametrize("create", ["open", "import"])
def test_a_log_that_takes_the_name_of_a_deleted_one_does_not_take_its_origin(path, create):
    fed(path.parent / "other.log", OTHER, format="slipstream-v2").close()
    artifact = export(path.parent / "other.log")
    fed(path, ORIGIN, format="slipstream-v2").close()
    path.unlink()
    if create == "import":
        AppendLogSnapshot.import_artifact(artifact, path, format="slipstream-v2")[1].close()
    assert read(path, format="slipstream-v2")[0] == b""


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_strangers_file_of_its_name_is_refused_and_left_as_it_is(path, stranger):
    """The origin was kept in LOG.origin: what had that name was overwritten, and removed when any
    log was created beside it."""
    taken = origin_path(path)
    STRANGERS[stranger](taken)
    path.with_name(f"{path.name}.origin").write_text("the origin of the species")
    before = tree(path.parent)
    with pytest.raises(ForeignFileError) as caught:
        Engine(path, format="slipstream-v2")
    assert caught.value.path == taken
    assert tree(path.parent) == before
    fed(path, ORIGIN).close()  # a log that needs no such name
    assert before.items() <= tree(path.parent).items()


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_strangers_file_that_comes_later_is_not_replaced(path, stranger):
    engine = Engine(path, format="slipstream-v2")
    STRANGERS[stranger](origin_path(path))
    before = tree(path.parent)
    with pytest.raises(ForeignFileError):
        engine.commit([encode_batch([Put("k", b"v")], at(1), ORIGIN)])
    assert tree(path.parent) == before
    assert engine.fold.seq == 0
    engine.close()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_it_is_no_more_accessible_than_the_log(path, mode):
    fed(path, format="slipstream-v2").close()
    path.chmod(mode)
    fed(path, ORIGIN).close()
    noted = origin_path(path)
    assert stat.S_IMODE(noted.stat().st_mode) == mode
    path.chmod(0o600)
    assert read(path)[0] == ORIGIN
    assert stat.S_IMODE(noted.stat().st_mode) == 0o600


@given(st.binary(max_size=MAX_ORIGIN_BYTES), st.data())
def test_damage_to_it_leaves_no_origin_and_never_another(origin, data):
    packed = pack_origin(origin)
    assert (len(packed), parse_origin(packed)) == (ORIGIN_BYTES, origin)
    at, bit = data.draw(st.integers(0, ORIGIN_BYTES - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(packed)
    flipped[at] ^= 1 << bit
    assert parse_origin(bytes(flipped)) == b""
    assert is_own(bytes(flipped), ORIGIN_MAGIC, ORIGIN_BYTES), "it is damaged, and still ours"
    assert parse_origin(packed[:at]) == b""


def crash(*_: object) -> None:
    raise KeyboardInterrupt
