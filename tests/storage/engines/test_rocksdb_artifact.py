"""Artifacts of RocksDB stores, and conversion between the engines."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from faultkit import quick_folder

from foldlog import (
    AppendLogSnapshot,
    ArtifactInvalidError,
    Delete,
    Put,
    RocksDbSnapshot,
    VersionToken,
    WatchCursor,
)
from foldlog.protocol.store import FormatName
from foldlog.storage.artifacts.artifact import read_manifest
from foldlog.storage.engines.rocksdb.exchange.convert import log_from_rocksdb, rocksdb_from_log
from foldlog.storage.engines.rocksdb.exchange.verify import describe, verify_database
from foldlog.storage.log.files import Files

CACHE = 8 * 1024 * 1024
CURSOR = WatchCursor(b"versionst!")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as quick:
        yield quick


def filled(path: Path) -> RocksDbSnapshot:
    snap = RocksDbSnapshot.open(path, cache_bytes=CACHE)[1]
    versions = [VersionToken(bytes(range(n))) for n in range(11)]
    snap.apply(
        [Put(f"k{n:04}é", b"%d" % n, versions[n % 11]) for n in range(2500)], WatchCursor.none()
    )
    snap.apply([Delete(f"k{n:04}é") for n in range(0, 2500, 7)], CURSOR)
    return snap


@pytest.fixture
def artifact(folder: Path) -> Path:
    with filled(folder / "state.db") as snap:
        snap.export_to(folder / "artifact")
    return folder / "artifact"


def refused(artifact: Path, words: str | None = None) -> None:
    """It is not imported, and nothing is left of the attempt."""
    before = sorted(os.listdir(artifact.parent))
    with pytest.raises(ArtifactInvalidError, match=words):
        RocksDbSnapshot.import_artifact(artifact, artifact.with_name("copy.db"))
    assert sorted(os.listdir(artifact.parent)) == before


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def rewrite_manifest(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((artifact / "MANIFEST.json").read_bytes())
    change(fields)
    (artifact / "MANIFEST.json").write_text(json.dumps(fields))


def test_an_artifact_declares_all_its_files_and_the_cursor(folder: Path) -> None:
    with filled(folder / "state.db") as snap:
        manifest = snap.export_to(folder / "artifact")
    assert manifest == read_manifest(folder / "artifact")
    assert (manifest.backend, manifest.cursor) == ("foldlog-rocksdb", CURSOR)
    names = {f"data/{file.name}" for file in (folder / "artifact" / "data").iterdir()}
    assert names == {file.path for file in manifest.files}
    for file in manifest.files:
        raw = (folder / "artifact" / file.path).read_bytes()
        assert (len(raw), blake3(raw).hexdigest()) == (file.size, file.blake3)


def test_the_tables_of_an_artifact_are_links(artifact: Path) -> None:
    tables = list((artifact / "data").glob("*.sst"))
    assert tables
    assert all(table.stat().st_nlink == 2 for table in tables)


def test_an_export_is_exact_though_nothing_was_flushed_and_the_store_goes_on(folder: Path) -> None:
    with filled(folder / "state.db") as snap:
        before = snap.range("")
        snap.export_to(folder / "artifact")
        snap.apply([Put("later", b"1")], WatchCursor.from_u64(9))
        snap.compact()
        cursor, copy = RocksDbSnapshot.import_artifact(folder / "artifact", folder / "copy.db")
        assert (cursor, copy.range(""), copy.snapshot().seq) == (CURSOR, before, 2)
        assert copy.verify().ok
        copy.close()
        assert snap.verify().ok
    assert sorted(os.listdir(folder)) == ["artifact", "copy.db", "state.db"]


def grow(file: Path) -> None:
    with open(file, "ab") as out:
        out.write(b"x")


def flip_a_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.unlink()  # it is a link to the store's own
    file.write_bytes(raw)


@pytest.mark.parametrize("which", ["*.sst", "MANIFEST-*", "CURRENT", "OPTIONS-*"])
@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, grow])
def test_a_damaged_artifact_never_becomes_a_store(
    artifact: Path, which: str, damage: Callable[[Path], object]
) -> None:
    damage(next((artifact / "data").glob(which)))
    refused(artifact)


def other_cursor(fields: dict[str, Any]) -> None:
    fields["cursor_hex"] = "00"


def no_tables(fields: dict[str, Any]) -> None:
    fields["files"] = [file for file in fields["files"] if not file["path"].endswith(".sst")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_cursor, "the payload is at"),
        (no_tables, "not declared"),
        (lambda fields: fields.update(backend="append-log"), "backend"),
        (lambda fields: fields.update(backend_version="2"), "backend_version"),
        (lambda fields: fields.update(more=1), "more"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    artifact: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    rewrite_manifest(artifact, change)
    refused(artifact, words)


@pytest.mark.parametrize("extra", ["data/extra", "extra"])
def test_an_undeclared_file_is_refused(artifact: Path, extra: str) -> None:
    (artifact / extra).write_bytes(b"")
    refused(artifact, "not declared")


def test_a_link_in_an_artifact_is_not_followed(artifact: Path) -> None:
    table = next((artifact / "data").glob("*.sst"))
    table.rename(artifact.with_name("elsewhere"))
    table.symlink_to(artifact.with_name("elsewhere"))
    refused(artifact, "cannot be opened")


def test_an_artifact_that_cannot_be_read_just_now_is_not_called_invalid(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process without free descriptors was told to fetch the artifact again."""
    real = Files.open_at

    def failing(files: Files, name: str, dir_fd: int) -> int:
        if name.endswith(".sst"):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(files, name, dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "open_at", failing)
        with pytest.raises(OSError, match="Too many") as raised:
            RocksDbSnapshot.import_artifact(artifact, artifact.with_name("copy.db"))
    assert raised.value.errno == errno.EMFILE
    assert not artifact.with_name("copy.db").exists()


