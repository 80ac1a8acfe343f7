"""What is no RocksDB store of foldlog, or a damaged one: typed errors, and nothing of it is
changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rocksdict
from crc32c import crc32c

from foldlog import (
    AppendLogSnapshot,
    CorruptLogError,
    Delete,
    FoldlogError,
    InvalidFormatError,
    Put,
    RocksDbSnapshot,
    StoreLocked,
    VersionToken,
    WatchCursor,
)
from foldlog.protocol.store import FormatName
from foldlog.storage.engines.rocksdb.database import opening
from foldlog.storage.engines.rocksdb.database.errors import typed
from foldlog.storage.engines.rocksdb.database.record import (
    STATE_KEY,
    NewerGeneration,
    State,
    decode_entry,
    encode_entry,
    parse_state,
)
from foldlog.storage.engines.rocksdb.exchange.verify import describe, verify_database, verify_open

CACHE = 8 * 1024 * 1024
TIMEOUT_S = 120


def opened(path: Path, **options: Any) -> RocksDbSnapshot:
    return RocksDbSnapshot.open(path, cache_bytes=CACHE, **options)[1]


def filled(path: Path) -> None:
    """A store of which some is in a table, and closed."""
    with opened(path) as snap:
        snap.apply([Put(f"k{n:04}", b"v" * 40) for n in range(2000)], WatchCursor.from_u64(1))


DIES = """
import os, sys
from foldlog import Put, RocksDbSnapshot, WatchCursor
_, snap = RocksDbSnapshot.open(sys.argv[1], cache_bytes=2**23)
for number in range(1, 51):
    snap.apply([Put(f"k{number}", b"v" * 100)], WatchCursor.from_u64(number))
os._exit(0)
"""


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose process died, not to be changed."""
    path = tmp_path_factory.mktemp("died") / "store"
    subprocess.run([sys.executable, "-c", DIES, str(path)], check=True, timeout=TIMEOUT_S)
    return path


@pytest.fixture
def unflushed_log(died: Path, path: Path) -> Path:
    """The write-ahead log of a store at `path` whose process died: it holds all its 50 batches."""
    shutil.copytree(died, path)
    return max(path.glob("*.log"), key=lambda file: file.stat().st_size)


def raw_database(path: Path, raw_mode: bool = True) -> rocksdict.Rdict:
    """The database as another program opens it."""
    return rocksdict.Rdict(os.fspath(path), rocksdict.Options(raw_mode=raw_mode))


def content(root: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def flip(file: Path, offset: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1
    file.write_bytes(raw)


def table(path: Path) -> Path:
    return next(path.glob("*.sst"))


# What is no store.


def test_a_directory_of_something_else_is_refused_and_left_as_it_is(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidFormatError, match="not a RocksDB database"):
        opened(path)
    with pytest.raises(InvalidFormatError, match="not a RocksDB database"):
        describe(path)
    assert content(path) == {"notes.txt": b"mine"}


def test_an_empty_directory_becomes_a_store(path: Path) -> None:
    path.mkdir(mode=0o700)
    opened(path).close()
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("format", ["foldlog", "slipstream-v2"])
def test_a_log_is_refused_where_a_directory_is_expected(path: Path, format: FormatName) -> None:
    AppendLogSnapshot.open(path, format=format)[1].close()
    before = path.read_bytes()
    for use in (opened, describe, verify_database):
        with pytest.raises(InvalidFormatError, match="is a log, which the append-log engine opens"):
            use(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"text"])
def test_any_other_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InvalidFormatError, match="is not a directory"):
        opened(path)
    assert path.read_bytes() == content


def test_a_pipe_is_refused_without_waiting_for_it(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(InvalidFormatError, match="is not a directory"):
        opened(path)


def test_a_store_is_refused_where_a_log_is_expected(path: Path) -> None:
    """It was an OSError that said "not a regular file"."""
    filled(path)
    before = content(path)
    with pytest.raises(InvalidFormatError, match="open it with backend='rocksdb'"):
        AppendLogSnapshot.open(path)
    assert content(path) == before


def test_a_missing_parent_is_not_made(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        opened(path / "deeper" / "still")
    assert not path.exists()


def test_reading_what_is_not_there_makes_nothing(path: Path) -> None:
    for use in (describe, verify_database):
        with pytest.raises(FileNotFoundError):
            use(path)
    assert not path.exists()


@pytest.mark.parametrize("raw_mode", [True, False])
def test_a_database_of_another_program_is_refused(path: Path, raw_mode: bool) -> None:
    db = raw_database(path, raw_mode)
    db[b"theirs"] = b"value"
    db.close()
    for use in (opened, describe):
        with pytest.raises(InvalidFormatError):
            use(path)
    db = raw_database(path, raw_mode)
    assert dict(db.items()) == {b"theirs": b"value"}
    db.close()


@pytest.mark.parametrize("left", [["LOCK"], ["LOCK", "LOG", "IDENTITY", "MANIFEST-000001"]])
def test_what_a_creation_that_was_killed_left_is_no_obstacle(path: Path, left: list[str]) -> None:
    path.mkdir()
    for name in left:
        (path / name).write_bytes(b"")
    with opened(path) as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))


