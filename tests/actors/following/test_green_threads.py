"""Programs with green threads: no file events are requested there; polling replaces them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}


@pytest.mark.parametrize("library", PATCHES)
def test_under_green_threads_polling_takes_over_and_close_is_prompt(
    path: Path, library: str
) -> None:
    """watchdog's thread died of an unseen TypeError, and each close waited 5 s for the other."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    program = """
        import sys, time, foldlog, logging
        from foldlog import Put, WatchCursor
        logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
        with foldlog.open(sys.argv[1]) as store, foldlog.follow(sys.argv[1], poll_interval_s=0.02) as follower:
            for number in range(1, 20):
                store.apply([Put("a", b"%d" % number)], WatchCursor.from_u64(number))
                follower.wait_for(WatchCursor.from_u64(number), 60)
            watch = follower.watch()
            while not isinstance(watch.next(60), foldlog.Synced):
                pass
            store.put("b", b"last")
            assert watch.next(60).update.key == "b", "found without a push from wait_for"
            began = time.monotonic()
        print("closed in", "time" if time.monotonic() - began < 4 else time.monotonic() - began)
    """
    script = f"{PATCHES[library]}\n{textwrap.dedent(program)}"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "closed in time", result.stdout
    assert f"the threads are those of {library}): polling only" in result.stdout
    assert result.stderr == ""
