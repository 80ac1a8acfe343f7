"""Artifacts of a RocksDB store: a checkpoint with a manifest.

    DEST/MANIFEST.json     as in every artifact; the backend is "foldlog-rocksdb", its version
                           the generation of the encoding
    DEST/data/...          the files of the checkpoint, all of them declared

RocksDB never modifies its tables, so a checkpoint links them; it copies the few small files that
change. An export appears under its name complete or not at all. An import copies each file, checks
the digest of the copy, and verifies the whole copy before it becomes a store.
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import shutil
import stat
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from foldlog.protocol.errors import ArtifactInvalidError, FoldlogError
from foldlog.protocol.store import StrPath
from foldlog.storage.artifacts.artifact import (
    MANIFEST_NAME,
    ArtifactFile,
    ExportManifest,
    check_listing,
    import_destination,
    read_manifest,
)
from foldlog.storage.artifacts.staging import make_dir, narrow_dir, staging
from foldlog.storage.engines.rocksdb.database.opening import binding
from foldlog.storage.engines.rocksdb.database.record import GENERATION
from foldlog.storage.engines.rocksdb.exchange.reading import access_of
from foldlog.storage.engines.rocksdb.exchange.verify import RocksDbReport, describe, verify_database
from foldlog.storage.formats.format import PRIVATE, Progress
from foldlog.storage.log.access import narrow, side_mode
from foldlog.storage.log.files import OS_FILES, Access, Files, absolute, write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BACKEND = "foldlog-rocksdb"
DATA = "data"
_COPY_BYTES = 1024 * 1024
_UNFIT = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)
"""Errors of opening a part of an artifact that tell of the artifact itself."""
_NO_PAYLOAD = ("rocksdict-config.json", "LOCK", "LOG")
"""Files of an open database and of the binding that hold none of its state."""


def export(
    path: Path,
    checkpoint: Callable[[Path], None],
    dest_dir: StrPath,
    progress: Progress | None = None,
) -> ExportManifest:
    """Write a checkpoint of the store at `path` as an artifact. An error leaves nothing.

    FileExistsError if `dest_dir` exists. Cost: a read of all files for the digests, and the space
    of those that are not linked: hardly any within one file system.
    """
    source = access_of(path)
    with staging(OS_FILES, dest_dir, lambda stage: make_dir(OS_FILES, stage, source)) as stage:
        checkpoint(stage / DATA)
        narrow_dir(OS_FILES, stage / DATA, source)
        _drop_what_is_no_payload(stage / DATA)
        cursor = describe(stage / DATA).cursor
        _drop_what_is_no_payload(stage / DATA)
        declared = _digests(stage / DATA, progress)
        manifest = ExportManifest(BACKEND, str(GENERATION), cursor, int(time.time()), declared)
        _write_manifest(stage / MANIFEST_NAME, manifest, source)
        OS_FILES.sync_dir(stage / DATA)
    return manifest


def _drop_what_is_no_payload(data: Path) -> None:
    for name in _NO_PAYLOAD:
        (data / name).unlink(missing_ok=True)


def _digests(data: Path, progress: Progress | None) -> tuple[ArtifactFile, ...]:
    """Sync each file, and return its digest. RocksDB has synced its tables only."""
    paths = sorted(data.iterdir())
    total = sum(path.stat().st_size for path in paths)
    done = 0
    declared = []
    for path in paths:
        digest = blake3(max_threads=blake3.AUTO)
        with closing_fd(OS_FILES, OS_FILES.open_read(path)) as fd:
            OS_FILES.sync(fd)
            size = 0
            while chunk := OS_FILES.read(fd, _COPY_BYTES, size):
                digest.update(chunk)
                size += len(chunk)
                if progress is not None:
                    progress(done + size, total)
        done += size
        declared.append(ArtifactFile(f"{DATA}/{path.name}", size, digest.hexdigest()))
    return tuple(declared)


def _write_manifest(path: Path, manifest: ExportManifest, source: Access) -> None:
    with closing_fd(OS_FILES, OS_FILES.create(path, exclusive=True, mode=PRIVATE)) as fd:
        narrow(OS_FILES, fd, source)
        write_all(OS_FILES, fd, manifest.to_json(), 0)
        OS_FILES.sync(fd)


def import_artifact(
    artifact_dir: StrPath, dest_path: StrPath, *, progress: Progress | None = None
) -> ExportManifest:
    """Verify an artifact in full and import its database to `dest_path`, which must not exist.

    Raises ArtifactInvalidError, FileExistsError or OSError, and leaves `dest_path` as it was.
    """
    binding()
    dest = import_destination(OS_FILES, dest_path)
    root = absolute(artifact_dir)
    manifest = read_manifest(root)
    _identify(root, manifest)
    staged = dest.with_name(f"{dest.name}.tmp-{secrets.token_hex(4)}")
    try:
        os.mkdir(staged, 0o700)
        _copy_payload(root, staged, manifest, progress)
        _check_copy(root, staged, manifest)
        narrow_dir(OS_FILES, staged, _access_within(access_of(root), access_of(root / DATA)))
        OS_FILES.sync_dir(staged)
        OS_FILES.rename_new(staged, dest)
        OS_FILES.sync_dir(dest.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return manifest


def _access_within(outer: Access, inner: Access) -> Access:
    """Who may use what is in the directory `inner`, in the directory `outer`: nobody whom either
    keeps out."""
    passed = side_mode(inner, same_group=inner.gid == outer.gid, umask=0)
    return outer._replace(mode=outer.mode & passed)


def _identify(root: Path, manifest: ExportManifest) -> None:
    where = root / MANIFEST_NAME
    if manifest.backend != BACKEND:
        raise ArtifactInvalidError(where, f"backend is {manifest.backend!r}, expected {BACKEND!r}")
    if manifest.backend_version != str(GENERATION):
        raise ArtifactInvalidError(
            where, f"backend_version is {manifest.backend_version!r}, expected {str(GENERATION)!r}"
        )


def _copy_payload(
    root: Path, staged: Path, manifest: ExportManifest, progress: Progress | None
) -> None:
    """Copy exactly the declared files; check the digest of each copy, and sync it."""
    total = sum(file.size for file in manifest.files)
    space = os.statvfs(staged)
    if space.f_bavail * space.f_frsize < total:
        raise OSError(errno.ENOSPC, f"the import needs {total} bytes", str(staged))
    try:
        root_fd = OS_FILES.open_dir(root)
    except NotADirectoryError:
        raise ArtifactInvalidError(root, "is not a directory (links are not followed)") from None
    done = 0
    with closing_fd(OS_FILES, root_fd):
        check_listing(OS_FILES, root, root_fd, {MANIFEST_NAME, DATA})
        try:
            data_fd = OS_FILES.open_dir(DATA, root_fd)
        except OSError as error:
            if error.errno not in _UNFIT:
                raise
            raise ArtifactInvalidError(root / DATA, f"is no directory: {error.strerror}") from None
        with closing_fd(OS_FILES, data_fd):
            names = {file.path.removeprefix(f"{DATA}/") for file in manifest.files}
            check_listing(OS_FILES, root / DATA, data_fd, names)
            for file in manifest.files:
                _copy_file(root, data_fd, staged, file)
                done += file.size
                if progress is not None:
                    progress(done, total)


def _copy_file(root: Path, data_fd: int, staged: Path, declared: ArtifactFile) -> None:
    source_path = root / declared.path
    name = source_path.name
    try:
        source = OS_FILES.open_at(name, data_fd)
    except OSError as error:
        if error.errno not in _UNFIT:
            raise
        raise ArtifactInvalidError(source_path, f"cannot be opened: {error.strerror}") from None
    with closing_fd(OS_FILES, source):
        info = OS_FILES.fstat(source)
        if not stat.S_ISREG(info.st_mode):
            raise ArtifactInvalidError(source_path, "is not a regular file")
        if info.st_size != declared.size:
            raise ArtifactInvalidError(
                source_path, f"has {info.st_size} bytes, declared are {declared.size}"
            )
        digest = blake3(max_threads=blake3.AUTO)
        with closing_fd(OS_FILES, OS_FILES.create(staged / name, exclusive=True)) as out:
            os.fchmod(out, OS_FILES.fstat(out).st_mode & info.st_mode & 0o666)
            done = 0
            while chunk := OS_FILES.read(source, _COPY_BYTES, done):
                digest.update(chunk)
                write_all(OS_FILES, out, chunk, done)
                done += len(chunk)
                if done > declared.size:
                    break
            found = digest.hexdigest()
            if done != declared.size or not hmac.compare_digest(found, declared.blake3):
                raise ArtifactInvalidError(
                    source_path, f"its BLAKE3 digest is {found}, declared is {declared.blake3}"
                )
            OS_FILES.sync(out)


def _check_copy(root: Path, staged: Path, manifest: ExportManifest) -> None:
    """ArtifactInvalidError unless the copy verifies and is at the manifest's cursor."""
    try:
        report: RocksDbReport = verify_database(staged)
    except FoldlogError as error:
        reason = getattr(error, "reason", str(error))
        raise ArtifactInvalidError(root / DATA, str(reason)) from error
    finally:
        _drop_what_is_no_payload(staged)
    if not report.ok:
        raise ArtifactInvalidError(root / DATA, report.problems[0])
    if report.cursor != manifest.cursor:
        raise ArtifactInvalidError(
            root / MANIFEST_NAME,
            f"cursor_hex is {manifest.cursor.hex()!r}, the payload is at {report.cursor.hex()!r}",
        )


@contextmanager
def closing_fd(files: Files, fd: int) -> Iterator[int]:
    """Close `fd` on exit."""
    try:
        yield fd
    finally:
        files.close(fd)
