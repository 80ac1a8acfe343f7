"""Invalid arguments and files: the caller gets an error; the store and the file are unchanged."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from logfiles import some_batches, write_log

import foldlog
from foldlog import (
    AppendLogSnapshot,
    Delete,
    FoldlogError,
    InvalidFormatError,
    Purge,
    Put,
    StoreLocked,
    VersionToken,
    WatchCursor,
)
from foldlog.protocol import frames
from foldlog.protocol.updates import encode_batch
from foldlog.storage.log.files import Files

MAX_KEY, MAX_VALUE = 65_535, 16 * 1024 * 1024
ONE = WatchCursor.from_u64(1)


@pytest.fixture
def snap(path):
    _, snap = AppendLogSnapshot.open(path)
    snap.apply([Put("a", b"1")], ONE)
    yield snap
    snap.close()


def refused(snap, path, updates, error, match):
    before = path.read_bytes()
    with pytest.raises(error, match=match) as caught:
        snap.apply(updates, WatchCursor.from_u64(2))
    assert path.read_bytes() == before
    assert [(entry.key, entry.value) for entry in snap.range("")] == [("a", b"1")]
    assert snap.cursor() == ONE
    assert not isinstance(caught.value, FoldlogError)
    return caught.value


# Updates. The small batch, the large one and the mixed one take different ways through the encoder.

FILLERS = {
    "alone": [],
    "among few": [Put(f"k{n}", b"v") for n in range(5)],
    "among many": [Put(f"k{n}", b"v") for n in range(300)],
    "among removals": [Delete("a"), Purge("b"), Put("c", b"v")],
}
BAD = {
    "a lone high surrogate": (Put("x\ud800", b"v"), ValueError, "surrogate at character 1"),
    "a lone low surrogate": (Delete("\udc00y"), ValueError, "surrogate at character 0"),
    "a pair of surrogates": (Purge("\ud83d\ude00"), ValueError, "surrogate"),
    "a key of bytes": (Put(b"k", b"v"), TypeError, "a key is a str, not bytes"),
    "a key that is None": (Delete(None), TypeError, "a key is a str, not NoneType"),
    "a key of a subclass": (Put(type("Key", (str,), {})("k"), b"v"), TypeError, "str, not Key"),
    "a key one byte too long": (Put("x" * 65_536, b"v"), ValueError, "65536 bytes"),
    "a wide key one byte too long": (Put("\U0001f600" * 16_384, b"v"), ValueError, "65536 bytes"),
    "a value of text": (Put("k", "v"), TypeError, "is bytes, not str"),
    "a value of bytearray": (Put("k", bytearray(b"v")), TypeError, "is bytes, not bytearray"),
    "a value of memoryview": (Put("k", memoryview(b"v")), TypeError, "is bytes, not memoryview"),
    "a value that is None": (Put("k", None), TypeError, "is bytes, not NoneType"),
    "a value that is False": (Put("k", False), TypeError, "is bytes, not bool"),
    "a value one byte too long": (Put("k", bytes(MAX_VALUE + 1)), ValueError, "16777217 bytes"),
    "a version of bytes": (Put("k", b"v", b"1"), TypeError, "is a VersionToken, not bytes"),
    "a version that is a cursor": (Delete("k", ONE), TypeError, "VersionToken, not WatchCursor"),
    "a version that is a number": (Purge("k", 7), TypeError, "is a VersionToken, not int"),
    "a tuple": (("k", b"v", VersionToken()), TypeError, "not tuple"),
    "a class": (Put, TypeError, "not type"),
    "text": ("k", TypeError, "not str"),
    "None": (None, TypeError, "not NoneType"),
}


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_update_is_named_and_changes_nothing(snap, path, name, filler):
    bad, error, match = BAD[name]
    others = FILLERS[filler]
    middle = len(others) // 2
    caught = refused(snap, path, [*others[:middle], bad, *others[middle:]], error, match)
    assert f"update {middle}" in str(caught)
    snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    assert snap.get("b").value == b"2"


@pytest.mark.parametrize(
    "updates", [None, 7, Put("k", b"v"), Delete("k")], ids=lambda value: type(value).__name__
)
def test_what_is_no_batch_is_a_type_error(snap, path, updates):
    refused(snap, path, updates, TypeError, "iterable of Put, Delete or Purge")


@pytest.mark.parametrize(
    "updates",
    ["text", b"bytes", {"k": b"v"}, [[Put("k", b"v")]]],
    ids=lambda value: type(value).__name__,
)
def test_an_iterable_of_other_things_is_a_type_error(snap, path, updates):
    refused(snap, path, updates, TypeError, "update 0")


def test_keys_values_and_tokens_at_their_limits_are_taken(path):
    keys = ["x" * MAX_KEY, "\U0001f600" * 16_383 + "abc", "é" * 32_767 + "x"]
    assert {len(key.encode()) for key in keys} == {MAX_KEY}
    largest = bytes(MAX_VALUE)
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply(
            [Put(key, b"v", VersionToken(b"0123456789")) for key in keys],
            WatchCursor(b"9876543210"),
        )
        snap.apply(
            [Put("large", largest), Delete("x" * MAX_KEY + "not there"[:0])],
            WatchCursor(b"9876543210"),
        )
    with AppendLogSnapshot.open(path)[1] as snap:
        assert [entry.key for entry in snap.range("")] == sorted([*keys[1:], "large"])
        assert snap.get("large").value == largest
        assert snap.get(keys[1]).version == VersionToken(b"0123456789")
        assert snap.cursor() == WatchCursor(b"9876543210")


@pytest.mark.parametrize("token", [VersionToken, WatchCursor])
def test_a_token_of_eleven_bytes_cannot_be_made(token):
    with pytest.raises(ValueError, match="at most 10"):
        token(bytes(11))
    with pytest.raises(TypeError):
        token("text")
    with pytest.raises(TypeError):
        token(8)


@pytest.mark.parametrize(
    ("threshold", "error"),
    [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError)],
)
def test_a_bad_threshold_is_refused_before_any_file_is_touched(path, threshold, error):
    with pytest.raises(error, match="compact_threshold"):
        AppendLogSnapshot.open(path, threshold)
    with pytest.raises(error, match="compact_threshold"):
        AppendLogSnapshot.import_artifact(path.parent, path, threshold)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("sync", [None, "interval", True, ""])
def test_an_unknown_way_to_sync_is_refused_before_any_file_is_touched(path, sync):
    wrong = ValueError if isinstance(sync, str) else TypeError
    with pytest.raises(wrong, match="sync"):
        AppendLogSnapshot.open(path, sync=sync)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("bad", [None, 7, ["x"]])
def test_a_path_of_another_type_is_a_type_error(bad):
    with pytest.raises(TypeError):
        AppendLogSnapshot.open(bad)


def test_an_open_store_and_its_snapshots_do_not_pickle_but_what_is_read_does(snap):
    for thing in (snap, snap.snapshot()):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(thing)
    entry = snap.get("a")
    assert pickle.loads(pickle.dumps(entry)) == entry
    assert pickle.loads(pickle.dumps(snap.cursor())) == snap.cursor()
    for update in (Put("k", b"v", VersionToken.from_u64(1)), Delete("k"), Purge("k")):
        assert pickle.loads(pickle.dumps(update)) == update
        assert type(pickle.loads(pickle.dumps(update))) is type(update)


# Paths that lead to no log.


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "link to a folder"])
def test_a_path_that_is_no_file_is_refused_at_once(path, kind):
    target = path
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(path))
    else:
        (path.parent / "folder").mkdir()
        path.symlink_to(path.parent / "folder")
    before = os.lstat(target)
    with pytest.raises(OSError):  # noqa: PT011 - which one is the system's to say
        AppendLogSnapshot.open(path)
    after = os.lstat(target)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert before.st_mtime_ns == after.st_mtime_ns


def test_a_device_is_refused_at_once(path):
    path.symlink_to("/dev/null")
    try:
        with pytest.raises(OSError):  # noqa: PT011
            AppendLogSnapshot.open(path)
        assert not list(Path("/dev").glob("null.*")), "something was left beside the device"
    finally:
        for left in Path("/dev").glob("null.*"):
            left.unlink()


def test_a_link_that_leads_nowhere_is_refused_and_leads_nowhere_still(path):
    path.symlink_to(path.parent / "nowhere")
    with pytest.raises(FileNotFoundError, match="dangling link"):
        AppendLogSnapshot.open(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_that_is_missing_is_not_made(path):
    with pytest.raises(FileNotFoundError):
        AppendLogSnapshot.open(path.parent / "missing" / "state.log")
    assert list(path.parent.iterdir()) == []


def test_a_link_to_a_log_opens_the_log_and_stays_a_link_through_compaction(path):
    link = path.with_name("link.log")
    write_log(path, some_batches(2))
    link.symlink_to(path.name)
    with AppendLogSnapshot.open(link)[1] as snap:
        snap.apply([Put("k", b"v")], ONE)
        snap.compact()
        assert snap.get("k").value == b"v"
    assert link.is_symlink()
    with AppendLogSnapshot.open(path)[1] as snap:
        assert snap.get("k").value == b"v"


def test_a_bare_file_name_and_a_change_of_folder_are_fine(path, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parent)
    _, snap = AppendLogSnapshot.open("bare.log")
    monkeypatch.chdir(tmp_path)
    snap.apply([Put("k", b"v")], ONE)
    snap.compact()
    snap.export_to("artifact")
    snap.close()
    assert (path.parent / "bare.log").exists()
    assert (tmp_path / "artifact" / "MANIFEST.json").exists()
    _, snap = AppendLogSnapshot.open(os.fsencode(path.parent / "bare.log"))
    assert snap.get("k").value == b"v"
    snap.close()


class Unreadable(Files):
    """A file system that lets nobody read."""

    def open_read(self, path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_a_log_that_may_not_be_read_is_an_os_error_and_the_lock_is_free_again(path):
    raw = write_log(path, some_batches(2))
    with pytest.raises(PermissionError):
        AppendLogSnapshot.open(path, files=Unreadable())
    assert path.read_bytes() == raw
    AppendLogSnapshot.open(path)[1].close()


def test_a_file_that_is_no_log_is_refused_with_its_path_and_stays(path):
    path.write_text("my shopping list\n" * 10)
    with pytest.raises(InvalidFormatError, match="not a foldlog log") as caught:
        AppendLogSnapshot.open(path)
    assert caught.value.path == path
    assert path.read_text() == "my shopping list\n" * 10
    assert pickle.loads(pickle.dumps(caught.value)).offset == 0


# One writer.


@pytest.mark.parametrize(
    "way",
    ["same path", "relative path", "symbolic link", "hard link", "linked folder", "dotted path"],
)
def test_a_log_that_is_open_is_locked_by_any_name(snap, path, way, monkeypatch, tmp_path):
    other, knows_holder = path, True
    if way == "relative path":
        monkeypatch.chdir(path.parent)
        other = path.name
    elif way == "symbolic link":
        other = path.with_name("link.log")
        other.symlink_to(path)
    elif way == "hard link":
        other = path.with_name("hard.log")
        os.link(path, other)
        knows_holder = False  # its lock file is another; the lock on the log itself tells
    elif way == "linked folder":
        (tmp_path / "folder").symlink_to(path.parent)
        other = tmp_path / "folder" / path.name
    elif way == "dotted path":
        other = path.parent / ".." / path.parent.name / "." / path.name
    for _ in range(2):
        with pytest.raises(StoreLocked) as caught:
            AppendLogSnapshot.open(other)
        assert caught.value.pid == (os.getpid() if knows_holder else None)
    snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.compact()
    with pytest.raises(StoreLocked):
        AppendLogSnapshot.open(path)
    snap.close()
    with AppendLogSnapshot.open(path)[1] as again:
        assert again.get("b").value == b"2"


def test_another_process_finds_the_log_locked_and_learns_by_whom(snap, path):
    code = """
