"""What a power loss may leave: files that were written and not synced, names that were given and not synced.

The model, after what journaling file systems promise and SQLite's and etcd's tests assume:

- What `sync` was called for stays. Of what was written to a file since, each 512-byte sector may have reached the disk or
  not, in any order, in any of the states that it had; a sector that never was on disk reads as zeros. The size may be any that
  the file had, or any multiple of 512 bytes between two of them.
- Behind a `sync` that failed, the sectors that it should have saved count as saved, and are not: a later `sync` saves only what
  was written after it. (The kernel marks pages clean whether or not they could be written.)
- Of what was done to the names in a folder since its last `sync_dir`, a beginning has happened, in order.

`CrashFiles` is a `Files` that carries the calls out and keeps these books; `images` tells what could be there now.
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
    """The files that a power loss could leave, under the root."""

    files: dict[str, bytes]
    """Content by path, relative, with forward slashes."""
    folders: tuple[str, ...]
    """All folders but the root."""

    def write_to(self, folder: Path) -> None:
        """Put the files into `folder`, which exists and is empty."""
        for name in self.folders:
            folder.joinpath(name).mkdir()
        for name, content in self.files.items():
            folder.joinpath(name).write_bytes(content)


class _File:
    """A file: what it holds, and all that it was since it was synced."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.synced = content
        self.sizes: list[int] = [len(content)]
        self.history: list[bytes] = []  # after each change since the sync
        self._lost: list[
            tuple[int, int]
        ] = []  # stretches that a failed sync did not save, nor will a later one

    def changed(self, start: int, stop: int) -> None:
        """It was changed between two offsets."""
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
        """A sync was done."""
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
        """A sync has failed."""
        for state in self.history:
            for at in range(0, max(len(state), len(self.synced)), SECTOR):
                if (
                    state[at : at + SECTOR] != self.synced[at : at + SECTOR]
                    and (at, at + SECTOR) not in self._lost
                ):
                    self._lost.append((at, at + SECTOR))

    def images(self, limit: int, chance: random.Random) -> list[bytes]:
        """What it may hold after a power loss: all, or `limit` of them by chance, the plain ones first."""
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
            else:  # an older state up to some sector, a newer one behind it, or the other way round
                low, high = (chance.choice(states).ljust(max(self.sizes), b"\0") for _ in range(2))
                cut = chance.randrange(len(sectors) + 1) * SECTOR
                image = low[:cut] + high[cut:]
            plain[image[: chance.choice(self.sizes if number % 4 == 0 else sizes)]] = None
        return list(plain)

    def _versions(self, at: int) -> list[bytes]:
        """The states that the sector at `at` had, padded with zeros to its size."""
        states = (self.synced, *self.history)
        return list(dict.fromkeys(state[at : at + SECTOR].ljust(SECTOR, b"\0") for state in states))


class _Folder:
    """A folder: its names now, its names on disk, and what was done in between."""

    def __init__(self) -> None:
        self.names: dict[str, _File | _Folder] = {}
        self.synced: dict[str, _File | _Folder] = {}
        self.pending: list[dict[str, _File | _Folder | None]] = []

    def set(self, changes: dict[str, _File | _Folder | None]) -> None:
        _apply(self.names, changes)
        self.pending.append(changes)

    def settle(self) -> None:
        self.synced, self.pending = dict(self.names), []

    def versions(self) -> list[dict[str, _File | _Folder]]:
        """What it may be after a power loss, the oldest first."""
        versions = [dict(self.synced)]
        for changes in self.pending:
            versions.append(dict(versions[-1]))
            _apply(versions[-1], changes)
        return versions


def _apply(names: dict[str, _File | _Folder], changes: dict[str, _File | _Folder | None]) -> None:
    for name, node in changes.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _one_at_a_time(method: _Method) -> _Method:
    """The call and the entry in the books are one step."""

    @functools.wraps(method)
    def locked(self: CrashFiles, *args: Any, **options: Any) -> Any:
        with self._lock:
            return method(self, *args, **options)

    return cast(_Method, locked)


