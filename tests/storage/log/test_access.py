"""Owner, group, mode and access list: a file that replaces the log has the log's; one that is made
from it is no wider.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_kit import run
from logfiles import companions, tear

import foldlog
from foldlog import AppendLogSnapshot, LogAccessError, Put, WatchCursor
from foldlog.storage.log.access import side_mode
from foldlog.storage.log.files import ACL, Access, Files
from foldlog.storage.log.sidecars.lock import note_path
from foldlog.storage.repair.salvage import salvage_log
from foldlog.testing import Fault, FaultyFiles

MODES = [0o600, 0o640, 0o644, 0o660, 0o664, 0o666]
UMASKS = [0o022, 0o077, 0o002, 0o000]
as_root = pytest.mark.skipif(os.getuid() != 0, reason="changes owners")
USER, GROUP = 1234, 2345


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def apply(snap: AppendLogSnapshot, number: int) -> None:
    snap.apply([Put(f"k{number}", b"secret")], WatchCursor.from_u64(number))


def a_log(path: Path) -> None:
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 1)


def access_of(path: Path) -> Access:
    fd = os.open(path, os.O_RDONLY)
    try:
        return Files().access(fd)
    finally:
        os.close(fd)


# What replaces the log.


def compacted(path: Path) -> None:
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 2)
        snap.compact()


def healed_after_a_failed_fsync(path: Path) -> None:
    files = FaultyFiles(Fault("sync", lasting=True))
    _, snap = AppendLogSnapshot.open(path)
    with snap:
        apply(snap, 2)
        snap._engine.log.files = files
        with pytest.raises(foldlog.LogPoisonedError):
            snap.sync()
        files.disarm()
        snap.compact()


def written_anew_after_a_deletion(path: Path) -> None:
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 2)
        path.unlink()
        snap._engine.log.poison_with("was deleted")
        snap.compact()


REPLACEMENTS = [compacted, healed_after_a_failed_fsync, written_anew_after_a_deletion]
replacements = pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda case: case.__name__)


@replacements
@pytest.mark.parametrize("mode", [*MODES, 0o4711, 0o2660])
@pytest.mark.parametrize("mask", UMASKS[:2])
def test_a_replaced_log_keeps_its_mode_whatever_the_umask(path, umask, replace, mode, mask):
    """A 0600 log of secrets was 0644 after a compaction."""
    a_log(path)
    path.chmod(mode)
    umask(mask)
    with open(path, "rb") as held:  # so that its inode is not used again
        replace(path)
        assert not os.path.samestat(path.stat(), os.fstat(held.fileno()))
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_mode_that_changes_while_a_compaction_runs_is_kept(path):
    a_log(path)
    path.chmod(0o666)
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 2)
        snap.compact(lambda done, total: path.chmod(0o600))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@as_root
@replacements
@pytest.mark.parametrize("setgid", [False, True])
def test_a_replaced_log_keeps_its_owner_and_group(path, replace, setgid):
    """The followers of a group were locked out by a compaction."""
    a_log(path)
    if setgid:
        os.chown(path.parent, 0, 3456)
        path.parent.chmod(0o2775)
    os.chown(path, USER, GROUP)
    path.chmod(0o640)
    replace(path)
    assert access_of(path)[:3] == (USER, GROUP, 0o640)
    for side in path.parent.iterdir():
        assert (side.stat().st_uid, side.stat().st_gid) == (USER, GROUP)


@replacements
def test_a_replaced_log_keeps_its_access_list_and_the_users_attributes(path, replace):
    a_log(path)
    try:
        os.setxattr(path, "user.note", b"ours")
    except (OSError, AttributeError):
        pytest.skip("no extended attributes here")
    entries = [(1, 6, -1), (2, 4, 1000), (4, 4, -1), (16, 4, -1), (32, 0, -1)]
    acl = b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + (who % 2**32).to_bytes(4, "little")
        for tag, perm, who in entries
    )
    try:
        os.setxattr(path, ACL, acl)
    except OSError:
        acl = b""
    before = access_of(path)
    replace(path)
    assert access_of(path) == before
    assert (before.acl is not None) == bool(acl)


@as_root
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_torn_copy_belongs_to_whom_the_log_belongs(path, tmp_path, mode):
    a_log(path)
    os.chown(path, USER, GROUP)
    path.chmod(mode)
    assert access_of(a_torn_copy(path, tmp_path)[0]) == access_of(path)


class NotPermitted(Files):
    writes = 0

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self.writes += 1
        return super().write(fd, data, offset)

    def set_access(self, fd: int, access: Access) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")


def test_where_the_owner_cannot_be_kept_the_log_goes_on_uncompacted(path):
    a_log(path)
    with AppendLogSnapshot.open(path)[1] as snap:
        apply(snap, 2)
        before = path.read_bytes(), path.stat().st_ino
        snap._engine.log.files = NotPermitted()
        with pytest.raises(LogAccessError, match="owner") as caught:
            snap.compact()
        assert caught.value.path == path
        assert (path.read_bytes(), path.stat().st_ino) == before
        assert not snap._engine.log.files.writes, "a new file was written in vain"
        apply(snap, 3)
        assert {file.name for file in path.parent.iterdir()} == {path.name, *companions(path)}
        snap._engine.log.files = Files()
        snap.compact()
        assert len(snap.range("")) == 3


@as_root
def test_a_member_of_the_group_who_is_not_the_owner_writes_and_does_not_replace(path):
    a_log(path)
    os.chown(path, USER, GROUP)
    path.chmod(0o660)
    path.parent.chmod(0o777)
    a_log(path)  # by root, whose lock and note let the others in
    for parent in path.parents:
        if parent.stat().st_mode & 0o1 == 0:
            parent.chmod(parent.stat().st_mode | 0o111)
    child = """
