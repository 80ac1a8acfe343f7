"""Artifacts: export of a fold as a directory that can be sent elsewhere, and import.

    DEST/MANIFEST.json     schema_version, backend, backend_version, cursor_hex, created_at_unix,
                           files[path, size, blake3]
    DEST/data/fold.log     a compacted log; data/fold.snap if it is in the Rust crate's format

An export appears under its name complete or not at all. An import trusts nothing: the manifest is
limited in size and checked field by field, the directory must hold exactly what it declares, and no
link is followed. The payload is verified while it is copied, and the copy becomes the store: the
original is not read twice.
"""

from __future__ import annotations

import errno
import hmac
import json
import os
import re
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from foldlog.protocol.errors import ArtifactInvalidError, FoldlogError
from foldlog.protocol.options import FORMAT
from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import MAX_TOKEN_BYTES, WatchCursor
from foldlog.storage.artifacts.staging import make_dir, staging
from foldlog.storage.artifacts.strict_json import parse_object
from foldlog.storage.fold.reading import Writable
from foldlog.storage.formats.format import PRIVATE, Loaded, LogFormat, Progress
from foldlog.storage.formats.registry import FORMATS, format_named
from foldlog.storage.formats.rewrite import write_new
from foldlog.storage.log.access import narrow
from foldlog.storage.log.files import (
    OS_FILES,
    Access,
    Files,
    ReadHandle,
    absolute,
    path_text,
    remove_quietly,
    resolve,
    unused_path,
    write_all,
)
from foldlog.storage.log.sidecars.lock import WriterLock, temporary
from foldlog.storage.log.sidecars.origins import drop_stale_origin

SCHEMA_VERSION = 1
MANIFEST_NAME = "MANIFEST.json"
MAX_MANIFEST_BYTES = 1024 * 1024
_COPY_BYTES = 1024 * 1024
_FIELDS = frozenset(
    ("schema_version", "backend", "backend_version", "cursor_hex", "created_at_unix", "files")
)


class ArtifactFile(NamedTuple):
    """A file of an artifact, as its manifest declares it."""

    path: str
    """Relative to the artifact, with forward slashes."""
    size: int
    """Bytes."""
    blake3: str
    """The digest, in 64 lower-case hex digits."""


class ExportManifest(NamedTuple):
    """The manifest of an artifact."""

    backend: str
    backend_version: str
    """The version of the payload's format."""
    cursor: WatchCursor
    """The cursor of the payload."""
    created_at_unix: int
    """In seconds since the epoch."""
    files: tuple[ArtifactFile, ...]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> bytes:
        """The content of MANIFEST.json."""
        fields = {
            "schema_version": self.schema_version,
            "backend": self.backend,
            "backend_version": self.backend_version,
            "cursor_hex": self.cursor.hex(),
            "created_at_unix": self.created_at_unix,
            "files": [file._asdict() for file in self.files],
        }
        return json.dumps(fields, indent=2).encode() + b"\n"


def export_fold(
    fold: Writable,
    dest_dir: str | os.PathLike[str],
    *,
    format: FormatName = "foldlog",
    source: Access | None = None,
    files: Files = OS_FILES,
    progress: Progress | None = None,
) -> ExportManifest:
    """Write `fold` as an artifact at `dest_dir`, durably.

    `source`: the access of the fold's log; the artifact admits nobody else. None: the defaults of
    new files. FileExistsError if `dest_dir` exists. OSError: nothing is there, unless only the last
    step failed, which makes its name durable.
    """
    FORMAT.check(format)
    kind = format_named(format)
    mode = 0o666 if source is None else PRIVATE
    with staging(files, dest_dir, lambda stage: make_dir(files, stage, source)) as stage:
        payload = stage / kind.payload_path
        make_dir(files, payload.parent, source)
        out = kind.new_file(files, payload, seq=fold.seq, mode=mode)
        try:
            if source is not None:
                narrow(files, out.fd, source)
            out.write_fold(fold, progress)
            out.sync()
        finally:
            files.close(out.fd)
        declared = _declare(files, payload, kind.payload_path)
        manifest = ExportManifest(
            kind.backend, kind.backend_version, fold.cursor(), int(time.time()), (declared,)
        )
        fd = files.create(stage / MANIFEST_NAME, exclusive=True, mode=mode)
        try:
            if source is not None:
                narrow(files, fd, source)
            write_all(files, fd, manifest.to_json(), 0)
            files.sync(fd)
        finally:
            files.close(fd)
        files.sync_dir(payload.parent)
    return manifest


