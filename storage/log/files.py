"""The one seam to the file system. All file I/O crosses it, so that any call can be made to fail.

`Files` is both the real implementation and the interface: `foldlog.testing` derives test doubles
that fail, count and crash.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import sys
import weakref
from collections import deque
from pathlib import Path
from typing import NamedTuple

from foldlog.protocol.closing import Closing
from foldlog.protocol.errors import ReentrantCall, drop_system_errors, is_from_system
from foldlog.storage.handover import discard, enter_alone

_getframe = sys._getframe
_FLAGS = os.O_CLOEXEC | getattr(os, "O_NOCTTY", 0)
ACL = "system.posix_acl_access"
# The kernel's `struct flock` on 64-bit Linux: type, whence, start, length, pid. Only there can
# `marked` see a mark.
_FLOCK = struct.Struct("@hhqqi4x")
_NO_ATTRIBUTES = (errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES)
"""How a system, or a file system, says that it has no such attributes."""
_MARKS = sys.platform == "linux" and sys.maxsize > 2**32 and hasattr(fcntl, "F_OFD_SETLK")


class Access(NamedTuple):
    """Who may use a file."""

    uid: int
    gid: int
    mode: int
    """The permission bits, with set-user-id, set-group-id and sticky."""
    attributes: tuple[tuple[str, bytes], ...]
    """(name, value) of the access list, if there is one, and of the user attributes (`user.*`)."""

    @property
    def acl(self) -> bytes | None:
        """The access list, in the kernel's encoding; None if there is only the mode."""
        return dict(self.attributes).get(ACL)