import sys, foldlog
try:
    foldlog.AppendLogSnapshot.open(sys.argv[1])
except foldlog.StoreLocked as error:
    print(error.pid, error.path)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [str(os.getpid()), str(path)]
    assert snap.get("a").value == b"1"


def test_a_killed_writer_leaves_no_lock(path):
    code = """
import os, sys, foldlog
_, snap = foldlog.AppendLogSnapshot.open(sys.argv[1])
snap.apply([foldlog.Put("k", b"v")], foldlog.WatchCursor.from_u64(5))
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60)
    assert done.returncode == -9
    cursor, snap = AppendLogSnapshot.open(path)
    with snap:
        assert cursor.as_u64() == 5
        assert snap.get("k").value == b"v"
        assert snap.report.cut_bytes == 0


def test_a_refused_opening_gives_its_lock_back(path):
    path.write_bytes(b"no log")
    for _ in range(2):
        with pytest.raises(InvalidFormatError):
            AppendLogSnapshot.open(path)
    path.unlink()
    AppendLogSnapshot.open(path)[1].close()


# A fork.


def test_a_forked_child_may_read_but_not_write_and_does_not_free_the_lock(snap, path):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = b"nothing"
        try:
            snap.apply([Put("k", b"child")], ONE)
        except foldlog.ForkedStore:
            said = b"forked " + snap.get("a").value
        finally:
            os.write(write_end, said)
            os._exit(0)
    os.close(write_end)
    os.waitpid(pid, 0)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b"forked 1"
    with pytest.raises(StoreLocked):
        AppendLogSnapshot.open(path)
    snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    assert snap.get("k") is None


def test_what_apply_takes_fits_into_a_frame_that_opening_takes(path, monkeypatch):
    """A batch of exactly the limit was written, and refused by the next open.

    Its frame was one byte longer.
    """
    limit = 4096
    for module in ("protocol.updates", "storage.log.log"):
        monkeypatch.setattr(f"foldlog.{module}.MAX_BODY_BYTES", limit)
    monkeypatch.setitem(frames._BODY_LIMITS, frames.KIND_BATCHES, limit)
    monkeypatch.setattr("foldlog.protocol.updates.MAX_ITEM_BYTES", limit - 5)
    room = (
        limit - 5 - len(encode_batch([Put("k", b"x" * 1000)], WatchCursor.from_u64(1)).item) + 1000
    )
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("k", b"x" * room)], WatchCursor.from_u64(1))
        with pytest.raises(ValueError, match="over the limit"):
            snap.apply([Put("k", b"x" * (room + 1))], WatchCursor.from_u64(2))
        snap._engine.log.abandon()
    with AppendLogSnapshot.open(path)[1] as snap:
        assert snap.get("k").value == b"x" * room