def _declare(files: Files, path: Path, name: str) -> ArtifactFile:
    """The manifest's entry for the file at `path`, which is `name` in the artifact."""
    digest = blake3()
    with ReadHandle(files, path) as handle:
        size = files.fstat(handle.fd).st_size
        for at in range(0, size, _COPY_BYTES):
            digest.update(handle.read(min(_COPY_BYTES, size - at), at))
    return ArtifactFile(name, size, digest.hexdigest())


def read_manifest(artifact_dir: str | os.PathLike[str], files: Files = OS_FILES) -> ExportManifest:
    """The manifest of an artifact. ArtifactInvalidError names a field that is not valid."""
    root = absolute(artifact_dir)
    fd = _open_dir(files, root, root, None)
    try:
        return _read_manifest(files, root, fd)
    finally:
        files.close(fd)


def import_destination(files: Files, dest_path: str | os.PathLike[str]) -> Path:
    """The absolute `dest_path`, which is free. FileExistsError; FileNotFoundError without its
    directory."""
    dest = resolve(unused_path(files, dest_path, "an import"))
    if not files.exists(dest.parent):
        raise FileNotFoundError(errno.ENOENT, "no such directory to import to", str(dest.parent))
    return dest


def import_artifact(
    artifact_dir: str | os.PathLike[str],
    dest_path: str | os.PathLike[str],
    *,
    format: FormatName | None = None,
    files: Files = OS_FILES,
    progress: Progress | None = None,
) -> ExportManifest:
    """Verify an artifact in full, then create its log at `dest_path`.

    `format`: of that log; None for foldlog's own.

    The manifest names the format of the artifact itself. ArtifactInvalidError, FileExistsError if
    `dest_path` exists, StoreLocked or OSError: nothing has been created at `dest_path`.
    """
    FORMAT.check(format)
    dest = import_destination(files, dest_path)
    read_manifest(artifact_dir, files)  # most bad artifacts are refused before a lock file exists
    lock = WriterLock(files, dest)  # or a writer that opens here would remove the staged copy
    staged = temporary(dest)
    try:
        manifest, kind = stage_payload(files, artifact_dir, staged, progress)
        landing = format_named(format)
        with ReadHandle(files, staged) as reader:
            loaded = _check_payload(reader, Path(path_text(artifact_dir)), kind, manifest.cursor)
            lock.write(None)  # the watermark of an earlier log at this path is not this one's
            if landing is kind:
                if not kind.keeps_origin:
                    drop_stale_origin(files, dest)
                files.link_new(staged, dest)
                files.sync_dir(dest.parent)
            else:
                source = files.access(reader.fd)
                write_new(files, dest, loaded.fold, landing, progress, source=source)
            lock.keep(reader.fd)
    finally:
        remove_quietly(files, staged)
        lock.release()
    return manifest


def _check_payload(staged: ReadHandle, root: Path, kind: LogFormat, cursor: WatchCursor) -> Loaded:
    """The staged log. ArtifactInvalidError unless it is valid, compact, and at the given cursor."""
    payload = root / kind.payload_path
    try:
        loaded = kind.load(staged)
        _check_clean(loaded)
        kind.check_payload(loaded)
    except FoldlogError as error:
        reason = getattr(error, "reason", str(error))
        raise ArtifactInvalidError(
            payload, f"byte {getattr(error, 'offset', 0)}: {reason}"
        ) from error
    except ValueError as error:
        raise ArtifactInvalidError(payload, str(error)) from error
    if loaded.fold.cursor() != cursor:
        raise ArtifactInvalidError(
            root / MANIFEST_NAME,
            f"cursor_hex is {cursor.hex()!r}, the payload is at {loaded.fold.cursor().hex()!r}",
        )
    return loaded


