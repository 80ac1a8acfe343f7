"""Who may use a file that foldlog creates: owner, group, mode and access list.

- A file that replaces the log gets the log's owner, group, mode, access list and `user.*`
  attributes. If it cannot, it does not replace the log: `keep_access`.
- The lock, the note and a torn copy belong to the log. They admit those whom the log admits, or
  fewer: `share`.
- A new log or artifact made from a log admits nobody whom that log keeps out: `narrow`. It admits
  fewer where the umask says so, or where the log's group or access list cannot be set.
- A new file is created for its owner alone, and access is set before anything is written to it.
"""

from __future__ import annotations

import os
from pathlib import Path

from foldlog.protocol.errors import LogAccessError, drop_system_errors
from foldlog.storage.log.files import ACL, Access, Files


def keep_access(files: Files, fd: int, access: Access, path: Path) -> None:
    """Give the new file `fd`, which is to replace `path`, the access that `path` has.

    LogAccessError if that is not permitted.
    """
    try:
        files.set_access(fd, access)
    except PermissionError as error:
        reason = (
            f"its replacement cannot be given owner {access.uid}, group {access.gid},"
            f" mode {access.mode:04o} and its other attributes ({error.strerror})"
        )
        raise LogAccessError(path, reason) from error


def side_mode(source: Access, *, same_group: bool, umask: int) -> int:
    """The widest mode, without an access list, that admits nobody whom `source` keeps out."""
    group, others = source.mode & 0o060 & ~umask, source.mode & 0o006 & ~umask
    if source.acl is not None:  # the group bits are a mask, and the list may deny anyone by name
        return 0o600
    if not same_group:  # members of the source's group now count as others
        return 0o600 | (others & source.mode >> 3)
    return 0o600 | group | others


def narrow(files: Files, fd: int, source: Access, *, directory: bool = False) -> None:
    """Let the new file or directory `fd`, a copy of what `source` protects, admit nobody else."""
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
    """Let those who may use the log use the side file `fd`; with `writers_only`, those who may
    write the log.

    Its owner becomes the log's owner, if permitted: after root has opened a log once, the log's
    owner must still be able to open it.
    """
    own = files.access(fd)
    mode = source.mode & 0o666
    if writers_only:
        mode = (mode & 0o222) | (mode & 0o222) << 1
    mode |= 0o600
    listed = tuple(item for item in source.attributes if item[0] == ACL)
    wanted = [Access(source.uid, source.gid, mode, listed)]
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
    """The umask of this process. Linux reports it; elsewhere a stricter one is set for a moment."""
    with (
        drop_system_errors(),
        open("/proc/self/status", encoding="ascii", errors="replace") as status,
    ):
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