class Files:
    """The operating system's files. OSError passes through unless a method says otherwise.

    An exception of a signal handler that comes between the return of `os.open` and the next
    bytecode leaves the descriptor open: nobody knows its number yet. `io.FileIO` would own it from
    the start, but opens with flags of its own: it follows links and hangs on pipes, unless an
    `opener` in Python, where the same can happen, sets others.
    """

    def open_read(self, path: Path) -> int:
        """Open the regular file at `path` for reading. Returns a descriptor.

        OSError for a directory, pipe or device; never hangs on one.
        """
        return self._regular(path, os.open(path, os.O_RDONLY | os.O_NONBLOCK | _FLAGS))

    def open_write(self, path: Path) -> int:
        """Open the regular file at `path` for reading and writing. OSError also for a link."""
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | _FLAGS
        return self._regular(path, os.open(path, flags))

    def open_side(self, path: Path, *, write: bool = False) -> int:
        """Open a file that foldlog keeps beside a log, for reading, or for both with `write`.

        OSError for a link.
        """
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_NOFOLLOW | _FLAGS
        return self._regular(path, os.open(path, flags))

    def create(self, path: Path, *, exclusive: bool = False, mode: int = 0o666) -> int:
        """Create or empty a file, and open it for reading and writing.

        With `exclusive`, FileExistsError if it exists. A new file has `mode`, less the umask.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | _FLAGS
        flags |= os.O_EXCL if exclusive else os.O_TRUNC
        return self._regular(path, os.open(path, flags, mode))

    def _regular(self, path: Path, fd: int) -> int:
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open_dir(self, name: str | Path, dir_fd: int | None = None) -> int:
        """Open a directory, relative to `dir_fd` if given. OSError for a link."""
        return os.open(
            name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd
        )

    def open_at(self, name: str, dir_fd: int) -> int:
        """Open `name` in the directory `dir_fd` for reading. Follows no link; hangs on no pipe."""
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | _FLAGS, dir_fd=dir_fd)

    def list_dir(self, fd: int) -> list[str]:
        """The names in an open directory."""
        return os.listdir(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def read(self, fd: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes from `offset`. A short read may happen before the end of the file."""
        return os.pread(fd, size, offset)

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def data_after(self, fd: int, offset: int) -> int | None:
        """The first offset from `offset` on outside a hole; None if only a hole is left."""
        try:
            return os.lseek(fd, offset, os.SEEK_DATA)
        except AttributeError:
            return offset
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                return offset  # a file system without holes
            raise

    def hole_after(self, fd: int, offset: int) -> int:
        """The first offset from `offset` on in a hole; the end of the file counts as one."""
        try:
            return os.lseek(fd, offset, os.SEEK_HOLE)
        except AttributeError:
            return sys.maxsize
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENXIO):
                return sys.maxsize
            raise

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write at `offset`. Returns the number of bytes written, which may be fewer than given."""
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def replace(self, source: Path, dest: Path) -> None:
        """Rename a file over another, atomically."""
        os.replace(source, dest)

    def rename_new(self, source: Path, dest: Path) -> None:
        """Rename a directory to a free name. FileExistsError if the name is taken."""
        if self.exists(dest):
            raise FileExistsError(errno.EEXIST, "exists", str(dest))
        os.rename(source, dest)  # replaces a directory created meanwhile only if that is empty

    def link_new(self, source: Path, dest: Path) -> None:
        """Give a file a second name, atomically. FileExistsError if the name is taken."""
        os.link(source, dest)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_dir(self, path: Path, mode: int = 0o777) -> None:
        os.mkdir(path, mode)

    def sync_dir(self, path: Path, opened: int | None = None) -> None:
        """Make the names in a directory durable, if the file system can (no EINVAL).

        `opened`: a descriptor of it, for callers that cannot risk running out of descriptors; it
        stays open.
        """
        fd = opened
        if fd is None:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            if opened is None:
                os.close(fd)

    def stat(self, path: str | Path, *, follow: bool = True) -> os.stat_result:
        """The status of the file at `path`; without `follow`, of a link itself."""
        return os.stat(path, follow_symlinks=follow)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def free_bytes(self, path: Path) -> int | None:
        """How much more the file system of `path` can hold; None if it does not tell."""
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize if space.f_blocks else None

    def lock(self, fd: int, *, shared: bool = False) -> bool:
        """Take the exclusive (or a shared) lock of an open file, without waiting.

        False if another descriptor holds a conflicting lock.
        """
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            return False
        return True

    def unlock(self, fd: int) -> None:
        """Release the lock of an open file."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def mark(self, fd: int) -> None:
        """Mark an open file as held by a writer until the descriptor is closed, for `marked`.

        Best effort.
        """
        if _MARKS:
            wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
            with drop_system_errors():  # a reader has locked it
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)

    def marked(self, fd: int) -> bool | None:
        """True if another descriptor has put a `mark` on the file; None if the system cannot tell.

        Takes no lock.
        """
        if not _MARKS:
            return None
        asked = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0)
        found: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
        return found == fcntl.F_WRLCK

    def access(self, fd: int) -> Access:
        """Who may use an open file."""
        info = os.fstat(fd)
        names: list[str] = []
        if hasattr(os, "listxattr"):
            try:
                names = sorted(os.listxattr(fd))
            except OSError as error:
                if error.errno not in _NO_ATTRIBUTES:
                    raise
        kept = tuple(
            (name, os.getxattr(fd, name))
            for name in names
            if name == ACL or name.startswith("user.")
        )
        return Access(info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode), kept)

    def set_access(self, fd: int, access: Access) -> None:
        """Set who may use an open file. PermissionError unless the result is exactly `access`."""
        have = self.access(fd)
        try:
            if have[:2] != access[:2]:
                os.fchown(fd, access.uid, access.gid)
            for name, _ in set(have.attributes) - set(access.attributes):
                os.removexattr(fd, name)
            for name, value in set(access.attributes) - set(have.attributes):
                os.setxattr(fd, name, value)
            os.fchmod(fd, access.mode)  # last: a change of owner clears mode bits
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EACCES):
                raise
            raise PermissionError(errno.EPERM, error.strerror) from error
        if self.access(fd) != access:
            raise PermissionError(errno.EPERM, "the file system does not store it")

    def exists(self, path: Path) -> bool:
        """True if anything has this name, even a dangling link."""
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


OS_FILES = Files()