def _check_clean(loaded: Loaded) -> None:
    if loaded.bad is not None:
        raise ValueError(f"byte {loaded.bad.offset}: {loaded.bad.reason}")
    if loaded.position.offset != loaded.base_end:
        raise ValueError(f"byte {loaded.base_end}: the payload is not compact")


def stage_payload(
    files: Files,
    artifact_dir: str | os.PathLike[str],
    staged: Path,
    progress: Progress | None = None,
) -> tuple[ExportManifest, LogFormat]:
    """Check the manifest and the directory, copy the payload to `staged`, and verify its digest.

    The copy is synced; on an error it is removed. Returns the manifest, and the format it names.
    """
    root = absolute(artifact_dir)
    root_fd = _open_dir(files, root, root, None)
    try:
        manifest = _read_manifest(files, root, root_fd)
        kind = _identify(root, manifest)
        directory, name = kind.payload_path.split("/")
        check_listing(files, root, root_fd, {MANIFEST_NAME, directory})
        data_fd = _open_dir(files, root / directory, Path(directory), root_fd)
        try:
            check_listing(files, root / directory, data_fd, {name})
            source = _open_file(files, root / kind.payload_path, name, data_fd)
            try:
                _copy_verified(
                    files, source, root / kind.payload_path, staged, manifest.files[0], progress
                )
            finally:
                files.close(source)
        finally:
            files.close(data_fd)
    finally:
        files.close(root_fd)
    return manifest, kind


def _identify(root: Path, manifest: ExportManifest) -> LogFormat:
    where = root / MANIFEST_NAME
    by_backend = {format.backend: format for format in FORMATS.values()}
    kind = by_backend.get(manifest.backend)
    if kind is None:
        expected = " or ".join(map(repr, by_backend))
        raise ArtifactInvalidError(where, f"backend is {manifest.backend!r}, expected {expected}")
    if manifest.backend_version != kind.backend_version:
        raise ArtifactInvalidError(
            where,
            f"backend_version is {manifest.backend_version!r},"
            f" expected {kind.backend_version!r} for {kind.backend!r}",
        )
    if [file.path for file in manifest.files] != [kind.payload_path]:
        raise ArtifactInvalidError(where, f"files: expected exactly {kind.payload_path!r}")
    return kind


def _copy_verified(
    files: Files,
    source: int,
    source_path: Path,
    staged: Path,
    declared: ArtifactFile,
    progress: Progress | None,
) -> None:
    size = files.fstat(source).st_size
    if size != declared.size:
        raise ArtifactInvalidError(source_path, f"has {size} bytes, but {declared.size} declared")
    space = os.statvfs(staged.parent)
    if space.f_bavail * space.f_frsize < size:
        raise OSError(errno.ENOSPC, f"the import needs {size} bytes", str(staged.parent))
    digest = blake3()
    out = files.create(staged, exclusive=True, mode=PRIVATE)
    try:
        narrow(files, out, files.access(source))
        done = 0
        while chunk := files.read(source, min(_COPY_BYTES, declared.size + 1 - done), done):
            digest.update(chunk)
            if done + len(chunk) > declared.size:
                raise ArtifactInvalidError(
                    source_path, f"grew beyond the {declared.size} bytes declared"
                )
            write_all(files, out, chunk, done)
            done += len(chunk)
            if progress is not None:
                progress(done, declared.size)
        if done != declared.size:
            raise ArtifactInvalidError(source_path, f"ended after {done} of {declared.size} bytes")
        if not hmac.compare_digest(digest.hexdigest(), declared.blake3):
            raise ArtifactInvalidError(
                source_path,
                f"its BLAKE3 digest is {digest.hexdigest()}, but {declared.blake3} is declared",
            )
        files.sync(out)
    except BaseException:
        remove_quietly(files, staged)
        raise
    finally:
        files.close(out)


def _open_dir(files: Files, path: Path, name: Path, dir_fd: int | None) -> int:
    try:
        return files.open_dir(name, dir_fd)
    except FileNotFoundError:
        raise ArtifactInvalidError(path, "is missing") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise ArtifactInvalidError(
                path, "is not a directory (links are not followed)"
            ) from None
        raise