import os, sys
import foldlog
from foldlog import LogAccessError, Put, WatchCursor

def use(path):
    with foldlog.open(path) as store:
        store.apply([Put("theirs", b"v")], WatchCursor.from_u64(9))
        try:
            store.compact()
        except LogAccessError as error:
            print("refused:", error)
        store.apply([Put("more", b"v")], WatchCursor.from_u64(10))

use(sys.argv[2])  # what is imported late, the other user may not be able to read
os.setgroups([2345])
os.setgid(7777)
os.setuid(7777)
use(sys.argv[1])
print("closed")
"""
    warm = path.with_name("warm.log")
    done = subprocess.run(
        [sys.executable, "-c", child, path, warm], capture_output=True, text=True, check=False
    )
    assert "refused" in done.stdout, done
    assert "closed" in done.stdout
    assert access_of(path)[:3] == (USER, GROUP, 0o660)
    with AppendLogSnapshot.open(path)[1] as snap:
        assert {"theirs", "more"} <= {entry.key for entry in snap.range("")}


# What is made from the log.


def a_torn_copy(path: Path, folder: Path) -> list[Path]:
    tear(path)
    with AppendLogSnapshot.open(path)[1] as snap:
        assert snap.report.kept_at
        return [snap.report.kept_at]


def all_of_the_artifact(folder: Path) -> list[Path]:
    return [folder / "artifact", *(folder / "artifact").rglob("*")]


def an_export(path: Path, folder: Path) -> list[Path]:
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.export_to(folder / "artifact")
    return all_of_the_artifact(folder)


def an_export_of_a_store(path: Path, folder: Path) -> list[Path]:
    with foldlog.open(path) as store:
        store.export_to(folder / "artifact")
    return all_of_the_artifact(folder)


def an_export_from_a_shell(path: Path, folder: Path) -> list[Path]:
    assert run("export", path, folder / "artifact").exit_code == 0
    return all_of_the_artifact(folder)


def an_import(path: Path, folder: Path) -> list[Path]:
    an_export(path, folder)
    AppendLogSnapshot.import_artifact(folder / "artifact", folder / "dest")[1].close()
    return [folder / "dest", *(folder / name for name in companions(folder / "dest"))]


def an_import_as_the_other_format(path: Path, folder: Path) -> list[Path]:
    artifact, *_ = an_export(path, folder)
    dest = folder / "dest"
    AppendLogSnapshot.import_artifact(artifact, dest, format="slipstream-v2")[1].close()
    return [dest]


def a_conversion(path: Path, folder: Path) -> list[Path]:
    assert run("convert", path, folder / "dest", "--to", "slipstream-v2").exit_code == 0
    return [folder / "dest", *(folder / name for name in companions(folder / "dest"))]


def a_salvage(path: Path, folder: Path) -> list[Path]:
    salvage_log(path, folder / "dest")
    return [folder / "dest"]


def the_lock_and_the_note(path: Path, folder: Path) -> list[Path]:
    a_log(path)
    return [path.with_name(name) for name in companions(path)]


ADDITIONS = [a_torn_copy, an_export, an_export_of_a_store, an_export_from_a_shell, an_import]
ADDITIONS += [an_import_as_the_other_format, a_conversion, a_salvage, the_lock_and_the_note]
additions = pytest.mark.parametrize("add", ADDITIONS, ids=lambda case: case.__name__)


@additions
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
@pytest.mark.parametrize("mask", UMASKS)
def test_what_is_made_from_a_log_is_no_wider_than_it(path, tmp_path, umask, add, mode, mask):
    a_log(path)
    path.chmod(mode)
    umask(mask)
    for made in add(path, tmp_path):
        bits = stat.S_IMODE(made.stat().st_mode)
        if made.is_dir():
            assert (bits & 0o444) >> 2 == bits & 0o111
        assert not bits & 0o666 & ~(mode | 0o600), made
        of_the_log = add in (the_lock_and_the_note, a_torn_copy)
        if not of_the_log and made.name not in companions(tmp_path / "dest"):
            assert not bits & 0o666 & mask, made
        assert bits & 0o600 == 0o600


@as_root
@additions
@pytest.mark.parametrize("setgid", [False, True])
def test_another_group_than_the_logs_gets_no_more_than_others_have(path, tmp_path, add, setgid):
    """In a directory that gives its own group to new files, 0640 would let in another group than
    the log's.
    """
    a_log(path)
    os.chown(path, USER, GROUP)
    path.chmod(0o640)
    if setgid:
        for folder in (tmp_path, path.parent):
            os.chown(folder, 0, 3456)
            folder.chmod(0o2775)
    for made in add(path, tmp_path):
        info = made.stat()
        assert info.st_gid == GROUP or not info.st_mode & 0o070, made
        assert not info.st_mode & 0o007


@pytest.mark.parametrize("add", [an_export, a_salvage, a_conversion, a_torn_copy])
def test_no_byte_is_written_before_a_new_file_is_as_narrow_as_it_shall_be(
    path, tmp_path, monkeypatch, add, umask
):
    a_log(path)
    path.chmod(0o640)
    umask(0)
    a_log(path)  # narrows the lock and the note
    real = Files.write

    def write(self: Files, fd: int, data: bytes, offset: int) -> int:
        assert not os.fstat(fd).st_mode & 0o027, os.readlink(f"/proc/self/fd/{fd}")
        return real(self, fd, data, offset)

    monkeypatch.setattr(Files, "write", write)
    add(path, tmp_path)


def test_a_new_log_is_as_any_new_file_is(path, umask):
    for mask in UMASKS:
        umask(mask)
        a_log(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
        assert stat.S_IMODE(note_path(path).stat().st_mode) == 0o600 | 0o666 & ~mask
        for file in path.parent.iterdir():
            file.unlink()


@pytest.mark.parametrize("mode", range(0, 0o1000, 0o11))
def test_a_side_mode_lets_nobody_in_whom_the_source_keeps_out(mode):
    for same_group in (True, False):
        for mask in UMASKS:
            source = Access(0, 0, mode, ())
            made = side_mode(source, same_group=same_group, umask=mask)
            assert made & 0o700 == 0o600
            assert not made & 0o077 & ~mode
            assert not made & 0o077 & mask
            if not same_group:
                assert not made & 0o070
                assert not made & 0o007 & ~(mode >> 3), "who was in the group is among the others"
            listed = source._replace(attributes=((ACL, b""),))
            assert side_mode(listed, same_group=same_group, umask=mask) == 0o600


def test_the_error_says_path_and_reason_and_pickles(path):
    error = pickle.loads(pickle.dumps(LogAccessError(path, "because")))
    assert (error.path, error.reason) == (path, "because")
    assert json.dumps(str(error)).count("because") == 1
