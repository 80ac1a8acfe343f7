"""Type checkers on a user's program: they accept what is correct and report what is wrong.

Needs the extra `dev`; `.ci/run` runs it. The checkers see the package as it is installed: a copy
in the layout of the wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.release, pytest.mark.timeout(300)]

PROGRAM = '''
"""A program of a user, which uses all of the face."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import assert_type

import foldlog
from foldlog import (
    AppendLogSnapshot,
    Apply,
    Changed,
    CorruptLogError,
    Delete,
    Event,
    FoldlogError,
    FoldSnapshot,
    Get,
    KvEntry,
    Lagged,
    Purge,
    Put,
    Range,
    SnapshotStore,
    Synced,
    Update,
    VersionToken,
    WatchCursor,
    aio,
)
from foldlog.protocol.engine import Snapshot
from foldlog.testing import Fault, FaultyFiles, crash_at


def through_the_engine(path: Path) -> None:
    cursor, snap = AppendLogSnapshot.open(path, sync="always", on_damage="cut")
    assert_type(cursor, WatchCursor)
    with snap:
        updates: list[Update] = [Put("a", b"1", VersionToken.from_u64(1)), Delete("b"), Purge("c")]
        assert_type(snap.apply(updates, WatchCursor.from_u64(1)), int)
        assert_type(snap.get("a"), KvEntry | None)
        assert_type(snap.range("a"), list[KvEntry])
        assert_type(snap.report.kept_at, Path | None)
        as_any_store(snap)


def as_any_store(store: SnapshotStore) -> bytes:
    entry = store.get("a")
    return b"" if entry is None else entry.value


def through_the_store(path: str) -> None:
    with foldlog.open(path, readers=1, sync="interval", files=FaultyFiles(Fault("sync")), step=crash_at("writer.stop")) as store:
        as_any_store(store)
        future = store.apply_async([Put("a", b"1")], WatchCursor.from_u64(2))
        assert_type(future, Future[int])
        version = store.put("b", b"2")
        store.update("b", b"3", expected=version)
        snapshot = store.snapshot()
        assert_type(snapshot, FoldSnapshot)
        assert_type(dict(snapshot.items("a")), dict[str, bytes])
        number = store.cursor().as_u64()
        assert_type(number, int | None)
        store.writer.tell(Apply((Put("a", b"1"),), WatchCursor.none()))
        store.reader.ask(Get("a"))
        store.reader.ask(Range("a"))
        with store.watch("a", since=snapshot) as watch:
            for event in watch:
                print(told(event))
        for update in foldlog.diff(snapshot, store.snapshot()):
            print(update.key)


def told(event: Event) -> str:
    match event:
        case Changed(Put(key, value), cursor, seq):
            return f"{key} {len(value)} {cursor.hex()} {seq + 1}"
        case Changed(update):
            return update.key
        case Synced(cursor) | Lagged(cursor):
            return cursor.hex()
        case _:
            return ""


class Point:
    """A value of the user's, with a codec of the user's."""

    def __init__(self, x: int) -> None:
        self.x = x


class PointCodec:
    def encode(self, value: Point, /) -> bytes:
        return str(value.x).encode()

    def decode(self, raw: bytes, /) -> Point:
        return Point(int(raw))


def through_views(path: Path) -> int:
    with foldlog.open(path) as store, foldlog.follow(path) as follower:
        points = foldlog.view(store, PointCodec(), "points/")
        assert_type(points, foldlog.MutableView[Point])
        points["points/a"] = Point(1)
        assert_type(points["points/a"], Point)
        assert_type(points.get("points/b"), Point | None)
        assert_type(foldlog.view(store, "raw")["points/a"], bytes)
        seen = foldlog.view(follower, PointCodec(), "points/")
        assert_type(seen, foldlog.View[Point])
        assert_type(seen.snapshot(), foldlog.View[Point])
        with seen.watch() as watch:
            for event in watch:
                match event:
                    case foldlog.Decoded():
                        assert_type(event.value, Point)
                    case foldlog.Undecodable():
                        print(event.error.cause)
                    case _:
                        break
        with foldlog.derive(store, keys_of, longer) as derived:
            assert_type(derived.value, frozenset[str])
            assert_type(derived.state.snapshot, Snapshot)
        assert_type(store.get("a", 7), KvEntry | int)
        assert_type(store.get_many(["a"]), dict[str, KvEntry])
        follower.wait_for(seq=store.put("a", b""))
        assert_type(store.health(), foldlog.Health)
        return int(store.cursor())