class CrashFiles(Files):
    """Files under `root` whose every change is carried out by `inner` and noted. What stands there now counts as synced.

    Any thread may call it; an image is of one moment. What does not go through it (another process, `shutil`) is not noticed.
    """

    def __init__(self, root: Path, inner: Files = OS_FILES) -> None:
        self.root, self.inner = Path(root).resolve(), inner
        self.changes = 0
        """Changes and syncs so far: the places where a crash makes a difference."""
        self._top = self._scan(self.root)
        self._open: dict[int, _File] = {}
        self._lock = threading.RLock()

    def _scan(self, path: Path) -> _Folder:
        folder = _Folder()
        for entry in os.scandir(path):
            folder.names[entry.name] = (
                self._scan(Path(entry)) if entry.is_dir() else _File(Path(entry).read_bytes())
            )
        folder.settle()
        return folder

    def _place(self, path: Path) -> tuple[_Folder, str]:
        """The folder that holds `path`, and the name there."""
        folder = self._top
        *parents, name = Path(os.path.abspath(path)).relative_to(self.root).parts
        for parent in parents:
            below = folder.names[parent]
            assert isinstance(below, _Folder)
            folder = below
        return folder, name

    def images(self, limit: int = 64, seed: int = 0) -> Iterator[Image]:
        """What a power loss at this moment could leave: all of it, or about `limit` images by chance, one seed the same.

        For each state of the folders, what was synced alone, and all that was written, always come. None comes twice.
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
                sorted(name for name, node in tree.items() if isinstance(node, _Folder))
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
        folder, name = self._place(path)
        node = folder.names.get(name)
        if isinstance(node, _File):
            if node.content:
                stop = len(node.content)
                node.content.clear()
                node.changed(0, stop)
        else:
            node = _File()
            folder.set({name: node})
        self._open[fd] = node
        self.changes += 1
        return fd

    def _opened(self, fd: int, path: Path) -> int:
        if Path(os.path.abspath(path)).is_relative_to(self.root):
            folder, name = self._place(path)
            node = folder.names[name]
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
        """Note that a `sync` of `fd` failed, and was not carried out."""
        self._open[fd].lose()
        self.changes += 1

    @_one_at_a_time
    def sync_dir(self, path: Path, opened: int | None = None) -> None:
        self.inner.sync_dir(path, opened)
        node: _File | _Folder = self._top
        for part in Path(os.path.abspath(path)).relative_to(self.root).parts:
            assert isinstance(node, _Folder)
            node = node.names[part]
        assert isinstance(node, _Folder)
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
        (folder, name), (target, new_name) = self._place(source), self._place(dest)
        node = folder.names[name]
        if folder is target:
            folder.set({name: None, new_name: node})
        else:
            target.set({new_name: node})
            folder.set({name: None})
        self.changes += 1

    @_one_at_a_time
    def link_new(self, source: Path, dest: Path) -> None:
        self.inner.link_new(source, dest)
        folder, name = self._place(source)
        target, new_name = self._place(dest)
        target.set({new_name: folder.names[name]})
        self.changes += 1

    @_one_at_a_time
    def unlink(self, path: Path) -> None:
        self.inner.unlink(path)
        folder, name = self._place(path)
        folder.set({name: None})
        self.changes += 1

    @_one_at_a_time
    def make_dir(self, path: Path, mode: int = 0o777) -> None:
        self.inner.make_dir(path, mode)
        folder, name = self._place(path)
        folder.set({name: _Folder()})
        self.changes += 1


def _trees(folder: _Folder, prefix: str = "") -> Iterator[dict[str, _File | _Folder]]:
    """The trees of names that `folder` may be the root of: paths and what stands there."""
    for names in folder.versions():
        below: list[list[dict[str, _File | _Folder]]] = [
            list(_trees(node, f"{prefix}{name}/"))
            for name, node in names.items()
            if isinstance(node, _Folder)
        ]
        for parts in itertools.product(*below):
            tree = {prefix + name: node for name, node in names.items()}
            for part in parts:
                tree.update(part)
            yield tree


def _combined(
    choices: list[list[bytes]], limit: int, chance: random.Random
) -> Iterator[tuple[bytes, ...]]:
    """One of each list, in all combinations; or `limit` by chance, of which the first and the last always."""
    if math.prod(map(len, choices)) <= limit:
        yield from itertools.product(*choices)
        return
    yield tuple(choice[0] for choice in choices)
    yield tuple(choice[-1] for choice in choices)
    for _ in range(limit - 2):
        yield tuple(map(chance.choice, choices))