def write_all(files: Files, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, resuming after short writes."""
    done = files.write(fd, data, offset)  # type: ignore[arg-type]
    while done < len(data):
        count = files.write(fd, memoryview(data)[done:], offset + done)
        if count <= 0:
            raise OSError(errno.EIO, "write took no bytes")
        done += count


def remove_quietly(files: Files, path: Path) -> None:
    """Remove a file that may be gone already, where a failure is harmless."""
    with drop_system_errors():
        files.unlink(path)


class Retiring:
    """Closes a descriptor exactly once, even if `close` is interrupted and called again.

    By the second call the number may belong to another file; it is closed only if it does not.
    An OSError is dropped if the descriptor is closed nevertheless: whether its data is on disk is
    for `sync` to say, and what is left to do must not be skipped.
    """

    def __init__(self, files: Files, fd: int) -> None:
        self._files, self.fd = files, fd
        stat = os.fstat(fd)
        self._identity = stat.st_dev, stat.st_ino
        self._begun = False

    def close(self) -> None:
        if self.fd < 0 or (self._begun and not self._is_open()):
            return
        self._begun = True
        try:
            self._files.close(self.fd)
        except OSError as error:
            if not is_from_system(error) or self._is_open():
                raise
        finally:
            if not self._is_open():
                self.fd = -1

    def _is_open(self) -> bool:
        try:
            stat = os.fstat(self.fd)
        except OSError as error:
            if not is_from_system(error):
                raise
            return False
        return (stat.st_dev, stat.st_ino) == self._identity


class ReadHandle(Closing):
    """A file open for reading, shared by all its readers; closed when the last of them is gone.

    An open that fails must `close` it: the error's traceback counts as a reader. So must a with
    block, at whose end nobody reads it any more.
    """

    __slots__ = ("__weakref__", "_gone", "_retiring", "fd", "files", "path")

    def __init__(self, files: Files, path: Path) -> None:
        self.fd = -1  # for __del__, if opening fails
        self.files, self.path = files, path
        self._retiring: Retiring | None = None
        self._gone: weakref.ref[ReadHandle] | None = None
        if _gone:
            close_left_open()
        self.fd = fd = files.open_read(path)
        self._retiring = retiring = Retiring(files, fd)
        # The callback is one call into C: unlike `__del__`, it cannot be interrupted.
        self._gone = gone = weakref.ref(self, _gone.append)
        _unclosed[id(gone)] = gone, retiring

    def read(self, size: int, offset: int) -> bytes:
        """Exactly `size` bytes from `offset`. EOFError if the file is shorter."""
        data = self.files.read(self.fd, size, offset)
        if len(data) == size:
            return data
        parts, have = [data], len(data)
        while have < size:
            data = self.files.read(self.fd, size - have, offset + have)
            if not data:
                raise EOFError(f"the file ends {size - have} bytes too early")
            parts.append(data)
            have += len(data)
        return b"".join(parts)

    def close(self) -> None:
        """Close it now. Only if nobody else may still read it. If interrupted, call it again."""
        if self._retiring is None and self.fd >= 0:  # opening it was interrupted
            self._retiring = Retiring(self.files, self.fd)
        self.fd = -1
        if self._retiring is not None:
            with drop_system_errors():
                self._retiring.close()
            _unclosed.pop(id(self._gone), None)
            self._gone = None

    def __del__(self) -> None:
        gone = getattr(self, "_gone", None)
        if gone is not None and gone() is None:
            # The garbage collector calls the callback first: another thread may be closing it.
            close_left_open()
        elif getattr(self, "fd", -1) >= 0:  # an interrupt may come before `fd` is set
            self.close()


# What closes the descriptors of the handles that are open, by the id of the reference.
_unclosed: dict[int, tuple[weakref.ref[ReadHandle], Retiring]] = {}
# Handles that are gone, and whose finalizers were interrupted, or are still to come.
_gone: deque[weakref.ref[ReadHandle]] = deque()
_closers: deque[object] = deque()


def close_left_open() -> None:
    """Close what handles that are gone left open. One call at a time does it: two would close the
    number twice, and by then it may be another file's. What it misses, the next opening closes."""
    try:
        enter_alone(_closers, _getframe())
        while _gone:
            known = _unclosed.get(id(_gone[0]))
            if known is not None:
                with drop_system_errors():
                    known[1].close()
                _unclosed.pop(id(known[0]), None)
                del known
            _gone.popleft()
    except ReentrantCall:  # another thread is at it
        pass
    finally:
        discard(_closers, _getframe())


def check_files(files: object) -> None:
    """TypeError unless it is a `Files`."""
    if not isinstance(files, Files):
        raise TypeError(f"files is a Files, not {type(files).__name__}")


def path_text(path: str | bytes | os.PathLike[str]) -> str:
    """`path` as a plain str. TypeError unless it is a path; ValueError if it is empty, which would
    be the current directory."""
    text = str.__str__(os.fsdecode(path))  # no method of a class of the program's runs later
    if not text:
        raise ValueError("a path is empty")
    return text


def absolute(path: str | bytes | os.PathLike[str]) -> Path:
    """The absolute path, with links as they are. TypeError or ValueError: see `path_text`."""
    return Path(os.path.abspath(path_text(path)))


def unused_path(files: Files, path: str | os.PathLike[str], what: str) -> Path:
    """The absolute `path`. FileExistsError if it exists: `what` never overwrites."""
    given = absolute(path)
    if files.exists(given):
        raise FileExistsError(errno.EEXIST, f"{what} never overwrites", str(given))
    return given


def resolve(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a log, with links followed. FileNotFoundError for a dangling link."""
    given = Path(path_text(path))
    real = Path(os.path.realpath(given))
    if given.is_symlink() and not real.exists():
        raise FileNotFoundError(errno.ENOENT, "a dangling link", str(given))
    return real