def keys_of(state: FoldSnapshot) -> frozenset[str]:
    return frozenset(state)


def longer(keys: frozenset[str], updates: Sequence[Update]) -> frozenset[str]:
    return keys | {update.key for update in updates}


async def on_a_loop(path: Path) -> None:
    async with aio.open(path, sync="never") as store, aio.follow(path) as follower:
        assert_type(store, aio.AsyncStore)
        assert_type(await store.apply([Put("a", b"1")], 1), int)
        version = await store.put("b", b"2")
        assert_type(version, VersionToken)
        await follower.wait_for(seq=version)
        assert_type(follower.get("b"), KvEntry | None)
        async for event in store.watch("a"):
            print(told(event))
            break


def from_another_process(path: Path) -> int:
    try:
        with foldlog.follow(path, poll_interval_s=0.1) as follower:
            follower.wait_for(WatchCursor.from_u64(7), timeout_s=1.0)
            return len(follower)
    except CorruptLogError as error:
        return error.offset
    except FoldlogError:
        return -1
'''

MISTAKES = {
    'Put("a", "text")': "a value that is text",
    "Put(b'a', b'1')": "a key that is bytes",
    'foldlog.open("x", sync="sometimes")': "a way to sync that there is none of",
    'foldlog.open("x").apply([("a", b"1")], WatchCursor.none())': "an update that is a tuple",
    'foldlog.open("x").apply([], "7")': "a cursor that is text",
    'foldlog.open("x").get("a").value': "an entry that may be None",
    'foldlog.open("x").snapshot().get(b"a", None)': "a key that is bytes, with a default",
    'foldlog.open("x").range("a", limit="3")': "a limit that is text",
    'foldlog.view(foldlog.open("x"), "yaml")': "a codec that there is none of",
    'foldlog.view(foldlog.open("x"), "raw")["a"] = "text"': "a value of another type",
    'foldlog.view(foldlog.follow("x"), "json")["a"] = 1': "a view that only reads",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, as a wheel puts it."""
    folder = tmp_path_factory.mktemp("installed")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "foldlog", folder / "foldlog", ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The program, and one mistake a line behind two lines of imports."""
    folder = tmp_path_factory.mktemp("program")
    right, wrong = folder / "right.py", folder / "wrong.py"
    right.write_text(PROGRAM, encoding="utf-8")
    wrong.write_text(
        "import foldlog\nfrom foldlog import Put, WatchCursor\n" + "\n".join(MISTAKES) + "\n",
        encoding="utf-8",
    )
    return right, wrong


def lines_with_mistakes() -> set[int]:
    return set(range(3, 3 + len(MISTAKES)))


def test_mypy_in_strict_mode_accepts_the_program_and_finds_each_mistake(
    installed: Path, programs: tuple[Path, Path]
) -> None:
    pytest.importorskip("mypy")
    right, wrong = programs
    command = (
        *(sys.executable, "-m", "mypy", "--strict", "--output=json", "--follow-imports=silent"),
        *("--cache-dir", str(installed / "cache"), str(right), str(wrong)),
    )
    env = {**os.environ, "MYPYPATH": str(installed)}
    done = subprocess.run(
        command, cwd=right.parent, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    errors = [
        (Path(error["file"]).name, error["line"]) for error in found if error["severity"] == "error"
    ]
    assert {file for file, _ in errors} == {"wrong.py"}, done.stdout
    assert {line for _, line in errors} == lines_with_mistakes(), done.stdout


def test_pyright_in_strict_mode_accepts_the_program_and_finds_each_mistake(
    installed: Path, programs: tuple[Path, Path]
) -> None:
    pytest.importorskip(
        "basedpyright", reason="pyright's rules, in a package that brings all it needs"
    )
    right, _ = programs
    config = {
        "include": ["right.py", "wrong.py"],
        "extraPaths": [str(installed)],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
    }
    (right.parent / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    command = (sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable)
    done = subprocess.run(command, cwd=right.parent, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [
        (Path(error["file"]).name, error["range"]["start"]["line"] + 1, error["message"])
        for error in found
        if error["severity"] == "error"
    ]
    assert [error for error in errors if error[0] != "wrong.py"] == []
    assert {line for _, line, _ in errors} == lines_with_mistakes(), errors


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "foldlog" / "py.typed").exists()