def test_a_database_without_entries_that_a_killed_creation_left_becomes_a_store(path: Path) -> None:
    raw_database(path).close()
    with opened(path) as snap:
        assert (len(snap), snap.cursor()) == (0, WatchCursor.none())


# What is newer.


def written_by(path: Path, version: str) -> None:
    """Let the files say that another RocksDB wrote them."""
    for file in path.glob("OPTIONS-*"):
        text = file.read_text()
        file.write_text(re.sub(r"rocksdb_version=[\d.]+", f"rocksdb_version={version}", text))


def test_a_database_of_a_newer_rocksdb_is_refused(path: Path) -> None:
    filled(path)
    written_by(path, "99.1.2")
    before = content(path)
    for use in (opened, describe, verify_database):
        with pytest.raises(InvalidFormatError, match=r"written by RocksDB 99\.1, this rocksdict"):
            use(path)
    assert content(path) == before


def test_a_database_of_an_older_rocksdb_or_a_newer_patch_of_ours_is_opened(path: Path) -> None:
    filled(path)
    own = opening.own_version()
    assert own is not None
    for version in ("6.1.1", f"{own[0]}.{own[1]}.99"):
        written_by(path, version)
        opened(path).close()


def test_a_table_of_a_newer_format_is_refused_with_the_words_of_rocksdb(path: Path) -> None:
    filled(path)
    file = table(path)
    raw = bytearray(file.read_bytes())
    raw[-12:-8] = (99).to_bytes(4, "little")  # format_version, in the footer
    file.write_bytes(raw)
    with pytest.raises(InvalidFormatError, match="format_version: 99") as caught:
        opened(path)
    assert caught.value.path == file


def test_a_store_of_a_newer_generation_is_refused(path: Path) -> None:
    filled(path)
    db = raw_database(path)
    raw = bytearray(db[STATE_KEY])
    raw[0] = 2
    db[STATE_KEY] = bytes(raw[:-4]) + crc32c(bytes(raw[:-4])).to_bytes(4, "little")
    db.close()
    with pytest.raises(InvalidFormatError, match="generation 2, this foldlog reads 1"):
        opened(path)


# What is open elsewhere, and what is not installed.

HOLDS = """
import sys
from foldlog import RocksDbSnapshot
_, snap = RocksDbSnapshot.open(sys.argv[1], cache_bytes=2**23)
print("open", flush=True)
sys.stdin.read()
"""


