"""Who may use a file that foldlog makes: the rules for owner, group, mode and access list.

- A file that takes the log's place gets the log's owner, group, mode, access list and `user.*`
  attributes, or it does not
  take the place: `keep_access`.
- The lock, the note and a torn copy belong to the log: they let in whom the log lets in, or fewer:
  `share`.
- A new log or artifact that is made from a log lets nobody in whom that keeps out: `narrow`. It
  lets in fewer where the
  umask says so, and where the log's group or access list cannot be given.
- Both are done before anything is written to the file, which is made for its owner alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from foldlog.protocol.errors import LogAccessError
from foldlog.storage.log.files import Access, Files


def keep_access(files: Files, fd: int, access: Access, path: Path) -> None:
    """Give the new file `fd`, which is to take the place of `path`, what that has. LogAccessError
    if that cannot be done.
    """
    try:
        files.set_access(fd, access)
    except PermissionError as error:
        reason = (
            f"a new file in its place cannot be given owner {access.uid}, group {access.gid},"
            f" mode {access.mode:04o} and its other attributes ({error.strerror})"
        )
        raise LogAccessError(path, reason) from error


def side_mode(source: Access, *, same_group: bool, umask: int) -> int:
    """The mode of a file that is to be no wider than `source`, for a file without an access list."""
    group, others = source.mode & 0o060 & ~umask, source.mode & 0o006 & ~umask
    if source.acl is not None:  # the group's bits are a mask, and anyone may be denied by name
        return 0o600
    if not same_group:  # who was in the group is among the others
        return 0o600 | (others & source.mode >> 3)
    return 0o600 | group | others


def narrow(files: Files, fd: int, source: Access, *, directory: bool = False) -> None:
    """Make the new file or directory `fd`, which holds what `source` holds, no wider than it."""
    own = files.access(fd)
    umask = process_umask()
    wanted = []
    for gid in dict.fromkeys((source.gid, own.gid)):
        mode = side_mode(source, same_group=gid == source.gid, umask=umask)
        if directory:
            mode |= (mode & 0o444) >> 2 | own.mode & 0o2000
        wanted.append(Access(own.uid, gid, mode, ()))
    _first_possible(files, fd, own, wanted)


def share(files: Files, fd: int, source: Access, *, writers_only: bool) -> None:
    """Let in to the side file `fd` those who may use the log, or, with `writers_only`, those who
    may write it.

    Whoever owns it: a log that root has opened once must stay one that its owner can open.
    """
    own = files.access(fd)
    mode = source.mode & 0o666
    if writers_only:
        mode = (mode & 0o222) | (mode & 0o222) << 1
    mode |= 0o600
    wanted = [Access(source.uid, source.gid, mode, tuple(source.of_acl()))]
    for uid, gid in ((own.uid, source.gid), (own.uid, own.gid)):
        narrowed = side_mode(source._replace(mode=mode), same_group=gid == source.gid, umask=0)
        wanted.append(Access(uid, gid, narrowed, ()))
    _first_possible(files, fd, own, wanted)


def _first_possible(files: Files, fd: int, own: Access, wanted: list[Access]) -> None:
    for access in wanted[:-1]:
        if access == own:
            return
        try:
            files.set_access(fd, access)
        except PermissionError:
            continue
        return
    if wanted[-1] != own:
        files.set_access(fd, wanted[-1])


def process_umask() -> int:
    """The umask of this process. Linux tells it; elsewhere it is exchanged for a stricter one for a
    moment.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
