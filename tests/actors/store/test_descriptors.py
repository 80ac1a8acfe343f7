"""Few or no free descriptors at any step of a compaction, heal, restart, open; in a subprocess."""

from __future__ import annotations

from pathlib import Path

import pytest
from actor_kit import script

PRELUDE = """
    import gc, logging, os, resource, signal, sys, time
    import foldlog
    from foldlog import Put, WatchCursor
    from foldlog.testing import Fault, FaultyFiles
    logging.disable(logging.CRITICAL)
    folder, cases, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    files = FaultyFiles()
    die = []
    def step(name):
        if name == "writer.before_write" and die:
            raise die.pop()
    held = []
    def starve(free):
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        for _ in range(free):
            os.close(held.pop())
    def feed():
        while held:
            os.close(held.pop())
    def open_files():
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                found.append((name, os.readlink("/proc/self/fd/" + name)))
            except OSError:
                pass  # of the listing itself
        return found
    def at(number):
        return [Put("k%d" % number, b"v%d" % number)], WatchCursor.from_u64(number)
"""

EACH_CASE = """
    # Each case in a process of its own, all at once: they wait more than they work.
    children = {}
    for free in range(cases):
        sys.stdout.flush()
        children[free] = os.fork()
        if children[free] == 0:
            signal.alarm(100)  # it never outlives this test
            os.mkdir(os.path.join(folder, str(free)))
            try:
                case(os.path.join(folder, str(free), "state.log"), free)
                os._exit(0)
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
    for free, pid in children.items():
        if os.waitpid(pid, 0)[1] == 0:
            print("whole with", free)
"""

STORE = (
    PRELUDE
    + """
    def case(path, free):
        store = foldlog.open(path, files=files, step=step, sync="always")
        for number in range(1, 21):
            store.apply(*at(number))
        starve(free)
        if what == "heal":
            files.arm(Fault("sync"))
        elif what == "crash":
            die.append(RuntimeError("boom"))
        else:
            try:
                store.compact(20.0)
            except OSError as error:
                assert error.errno == 24, error
        answer = store.apply_async(*at(21))
        if what == "compact":
            assert answer.result(20.0) == 21  # an append needs none
            assert store.state == "running", store.state
        else:
            while not answer.done() and len(store.stats().restarts) < 4:  # several tries
                time.sleep(0.01)
        assert store.state != "failed", store.stats().reason
        feed()
        assert answer.result(20.0) == 21
        store.compact(20.0)
        assert len(store.snapshot()) == 21
        store.close()
        with foldlog.AppendLogSnapshot.open(path)[1] as snap:
            assert (len(snap), snap.cursor()) == (21, WatchCursor.from_u64(21))
        names = sorted(os.listdir(os.path.dirname(path)))
        assert not [name for name in names if "tmp" in name], names
"""
    + EACH_CASE
)

OPEN = (
    PRELUDE
    + """
    def case(path, free):
        with foldlog.AppendLogSnapshot.open(path, 1 << 40)[1] as snap:
            for number in range(1, 21):
                snap.apply(*at(number))
        snap = None
        before = open_files()
        starve(free)
        for opens in (lambda: foldlog.AppendLogSnapshot.open(path)[1], lambda: foldlog.open(path)):
            try:
                opened = opens()
            except OSError as error:
                assert error.errno == 24, error
            else:
                assert opened.get("k20").value == b"v20"
                opened.apply(*at(21))
                opened.close()
        feed()
        opened = None
        gc.collect()
        # watchdog keeps one inotify instance for the process
        leaked = [file for file in open_files() if file not in before and "inotify" not in file[1]]
        assert not leaked, leaked
        with foldlog.AppendLogSnapshot.open(path)[1] as snap:
            assert snap.get("k20").value == b"v20"
"""
    + EACH_CASE
)

WATCH = (
    PRELUDE
    + """
    from pathlib import Path
    from watchdog.events import FileModifiedEvent
    from foldlog.actors.following.filewatch import FileWatch
    def case(path, free):
        before = open_files()
        starve(free)
        watch = FileWatch(Path(path), [FileModifiedEvent], lambda: None)
        watch.stop()
        feed()
        leaked = [file for file in open_files() if file not in before]
        assert not leaked, leaked
"""
    + EACH_CASE
)


def whole_in_each(code: str, folder: Path, cases: int, what: str) -> None:
    """Run the code with 0 to `cases` - 1 free descriptors."""
    done = script(code, folder, cases, what, timeout_s=120.0)
    expected = "".join(f"whole with {free}\n" for free in range(cases))
    assert (done.stdout, done.stderr) == (expected, "")


@pytest.mark.parametrize("what", ["compact", "heal", "crash"])
def test_a_store_outlives_a_lack_of_descriptors(tmp_path: Path, what: str) -> None:
    """With two free, a compaction renamed the file but could not sync the directory.

    The store was FAILED for good.
    """
    whole_in_each(STORE, tmp_path, 5, what)


def test_opening_with_few_descriptors_opens_or_says_so_and_leaks_none(tmp_path: Path) -> None:
    whole_in_each(OPEN, tmp_path, 12, "open")


def test_asking_for_file_events_with_few_descriptors_leaks_none(tmp_path: Path) -> None:
    """watchdog failed half-way, with an inotify instance open for good; it was asked every 10 s."""
    whole_in_each(WATCH, tmp_path, 6, "watch")
