"""What a power loss may leave of unsynced writes to files and unsynced changes to directories.

The model, after what journaling file systems promise and SQLite's and etcd's tests assume:

- What was synced stays. Of later writes to a file, each 512-byte sector may or may not have reached
  the disk, in any order and in any of the states it had; a sector that never reached the disk reads
  as zeros. The size may be any that the file had, or any multiple of 512 bytes in between.
- After a `sync` that failed, the sectors that it should have saved count as saved but are not: a
  later `sync` saves only what was written after the failed one. (The kernel marks pages clean
  whether or not they could be written.)
- Of the changes to a directory's names since its last `sync_dir`, the first few have happened, in
  order.

`CrashFiles` is a `Files` that carries out each call and records it; `images` lists what could be on
disk now.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from foldlog.storage.log.files import OS_FILES, Files

SECTOR = 512


class Image(NamedTuple):
    """The files that a power loss could leave under the root."""

    files: dict[str, bytes]
    """Content by relative path, with forward slashes."""
    folders: tuple[str, ...]
    """All directories except the root."""

    def write_to(self, directory: Path) -> None:
        """Write the files into `directory`, an existing, empty directory."""
        for name in self.folders:
            directory.joinpath(name).mkdir()
        for name, content in self.files.items():
            directory.joinpath(name).write_bytes(content)


class _File:
    """A file: its content, and every state since it was last synced."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.synced = content
        self.sizes: list[int] = [len(content)]
        self.history: list[bytes] = []  # after each change since the sync
        # Ranges that a failed sync did not save; a later sync will not, either.
        self._lost: list[tuple[int, int]] = []

    def changed(self, start: int, stop: int) -> None:
        """Record a change between two offsets."""
        self.history.append(bytes(self.content))
        self.sizes.append(len(self.content))
        first, last = start // SECTOR * SECTOR, -(-stop // SECTOR) * SECTOR
        self._lost = [
            part
            for low, high in self._lost
            for part in ((low, min(high, first)), (max(low, last), high))
        ]
        self._lost = [(low, high) for low, high in self._lost if low < high]

    def settle(self) -> None:
        """Record a sync."""
        saved = bytearray(self.content)
        for low, high in self._lost:
            old = self.synced[low:high].ljust(max(min(high, len(saved)) - low, 0), b"\0")
            saved[low:high] = old[: max(len(saved) - low, 0)]
        self.synced = bytes(saved)
        self.sizes, self.history = (
            [len(saved)],
            [] if saved == self.content else [bytes(self.content)],
        )

    def lose(self) -> None:
        """Record a failed sync."""
        for state in self.history:
            for at in range(0, max(len(state), len(self.synced)), SECTOR):
                if (
                    state[at : at + SECTOR] != self.synced[at : at + SECTOR]
                    and (at, at + SECTOR) not in self._lost
                ):
                    self._lost.append((at, at + SECTOR))

    def images(self, limit: int, chance: random.Random) -> list[bytes]:
        """What it may hold after a power loss: everything possible, or up to about `limit` random
        samples after the states it really had."""
        if not self.history:
            return [self.synced]
        plain = dict.fromkeys((self.synced, *self.history))
        sizes = sorted(
            {*self.sizes, *range(-(-min(self.sizes) // SECTOR) * SECTOR, max(self.sizes), SECTOR)}
        )
        sectors = [self._versions(at) for at in range(0, max(self.sizes), SECTOR)]
        if math.prod(map(len, sectors)) * len(sizes) <= limit:
            for size in sizes:
                for chosen in itertools.product(*sectors):
                    plain[b"".join(chosen)[:size]] = None
            return list(plain)
        states = (self.synced, *self.history)
        for number in range(4 * limit):
            if len(plain) >= limit:
                break
            if number % 2:
                image = b"".join(map(chance.choice, sectors))
            else:  # one state up to some sector, and another after it
                low, high = (chance.choice(states).ljust(max(self.sizes), b"\0") for _ in range(2))
                cut = chance.randrange(len(sectors) + 1) * SECTOR
                image = low[:cut] + high[cut:]
            plain[image[: chance.choice(self.sizes if number % 4 == 0 else sizes)]] = None
        return list(plain)

    def _versions(self, at: int) -> list[bytes]:
        """The states that the sector at `at` had, each padded with zeros to its full size."""
        states = (self.synced, *self.history)
        return list(dict.fromkeys(state[at : at + SECTOR].ljust(SECTOR, b"\0") for state in states))


class _Directory:
    """A directory: its names now, its names on disk, and the changes in between."""

    def __init__(self) -> None:
        self.names: dict[str, _File | _Directory] = {}
        self.synced: dict[str, _File | _Directory] = {}
        self.pending: list[dict[str, _File | _Directory | None]] = []

    def set(self, changes: dict[str, _File | _Directory | None]) -> None:
        _apply(self.names, changes)
        self.pending.append(changes)

    def settle(self) -> None:
        self.synced, self.pending = dict(self.names), []

    def versions(self) -> list[dict[str, _File | _Directory]]:
        """What it may hold after a power loss, oldest first."""
        versions = [dict(self.synced)]
        for changes in self.pending:
            versions.append(dict(versions[-1]))
            _apply(versions[-1], changes)
        return versions


def _apply(
    names: dict[str, _File | _Directory], changes: dict[str, _File | _Directory | None]
) -> None:
    for name, node in changes.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _one_at_a_time(method: _Method) -> _Method:
    """Make the call and its record atomic."""

    @functools.wraps(method)
    def locked(self: CrashFiles, *args: Any, **options: Any) -> Any:
        with self._lock:
            return method(self, *args, **options)

    return cast(_Method, locked)


class CrashFiles(Files):
    """Files under `root`. Every change is carried out by `inner` and recorded. Existing files count
    as synced.

    Any thread may call it; each image is of one moment. Changes made elsewhere (by another process,
    by `shutil`) are not recorded.
    """

    def __init__(self, root: Path, inner: Files = OS_FILES) -> None:
        self.root, self.inner = Path(root).resolve(), inner
        self.changes = 0
        """The number of changes and syncs so far: the points where a crash makes a difference."""
        self._top = self._scan(self.root)
        self._open: dict[int, _File] = {}
        self._lock = threading.RLock()

    def _scan(self, path: Path) -> _Directory:
        directory = _Directory()
        for entry in os.scandir(path):
            directory.names[entry.name] = (
                self._scan(Path(entry)) if entry.is_dir() else _File(Path(entry).read_bytes())
            )
        directory.settle()
        return directory

    def _place(self, path: Path) -> tuple[_Directory, str]:
        """The directory that holds `path`, and its name there."""
        directory = self._top
        *parents, name = Path(os.path.abspath(path)).relative_to(self.root).parts
        for parent in parents:
            below = directory.names[parent]
            assert isinstance(below, _Directory)
            directory = below
        return directory, name

    def images(self, limit: int = 64, seed: int = 0) -> Iterator[Image]:
        """What a power loss could leave now: every image, or about `limit` random ones, the same
        for the same seed.

        For each state of the directories, the image with only what was synced and the one with
        everything written are always included. There are no duplicates.
        """
        with self._lock:
            found = list(self._images(limit, seed))
        return iter(found)

    def _images(self, limit: int, seed: int) -> Iterator[Image]:
        chance = random.Random(seed)
        seen: set[tuple[tuple[str, bytes], ...]] = set()
        trees = list(_trees(self._top))
        if len(trees) > limit:
            trees = [trees[0], *chance.sample(trees[1:-1], max(limit - 2, 0)), trees[-1]]
        share = max(limit // len(trees), 2)
        for tree in trees:
            files = {name: node for name, node in tree.items() if isinstance(node, _File)}
            folders = tuple(
                sorted(name for name, node in tree.items() if isinstance(node, _Directory))
            )
            for contents in _combined(
                [file.images(limit, chance) for file in files.values()], share, chance
            ):
                image = Image(dict(zip(files, contents, strict=True)), folders)
                key = tuple(sorted(image.files.items()))
                if key not in seen:
                    seen.add(key)
                    yield image

    # The calls.

    @_one_at_a_time
    def open_read(self, path: Path) -> int:
        return self._opened(self.inner.open_read(path), path)

    @_one_at_a_time
    def open_side(self, path: Path, *, write: bool = False) -> int:
        return self._opened(self.inner.open_side(path, write=write), path)

    @_one_at_a_time
    def open_write(self, path: Path) -> int:
        return self._opened(self.inner.open_write(path), path)

    @_one_at_a_time
    def create(self, path: Path, *, exclusive: bool = False, mode: int = 0o666) -> int:
        fd = self.inner.create(path, exclusive=exclusive, mode=mode)
        directory, name = self._place(path)
        node = directory.names.get(name)
        if isinstance(node, _File):
            if node.content:
                stop = len(node.content)
                node.content.clear()
                node.changed(0, stop)
        else:
            node = _File()
            directory.set({name: node})
        self._open[fd] = node
        self.changes += 1
        return fd

    def _opened(self, fd: int, path: Path) -> int:
        if Path(os.path.abspath(path)).is_relative_to(self.root):
            directory, name = self._place(path)
            node = directory.names[name]
            assert isinstance(node, _File)
            self._open[fd] = node
        return fd

    @_one_at_a_time
    def close(self, fd: int) -> None:
        self._open.pop(fd, None)
        self.inner.close(fd)

    @_one_at_a_time
    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        count = self.inner.write(fd, data, offset)
        node = self._open[fd]
        if len(node.content) < offset:
            node.content.extend(bytes(offset - len(node.content)))
        node.content[offset : offset + count] = bytes(data[:count])
        node.changed(offset, offset + count)
        self.changes += 1
        return count

    @_one_at_a_time
    def truncate(self, fd: int, size: int) -> None:
        self.inner.truncate(fd, size)
        node = self._open[fd]
        del node.content[size:]
        node.content.extend(bytes(size - len(node.content)))
        node.changed(size, size)
        self.changes += 1

    @_one_at_a_time
    def sync(self, fd: int) -> None:
        self.inner.sync(fd)
        self._open[fd].settle()
        self.changes += 1

    @_one_at_a_time
    def sync_failed(self, fd: int) -> None:
        """Record that a `sync` of `fd` failed and was not carried out."""
        self._open[fd].lose()
        self.changes += 1

    @_one_at_a_time
    def sync_dir(self, path: Path, opened: int | None = None) -> None:
        self.inner.sync_dir(path, opened)
        node: _File | _Directory = self._top
        for part in Path(os.path.abspath(path)).relative_to(self.root).parts:
            assert isinstance(node, _Directory)
            node = node.names[part]
        assert isinstance(node, _Directory)
        node.settle()
        self.changes += 1

    @_one_at_a_time
    def replace(self, source: Path, dest: Path) -> None:
        self.inner.replace(source, dest)
        self._rename(source, dest)

    @_one_at_a_time
    def rename_new(self, source: Path, dest: Path) -> None:
        self.inner.rename_new(source, dest)
        self._rename(source, dest)

    def _rename(self, source: Path, dest: Path) -> None:
        (directory, name), (target, new_name) = self._place(source), self._place(dest)
        node = directory.names[name]
        if directory is target:
            directory.set({name: None, new_name: node})
        else:
            target.set({new_name: node})
            directory.set({name: None})
        self.changes += 1

    @_one_at_a_time
    def link_new(self, source: Path, dest: Path) -> None:
        self.inner.link_new(source, dest)
        directory, name = self._place(source)
        target, new_name = self._place(dest)
        target.set({new_name: directory.names[name]})
        self.changes += 1

    @_one_at_a_time
    def unlink(self, path: Path) -> None:
        self.inner.unlink(path)
        directory, name = self._place(path)
        directory.set({name: None})
        self.changes += 1

    @_one_at_a_time
    def make_dir(self, path: Path, mode: int = 0o777) -> None:
        self.inner.make_dir(path, mode)
        directory, name = self._place(path)
        directory.set({name: _Directory()})
        self.changes += 1


def _trees(directory: _Directory, prefix: str = "") -> Iterator[dict[str, _File | _Directory]]:
    """The trees that may be under `directory`: path -> file or directory."""
    for names in directory.versions():
        below: list[list[dict[str, _File | _Directory]]] = [
            list(_trees(node, f"{prefix}{name}/"))
            for name, node in names.items()
            if isinstance(node, _Directory)
        ]
        for parts in itertools.product(*below):
            tree = {prefix + name: node for name, node in names.items()}
            for part in parts:
                tree.update(part)
            yield tree


def _combined(
    choices: list[list[bytes]], limit: int, chance: random.Random
) -> Iterator[tuple[bytes, ...]]:
    """One item from each list: all combinations, or `limit` of them by chance, including the first
    and the last."""
    if math.prod(map(len, choices)) <= limit:
        yield from itertools.product(*choices)
        return
    yield tuple(choice[0] for choice in choices)
    yield tuple(choice[-1] for choice in choices)
    for _ in range(limit - 2):
        yield tuple(map(chance.choice, choices))
