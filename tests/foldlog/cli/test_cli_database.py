"""The commands on a directory: a RocksDB database is read, checked, converted and written like a
log, and anything else is refused."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_kit import files_in, run, told

from foldlog import AppendLogSnapshot, KvEntry, Put, RocksDbSnapshot, VersionToken, WatchCursor

CACHE = 8 * 1024 * 1024
BATCH = [
    Put("a", b"1"),
    Put("b/é", b"\xff", VersionToken.from_u64(3)),
    Put("b/x", b"two", VersionToken(b"0123456789")),
]
ENTRIES = sorted(KvEntry(put.key, put.value, put.version) for put in BATCH)
CURSOR = WatchCursor.from_u64(7)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "state.db"
    with RocksDbSnapshot.open(path, cache_bytes=CACHE)[1] as snap:
        snap.apply(BATCH, CURSOR)
    return path


@pytest.fixture
def open_elsewhere(database: Path) -> Iterator[RocksDbSnapshot]:
    """The writer of the database, which has batches in its write-ahead log only."""
    with RocksDbSnapshot.open(database, cache_bytes=CACHE)[1] as snap:
        snap.apply([Put("c", b"late")], WatchCursor.from_u64(8))
        yield snap


def contents_of(path: Path) -> dict[str, bytes]:
    """Not the times: the binding writes its own configuration file again, as it was."""
    return {name: content for name, (content, _) in files_in(path).items()}


def state_of(path: Path) -> tuple[list[KvEntry], WatchCursor]:
    if path.is_dir():
        cursor, snap = RocksDbSnapshot.open(path, cache_bytes=CACHE)
    else:
        cursor, snap = AppendLogSnapshot.open(path)  # type: ignore[assignment]
    with snap:
        return snap.range(), cursor


def test_get_and_range_read_a_database(database: Path) -> None:
    before = contents_of(database)
    assert run("get", database, "a").stdout_bytes == b"1"
    assert told("get", database, "b/é")["version"] == 3
    missing = run("get", database, "nope")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "no entry with key nope" in missing.stderr
    assert run("range", database, "b/").stdout == "b/x\ttwo\nb/é\t\\xff\n"
    assert run("range", database, "--keys", "--limit", "1").stdout == "a\n"
    assert contents_of(database) == before, "nothing was changed"


def test_info_and_verify_tell_of_a_database(database: Path) -> None:
    facts = told("info", database)
    assert (facts["format"], facts["sequence"], facts["cursor"]) == ("rocksdb", 1, 7)
    assert facts["size_bytes"] > 0
    assert "about 3" in run("info", database).stdout
    verified = run("verify", database)
    assert verified.exit_code == 0
    assert "ok: " in verified.stdout
    report = told("verify", database)
    assert (report["ok"], report["entries"], report["problems"]) == (True, 3, [])


def test_verify_of_a_damaged_database_says_what_is_wrong(database: Path) -> None:
    with RocksDbSnapshot.open(database, cache_bytes=CACHE)[1] as snap:
        snap.compact()
    table = max(database.glob("*.sst"), key=lambda file: file.stat().st_size)
    raw = bytearray(table.read_bytes())
    raw[10] ^= 1
    table.write_bytes(raw)
    for arguments in (("verify", database), ("verify", database, "--json")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert table.name in result.stdout or table.name in result.stderr


@pytest.mark.usefixtures("open_elsewhere")
def test_a_database_that_is_open_elsewhere_can_be_read_and_not_written(
    database: Path, tmp_path: Path
) -> None:
    assert run("get", database, "c").stdout == "late"
    assert told("info", database)["sequence"] == 2
    assert run("verify", database).exit_code == 0
    assert run("convert", database, tmp_path / "log", "--to", "foldlog").exit_code == 0
    assert run("export", database, tmp_path / "art", "--format", "foldlog").exit_code == 0
    for arguments in (
        ("export", database, tmp_path / "checkpoint"),
        ("put", database, "k", "v"),
        ("delete", database, "a"),
        ("compact", database),
        ("apply", database),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert "lock" in result.stderr or "open" in result.stderr
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("format_name", ["foldlog", "slipstream-v2"])
def test_convert_goes_from_a_database_to_a_log_and_back(
    database: Path, tmp_path: Path, format_name: str
) -> None:
    log, back = tmp_path / "log", tmp_path / "back.db"
    database.chmod(0o750)
    converted = told("convert", database, log, "--to", format_name)
    expected = {"from": "rocksdb", "to": format_name, "entries": 3, "cursor": 7}
    assert converted | expected == converted
    assert stat.S_IMODE(log.stat().st_mode) & 0o027 == 0, "nobody else may read it"
    assert state_of(log) == (ENTRIES, CURSOR)
    log.chmod(0o600)
    assert run("convert", log, back, "--to", "rocksdb").exit_code == 0
    assert stat.S_IMODE(back.stat().st_mode) == 0o700
    assert state_of(back) == (ENTRIES, CURSOR)


def test_convert_counts_the_entries_of_a_log_and_tells_of_its_torn_tail(tmp_path: Path) -> None:
    """The entries of a log with changes after its base were counted when it was closed already:
    "Bad file descriptor", and the database was there. A torn tail was left out without a word."""
    log = tmp_path / "log"
    with AppendLogSnapshot.open(log, compact_threshold=1 << 40)[1] as snap:
        snap.apply([Put(f"k{number:04}", b"1") for number in range(1000)], CURSOR)
        snap.compact()
        snap.apply([Put("k0500", b"2"), Put("new", b"2")], WatchCursor.from_u64(8))
        size = log.stat().st_size
        snap.apply([Put("torn", b"3")], WatchCursor.from_u64(9))
    os.truncate(log, size + 50)
    log.with_name("log.foldlog-note").unlink()
    result = run("convert", log, tmp_path / "back.db", "--to", "rocksdb", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["entries"] == 1001
    assert result.stderr == "left out a torn tail of 50 bytes\n"


def test_a_conversion_to_what_exists_or_to_itself_is_refused(
    database: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    assert run("convert", database, tmp_path / "taken", "--to", "foldlog").exit_code == 2
    again = run("convert", database, tmp_path / "other", "--to", "rocksdb")
    assert again.exit_code == 1
    assert "to a log only" in again.stderr
    assert not (tmp_path / "other").exists()


def test_an_export_is_imported_as_a_database_again(database: Path, tmp_path: Path) -> None:
    artifact, copy = tmp_path / "artifact", tmp_path / "copy.db"
    exported = told("export", database, artifact)
    assert exported["cursor"] == 7
    refused = run("import", artifact, copy, "--format", "foldlog")
    assert refused.exit_code == 2
    assert "only one format" in refused.stderr
    assert run("import", artifact, copy).exit_code == 0
    assert state_of(copy) == (ENTRIES, CURSOR)


def test_an_export_in_the_format_of_a_log_is_imported_as_a_log(
    database: Path, tmp_path: Path
) -> None:
    artifact, log = tmp_path / "artifact", tmp_path / "log"
    assert run("export", database, artifact, "--format", "slipstream-v2").exit_code == 0
    assert run("import", artifact, log).exit_code == 0
    assert state_of(log) == (ENTRIES, CURSOR)


def test_put_delete_apply_and_compact_write_a_database(database: Path) -> None:
    assert run("put", database, "k", "v").stdout == "put k at version 2\n"
    assert run("delete", database, "a").stdout == "deleted a at version 3\n"
    line = b'{"op": "put", "key": "z", "value": "9", "cursor": 9}\n'
    assert "applied 1 change" in run("apply", database, stdin=line).stdout
    assert "skipped 1" in run("apply", database, stdin=line).stdout
    assert run("compact", database).exit_code == 0
    entries, cursor = state_of(database)
    assert [entry.key for entry in entries] == ["b/x", "b/é", "k", "z"]
    assert cursor == WatchCursor.from_u64(9)
    assert run("put", database, "k", "v", "--format", "foldlog").exit_code == 2


def arguments(command: str, out: Path) -> tuple[str | Path, ...]:
    """What a command takes beside the log or database."""
    more: dict[str, tuple[str | Path, ...]] = {
        "get": ("a",),
        "export": (out,),
        "convert": (out, "--to", "foldlog"),
        "put": ("a", "1"),
    }
    return more.get(command, ())


ALL_COMMANDS = pytest.mark.parametrize(
    "command", ["get", "range", "info", "verify", "export", "convert", "put", "compact", "apply"]
)


@ALL_COMMANDS
def test_a_directory_that_is_no_database_is_refused_and_left_as_it_is(
    tmp_path: Path, command: str
) -> None:
    more = arguments(command, tmp_path / "out")
    for name in ("empty", "other"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if name == "other":
            (folder / "notes.txt").write_text("mine")
        before = files_in(folder)
        result = run(command, folder, *more)
        assert result.exit_code == 2
        assert "is a directory, but not a RocksDB database" in result.stderr
        assert files_in(folder) == before
        assert not (tmp_path / "out").exists()


def files_but_logs(database: Path) -> dict[str, bytes]:
    """Without those in which RocksDB notes what it does."""
    found = contents_of(database)
    return {name: found[name] for name in found if not Path(name).name.startswith("LOG")}


def of_a_newer_rocksdb(database: Path) -> str:
    file = max(database.glob("OPTIONS-*"))
    file.write_text(re.sub("rocksdb_version=.*", "rocksdb_version=99.0.0", file.read_text()))
    return "was written by RocksDB 99.0"


def damaged(database: Path) -> str:
    file = max(database.glob("MANIFEST-*"))
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    return "Corruption: "


@ALL_COMMANDS
@pytest.mark.parametrize("spoil", [of_a_newer_rocksdb, damaged])
def test_a_database_that_cannot_be_opened_is_refused_by_every_command(
    database: Path, tmp_path: Path, spoil: Callable[[Path], str], command: str
) -> None:
    more = arguments(command, tmp_path / "out")
    words = spoil(database)
    before = files_but_logs(database)
    result = run(command, database, *more)
    assert result.exit_code in (1, 2)
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert files_but_logs(database) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["dump", "salvage", "tail", "top"])
def test_commands_for_logs_only_say_so(database: Path, tmp_path: Path, command: str) -> None:
    more = ("--output", tmp_path / "out") if command == "salvage" else ()
    result = run(command, database, *more)
    assert result.exit_code == 1
    assert "is a RocksDB database, not a log" in result.stderr
    result = run(command, tmp_path, *more)
    assert result.exit_code == 2
    assert "is a directory, not a log" in result.stderr


@pytest.mark.parametrize("command", ["get", "info", "verify", "put", "convert"])
def test_without_the_extra_the_message_says_what_to_install(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    result = run(command, database, *arguments(command, tmp_path / "out"))
    assert result.exit_code == 1
    assert "pip install 'foldlog[rocksdb]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == [database.name]