def _open_file(files: Files, path: Path, name: str, dir_fd: int) -> int:
    try:
        fd = files.open_at(name, dir_fd)
    except FileNotFoundError:
        raise ArtifactInvalidError(path, "is missing") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise ArtifactInvalidError(
                path, "is not a regular file (links are not followed)"
            ) from None
        raise
    try:
        info = files.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise ArtifactInvalidError(path, "is not a regular file with one name")
    except BaseException:
        files.close(fd)
        raise
    return fd


def check_listing(files: Files, path: Path, fd: int, expected: set[str]) -> None:
    """ArtifactInvalidError if the open directory holds anything but what is expected."""
    for name in files.list_dir(fd):
        if name not in expected:
            raise ArtifactInvalidError(path / name, "is not declared in the manifest")


def _read_manifest(files: Files, root: Path, root_fd: int) -> ExportManifest:
    path = root / MANIFEST_NAME
    fd = _open_file(files, path, MANIFEST_NAME, root_fd)
    try:
        raw = files.read(fd, MAX_MANIFEST_BYTES + 1, 0)
    finally:
        files.close(fd)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ArtifactInvalidError(path, f"is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        return parse_manifest(raw)
    except ValueError as error:
        raise ArtifactInvalidError(path, str(error)) from None


def parse_manifest(raw: bytes) -> ExportManifest:
    """The manifest in `raw`. ValueError names a field that is not valid."""
    fields = parse_object(raw, "is not valid JSON: {}".format)
    _check_fields("", fields, _FIELDS)
    if fields["schema_version"] != SCHEMA_VERSION or type(fields["schema_version"]) is not int:
        raise ValueError(
            f"schema_version is {fields['schema_version']!r}, this foldlog reads {SCHEMA_VERSION}"
        )
    for name in ("backend", "backend_version", "cursor_hex"):
        if type(fields[name]) is not str:
            raise ValueError(f"{name} is not text")
    cursor_hex = fields["cursor_hex"]
    if not re.fullmatch("([0-9a-f]{2})*", cursor_hex) or len(cursor_hex) > 2 * MAX_TOKEN_BYTES:
        raise ValueError(f"cursor_hex is not the lower-case hex of a token: {cursor_hex[:40]!r}")
    if type(fields["created_at_unix"]) is not int or not 0 <= fields["created_at_unix"] < 2**63:
        raise ValueError("created_at_unix is not a time in seconds")
    if type(fields["files"]) is not list:
        raise ValueError("files is not a list")
    declared = tuple(
        _parse_file(f"files[{index}]", file) for index, file in enumerate(fields["files"])
    )
    if len({file.path.casefold() for file in declared}) != len(declared):
        raise ValueError("files: a path is declared twice")
    return ExportManifest(
        fields["backend"],
        fields["backend_version"],
        WatchCursor(bytes.fromhex(cursor_hex)),
        fields["created_at_unix"],
        declared,
    )


def _parse_file(where: str, file: Any) -> ArtifactFile:
    if type(file) is not dict:
        raise ValueError(f"{where} is not an object")
    _check_fields(where + ".", file, frozenset(ArtifactFile._fields))
    path, size, digest = file["path"], file["size"], file["blake3"]
    if (
        type(path) is not str
        or len(path) > 255
        or not re.fullmatch(r"data/[A-Za-z0-9_][A-Za-z0-9._-]*", path)
    ):
        shown = ascii(path[:80]) if type(path) is str else path
        raise ValueError(f"{where}.path is not a file name under data/: {shown}")
    if type(size) is not int or not 0 <= size < 2**63:
        raise ValueError(f"{where}.size is not a size in bytes")
    if type(digest) is not str or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{where}.blake3 is not 64 lower-case hex digits")
    return ArtifactFile(path, size, digest)


def _check_fields(where: str, fields: dict[str, Any], expected: frozenset[str]) -> None:
    if missing := sorted(expected - fields.keys()):
        raise ValueError(f"{where}{missing[0]} is missing")
    if unknown := sorted(fields.keys() - expected):
        raise ValueError(f"{where}{unknown[0][:40]!a} is not a field of a manifest")