def test_a_store_that_another_process_has_open_is_locked(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            with pytest.raises(StoreLocked) as caught:
                opened(path)
            assert caught.value.pid == (process.pid if sys.platform == "linux" else None)
            assert describe(path).seq == 0  # reading needs no lock
        finally:
            process.kill()
    opened(path).close()


WITHOUT = """
import sys
sys.modules["rocksdict"] = None
import foldlog
try:
    foldlog.RocksDbSnapshot.open(sys.argv[1])
except ImportError as error:
    print(error.name, error)
"""


def test_without_the_extra_opening_says_what_to_install(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.startswith("rocksdict ")
    assert "pip install 'foldlog[rocksdb]'" in done.stdout
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sync": "sometimes"}, ValueError),
        ({"on_damage": "ignore"}, ValueError),
        ({"cache_bytes": 1}, ValueError),
        ({"cache_bytes": "1"}, TypeError),
        ({"cache_bytes": True}, TypeError),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_made(
    path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        RocksDbSnapshot.open(path, **options)
    assert not path.exists()


# Damage.


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


@pytest.mark.parametrize(
    ("which", "damage", "words"),
    [
        ("*.sst", lambda file: flip(file, file.stat().st_size - 5), "magic number"),
        ("*.sst", cut, "Sst file size mismatch"),
        ("*.sst", Path.unlink, "No such file"),
        ("MANIFEST-*", lambda file: flip(file, 20), "checksum mismatch"),
        ("MANIFEST-*", Path.unlink, "No such file"),
        ("CURRENT", lambda file: file.write_bytes(b"garbage"), "CURRENT"),
        ("CURRENT", Path.unlink, "missing"),
    ],
)
def test_a_damaged_file_is_refused_with_the_words_of_rocksdb(
    path: Path, which: str, damage: Callable[[Path], object], words: str
) -> None:
    filled(path)
    damage(next(path.glob(which)))
    with pytest.raises(CorruptLogError, match=words) as caught:
        opened(path)
    assert caught.value.path.is_relative_to(path)
    with pytest.raises(CorruptLogError, match=words):
        verify_database(path)


def test_a_damaged_block_is_found_by_whoever_reads_it_and_by_verify(path: Path) -> None:
    filled(path)
    flip(table(path), 100)
    with opened(path) as snap:
        for read in (lambda: snap.get("k0001"), lambda: snap.range("k0"), lambda: len(snap)):
            with pytest.raises(CorruptLogError, match="block checksum mismatch") as caught:
                read()
            assert caught.value.path == table(path)
        report = snap.verify()
    assert not report.ok
    assert "block checksum mismatch" in report.problems[0]
    assert verify_database(path).problems == report.problems


@pytest.mark.parametrize("offset", [4, 10, 2000, -20])
def test_a_flipped_bit_in_the_write_ahead_log_is_refused_and_loses_nothing_silently(
    path: Path, unflushed_log: Path, offset: int
) -> None:
    """By default, RocksDB drops all that follows the damage, and says nothing: a flip in the
    first record lost every batch since the last flush.
    """
    log = unflushed_log
    flip(log, offset)
    damaged = log.read_bytes()
    with pytest.raises(CorruptLogError, match="Corruption"):
        opened(path)
    assert log.read_bytes() == damaged
    with opened(path, on_damage="cut") as snap:
        number = snap.cursor().as_u64() or 0
        assert {entry.key for entry in snap.range("")} == {f"k{n}" for n in range(1, number + 1)}
        assert number < 50
        assert snap.verify().ok


def test_a_torn_tail_of_the_write_ahead_log_is_dropped(path: Path, unflushed_log: Path) -> None:
    log = unflushed_log
    os.truncate(log, log.stat().st_size - 30)
    with opened(path) as snap:
        assert (len(snap), snap.cursor()) == (49, WatchCursor.from_u64(49))


def test_a_damaged_record_of_the_state_is_refused(path: Path) -> None:
    filled(path)
    db = raw_database(path)
    db[STATE_KEY] = b"short"
    db.close()
    with pytest.raises(CorruptLogError, match="state record has 5 bytes"):
        opened(path)


def test_an_entry_that_does_not_decode_is_refused_when_it_is_read(path: Path) -> None:
    filled(path)
    db = raw_database(path)
    db[b"k0001"] = b""
    db[b"k0002"] = b"\x0bversion"
    db[b"\xc3\x28"] = b"\0not UTF-8"
    db[b"\xffother"] = b"\0not ours"
    db.close()
    with opened(path) as snap:
        for key in ("k0001", "k0002"):
            with pytest.raises(CorruptLogError, match=key):
                snap.get(key)
        with pytest.raises(CorruptLogError):
            snap.range("k")
        with pytest.raises(CorruptLogError, match="not UTF-8"):
            snap.range(start="l")
        assert len(snap.verify().problems) == 4


@pytest.mark.parametrize("where", ["items", "get"])
def test_a_read_that_fails_is_no_problem_of_the_store_but_an_error_of_the_disk(
    path: Path, where: str
) -> None:
    """`verify` called a store damaged because a disk, or the limit on descriptors, refused it."""

    class Failing:
        def live_files(self) -> list[Any]:
            return []

        def fail(self, *_arguments: Any) -> Any:
            words = f"IO error: While open a file for random read: {path}/000008.sst: "
            raise Exception(words + "Too many open files")

        def items(self, *_arguments: Any) -> Any:
            return self.fail() if where == "items" else iter(())

        def iter(self, *_arguments: Any) -> Any:
            return Nothing()

        get = fail

    class Nothing:
        def seek(self, _key: bytes) -> None: ...

        def valid(self) -> bool:
            return False

        status = valid

    with pytest.raises(OSError, match="Too many open files") as raised:
        verify_open(Failing(), path)
    assert raised.value.errno == errno.EMFILE


def test_a_sequence_at_its_end_takes_no_more_batches(path: Path) -> None:
    """A record of the state with a right checksum: the next batch killed the writer with an error
    of `struct`."""
    filled(path)
    db = raw_database(path)
    state = parse_state(db[STATE_KEY])
    db[STATE_KEY] = state._replace(seq=2**64 - 2).pack()
    db.close()
    with opened(path) as snap:
        snap.apply([Put("last", b"1")], 2)
        for _ in range(2):
            with pytest.raises(FoldlogError, match="exhausted"):
                snap.apply([Put("more", b"1")], 3)
        assert snap.get("last") is not None
        assert snap.get("more") is None


def test_a_version_of_any_length_in_the_options_is_read_or_ignored() -> None:
    """5,000 digits were a ValueError: Python does not convert so many."""
    assert opening.version_in(f"  rocksdb_version={'9' * 5000}.1") is None
    assert opening.version_in("  rocksdb_version=10.1") == (10, 1)


def test_a_directory_that_cannot_be_looked_at_just_now_is_not_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed `stat` made a store FAILED for good: "is gone"."""

    def failing(_path: Any, **_options: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with opened(path) as snap:
        with monkeypatch.context() as patch:
            patch.setattr("foldlog.storage.engines.rocksdb.commits._identity", failing)
            with pytest.raises(OSError, match="Input/output") as raised:
                snap.apply([Put("a", b"1")], 1)
            assert raised.value.errno == errno.EIO
        snap.apply([Put("a", b"1")], 1)


# The bytes of a record.


@pytest.mark.parametrize("version", [b"", b"\0", b"0123456789"])
@pytest.mark.parametrize("value", [b"", b"\0", b"value"])
def test_an_entry_decodes_to_what_was_encoded(value: bytes, version: bytes) -> None:
    assert decode_entry(encode_entry(value, version)) == (value, version)


@pytest.mark.parametrize("raw", [b"", b"\x01", b"\x0a012345678", b"\x0b0123456789a"])
def test_an_entry_of_another_form_does_not_decode(raw: bytes) -> None:
    with pytest.raises(ValueError, match="entry"):
        decode_entry(raw)


def test_no_byte_of_a_state_record_can_change_or_be_missing_unnoticed() -> None:
    state = State(bytes(range(16)), 2**40, WatchCursor(b"versionst!"), b"nats:kv/routes")
    raw = state.pack()
    assert parse_state(raw) == state
    assert parse_state(State(bytes(16), 0, WatchCursor.none()).pack()).cursor.is_none
    for offset in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[offset] ^= 1 << bit
            with pytest.raises(ValueError, match="state record") as caught:
                parse_state(bytes(changed))
            assert not isinstance(caught.value, NewerGeneration)
        with pytest.raises(ValueError, match="state record"):
            parse_state(raw[:offset])


def test_a_removed_key_leaves_no_version_behind(path: Path) -> None:
    with opened(path) as snap:
        snap.apply([Put("a", b"1", VersionToken(b"1")), Delete("a")], WatchCursor.from_u64(1))
        assert (snap.get("a"), snap.range("")) == (None, [])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_an_error_of_the_system_within_another_of_rocksdb_is_no_damage(number: int) -> None:
    """A file in the database that only root could read was reported as damage to the database."""
    words = (
        "Invalid argument: Found options incompatible with filesystem: IO error: While open a file"
        f" for random read: /data/routes.db/CURRENT: {os.strerror(number)}"
    )
    error = typed(Exception(words), Path("/data/routes.db"), opening=True)
    assert isinstance(error, OSError)
    assert error.errno == number


@contextlib.contextmanager
def private() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def test_the_files_of_a_store_are_as_private_as_the_umask_asks(path: Path) -> None:
    artifact, copy = path.with_name("artifact"), path.with_name("copy.db")
    with private():
        filled(path)
        with opened(path) as snap:
            snap.export_to(artifact)
        RocksDbSnapshot.import_artifact(artifact, copy)[1].close()
    files = [file for root in (path, artifact, copy) for file in (root, *root.rglob("*"))]
    assert len(files) > 20
    assert [file for file in files if file.stat().st_mode & 0o077] == []


def test_an_artifact_of_a_private_store_is_private_under_a_wider_umask(path: Path) -> None:
    with private():
        filled(path)
    artifact, copy = path.with_name("artifact"), path.with_name("copy.db")
    with opened(path) as snap:
        snap.export_to(artifact)
    assert artifact.stat().st_mode & 0o077 == 0
    RocksDbSnapshot.import_artifact(artifact, copy)[1].close()
    assert copy.stat().st_mode & 0o077 == 0
    (artifact / "data").chmod(0o755)  # as RocksDB makes it: the directory above is what protects it
    RocksDbSnapshot.import_artifact(artifact, path.with_name("other.db"))[1].close()
    assert path.with_name("other.db").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.getuid() != 0, reason="changes owners")
def test_an_artifact_admits_the_group_of_its_store_and_no_other(path: Path) -> None:
    """A store of 0750 and another group than the exporter's had an artifact of 0750 and the
    exporter's group."""
    filled(path)
    os.chown(path, 1234, 2345)
    path.chmod(0o750)
    artifact, copy = path.with_name("artifact"), path.with_name("copy.db")
    with opened(path) as snap:
        snap.export_to(artifact)
    RocksDbSnapshot.import_artifact(artifact, copy)[1].close()
    for directory in (artifact, artifact / "data", copy):
        info = directory.stat()
        assert (info.st_gid, stat.S_IMODE(info.st_mode)) == (2345, 0o750), directory
    assert stat.S_IMODE((artifact / "MANIFEST.json").stat().st_mode) == 0o640