def test_a_consistent_artifact_whose_entries_do_not_verify_is_refused(artifact: Path) -> None:
    """The digests are right: they are of a table that was damaged before."""
    table = next((artifact / "data").glob("*.sst"))
    raw = bytearray(table.read_bytes())
    raw[100] ^= 1
    table.unlink()
    table.write_bytes(raw)

    def declare(fields: dict[str, Any]) -> None:
        for file in fields["files"]:
            if file["path"].endswith(table.name):
                file["blake3"] = blake3(bytes(raw)).hexdigest()

    rewrite_manifest(artifact, declare)
    refused(artifact, "block checksum mismatch")


def test_each_engine_refuses_the_artifact_of_the_other(folder: Path, artifact: Path) -> None:
    with AppendLogSnapshot.open(folder / "state.log")[1] as log:
        log.export_to(folder / "log")
    with pytest.raises(ArtifactInvalidError, match="backend"):
        AppendLogSnapshot.import_artifact(artifact, folder / "copy.log")
    refused(folder / "log", "backend")


@pytest.mark.parametrize("format", ["foldlog", "slipstream-v2"])
def test_a_store_converts_to_a_log_and_back(folder: Path, format: FormatName) -> None:
    with filled(folder / "state.db") as snap:
        expected, seq = snap.range(""), snap.snapshot().seq
        assert log_from_rocksdb(folder / "state.db", folder / "state.log", format) == len(expected)
    with AppendLogSnapshot.open(folder / "state.log", format=format)[1] as log:
        assert (log.range(""), log.cursor()) == (expected, CURSOR)
        assert log.verify().ok
        if format == "foldlog":
            assert log.snapshot().seq == seq
    assert rocksdb_from_log(folder / "state.log", folder / "back.db")[0] == len(expected)
    with RocksDbSnapshot.open(folder / "back.db")[1] as back:
        assert (back.range(""), back.cursor()) == (expected, CURSOR)
        assert back.verify().ok
        assert back.apply([Put("more", b"1")], WatchCursor.from_u64(1)) > 0
        if format == "foldlog":
            assert back.snapshot().seq == seq + 1


@pytest.mark.parametrize("convert", [log_from_rocksdb, rocksdb_from_log])
def test_a_conversion_never_overwrites(folder: Path, convert: Callable[..., object]) -> None:
    filled(folder / "state.db").close()
    AppendLogSnapshot.open(folder / "state.log")[1].close()
    source = folder / ("state.db" if convert is log_from_rocksdb else "state.log")
    (folder / "taken").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        convert(source, folder / "taken")
    assert (folder / "taken").read_bytes() == b"mine"


def test_a_store_is_described_and_verified_while_it_is_open_elsewhere(folder: Path) -> None:
    with filled(folder / "state.db"):
        before = content(folder / "state.db")
        facts, report = describe(folder / "state.db"), verify_database(folder / "state.db")
        assert content(folder / "state.db") == before
    assert (facts.seq, facts.cursor) == (2, CURSOR)
    assert len(facts.store_id) == 16
    assert (report.ok, report.entries, report.seq) == (True, 2142, 2)


def test_verifying_tells_how_far_it_is(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    with RocksDbSnapshot.open(folder / "state.db", cache_bytes=CACHE)[1] as snap:
        snap.apply([Put(f"k{n}", b"v") for n in range(9000)], WatchCursor.none())
        snap.verify(lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == [4096, 8192]
    assert all(done <= total for done, total in told)
