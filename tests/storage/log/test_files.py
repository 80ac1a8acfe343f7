"""Descriptors: each is closed, once, whatever interrupts who closes it."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest
from actor_kit import DEADLINE_S, descriptors
from interrupts import At, Struck, points, strike

from foldlog.storage.log import files
from foldlog.storage.log.files import OS_FILES, Files, ReadHandle


@pytest.fixture(autouse=True)
def nobody_keeps_what_strikes_a_finalizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported by CPython, and swallowed. pytest would keep its traceback, and so the
    handle."""
    monkeypatch.setattr(sys, "unraisablehook", lambda report: None)


def drop(handles: list[ReadHandle]) -> None:
    """Drop a handle, and strike at the first bytecode of its finalizer."""

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code is ReadHandle.__del__.__code__:
            sys.setprofile(None)
            raise Struck

    try:
        sys.setprofile(profile)
        handles.pop()
    finally:
        sys.setprofile(None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.log"
    path.write_bytes(b"content")
    return path


def test_a_handle_whose_finalizer_was_interrupted_is_closed_by_the_next_opening(path: Path):
    """A Ctrl-C at the first bytecode of `__del__` left the descriptor open for good."""
    left_open = 0
    for number in points():
        handles = [ReadHandle(OS_FILES, path)]
        at = At(number, strike)
        with contextlib.suppress(Struck):
            at.run(handles.clear)
        handles.clear()  # the first point is before that
        left_open += len(descriptors(path.parent))
        with ReadHandle(OS_FILES, path) as other:
            assert len(descriptors(path.parent)) == 1, f"struck at point {number}"
            assert other.read(7, 0) == b"content"
        if not at.fired:
            break
    assert left_open > 1
    assert not files._gone


def test_a_handle_whose_close_was_interrupted_can_be_closed_again(path: Path):
    another = path.with_name("b.log")
    another.write_bytes(b"content")
    for number in points():
        handle = ReadHandle(OS_FILES, path)
        at = At(number, strike)
        with contextlib.suppress(Struck):
            at.run(handle.close)
        other = ReadHandle(OS_FILES, another)  # it may get the number
        handle.close()
        assert other.read(7, 0) == b"content", f"struck at point {number}"
        other.close()
        assert descriptors(path.parent) == []
        if not at.fired:
            break
    assert number > 5


def test_an_opening_that_is_interrupted_as_it_closes_what_was_left_loses_none(path: Path):
    for number in points():
        handles = [ReadHandle(OS_FILES, path), ReadHandle(OS_FILES, path)]
        drop(handles)
        drop(handles)
        assert len(descriptors(path.parent)) == 2
        at = At(number, strike)
        with contextlib.suppress(Struck):
            at.run(files.close_left_open)
        ReadHandle(OS_FILES, path).close()
        assert descriptors(path.parent) == [], f"struck at point {number}"
        if not at.fired:
            break
    assert number > 5


def test_a_handle_that_could_not_be_opened_leaves_nothing_to_close(path: Path):
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            ReadHandle(OS_FILES, path.with_name("none"))
    assert not files._gone
    ReadHandle(OS_FILES, path).close()


def test_two_openings_do_not_close_the_same_descriptor(path: Path):
    closing, go_on = threading.Event(), threading.Event()

    class Slow(Files):
        def close(self, fd: int) -> None:
            closing.set()
            assert go_on.wait(DEADLINE_S)
            super().close(fd)

    handles = [ReadHandle(Slow(), path)]
    drop(handles)
    thread = threading.Thread(target=files.close_left_open)
    thread.start()
    assert closing.wait(DEADLINE_S)
    files.close_left_open()
    other = ReadHandle(OS_FILES, path)
    assert len(descriptors(path.parent)) == 2
    go_on.set()
    thread.join(DEADLINE_S)
    assert other.read(7, 0) == b"content"
    other.close()
    assert descriptors(path.parent) == []


def test_a_handle_that_is_collected_as_garbage_is_closed_once(path: Path):
    """The collector tells of it first and calls its finalizer later. An opening in between, on
    another thread, closed it, too, and got its number: then the finalizer closed that file."""
    opened: list[ReadHandle] = []

    class Interrupted(Files):
        def close(self, fd: int) -> None:
            if not opened:
                opened.append(ReadHandle(OS_FILES, path.parent / "b.log"))
                thread = threading.Thread(target=open_another)
                thread.start()
                thread.join(DEADLINE_S)
            super().close(fd)

    def open_another() -> None:
        opened.append(ReadHandle(OS_FILES, another))

    another = path.with_name("b.log")
    another.write_bytes(b"another")
    knot: list[object] = [ReadHandle(Interrupted(), path)]
    knot.append(knot)
    del knot
    gc.collect()
    assert [handle.read(7, 0) for handle in opened] == [b"another"] * 2
    for handle in opened:
        handle.close()
    assert descriptors(path.parent) == []
