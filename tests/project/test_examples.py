"""The examples run as they are, and say what they did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=os.environ | {"PYTHONDEVMODE": "0"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_every_example_has_a_test():
    tested = {
        "ten_lines.py",
        "threaded_service.py",
        "actors_by_message.py",
        "embedded_survives_crashes.py",
        "feature_flags_web.py",
        "cache_refresh_by_actor.py",
        "mirror_of_a_log.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_ten_lines_count_their_runs(tmp_path):
    assert run("ten_lines.py", tmp_path / "settings.log") == ["run 1"]
    assert run("ten_lines.py", tmp_path / "settings.log") == ["run 2"]


@pytest.mark.parametrize("given", [False, True], ids=["temporary log", "log of its own"])
def test_threaded_service_applies_and_serves(tmp_path, given):
    lines = run("threaded_service.py", *([tmp_path / "routes.log"] if given else []))
    assert lines == [
        "opened at WatchCursor('') with 0 entries",
        "applied 200 batches, up to WatchCursor.from_u64(200)",
        "served requests in 4 threads meanwhile",
        "compacted 20 entries",
    ]
    if given:
        assert run("threaded_service.py", tmp_path / "routes.log")[:2] == [
            "opened at WatchCursor.from_u64(200) with 20 entries",
            "applied 200 batches, up to WatchCursor.from_u64(400)",
        ]


def test_actors_by_message_read_write_and_are_told():
    lines = run("actors_by_message.py")
    assert lines[0] == "the display shows {'stock/apple': b'10', 'stock/pear': b'3'}"
    assert lines[1:7] == [
        "order 2: 4 apple: 6 left",
        "order 3: 2 pear: 1 left",
        "order 4: 2 pear: refused",
        "order 5: 5 apple: 1 left",
        "order 6: 1 plum: refused",
        "order 7: 1 pear: 0 left",
    ]
    assert lines[7] == "the display shows {'stock/apple': b'1', 'stock/pear': b'0'}"
    assert lines[8] == "orders: ['order/2', 'order/3'] and more"
    assert lines[9:] == ["the display was told that it is over"]


def test_an_embedded_store_survives_crashes():
    lines = run("embedded_survives_crashes.py")
    assert lines[0].startswith("12 crashes, ")
    assert lines[0].endswith("the store is running")
    assert lines[1:] == ["every confirmed batch is in the log, whole, and once"]


def test_feature_flags_web_answers_from_its_workers_what_the_writer_wrote():
    assert run("feature_flags_web.py") == [
        "before there is a log: None",
        "beta is 50% in each of 20 answers, dark is None",
        "beta is 100% in each of 20 answers, behind a compaction",
        "and without a writer: 100%",
    ]


def test_cache_refresh_by_actor_renders_again_what_changed_and_nothing_else():
    assert run("cache_refresh_by_actor.py") == [
        "in step with the store, 2 pages",
        "home: <h1>Home</h1> (1 rendered so far)",
        "about: <h1>About us</h1> (2 rendered so far)",
        "home: <h1>Home</h1> (2 rendered so far)",
        "about: <h1>About us</h1> (2 rendered so far)",
        "home is out of date since 2",
        "home: <h1>Welcome</h1> (3 rendered so far)",
        "about: <h1>About us</h1> (3 rendered so far)",
        "about is out of date since 3",
        "about: None (3 rendered so far)",
        "the store was closed; what is cached is still served",
        "home: <h1>Welcome</h1> (3 rendered so far)",
    ]


def test_mirror_of_a_log_is_exact_deletes_included():
    assert run("mirror_of_a_log.py") == [
        "synced: 3 routes, the link is live",
        "told: Put eu/4",
        "told: Delete eu/1",
        "while it was away: {'eu/2': b'10.0.0.2', 'eu/4': b'10.0.0.4'}",
        "refused: a mirror is written by its upstream",
    ]
