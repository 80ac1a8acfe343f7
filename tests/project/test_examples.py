"""The examples run as they are, and say what they did."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers

import foldlog

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=os.environ | {"PYTHONDEVMODE": ""},  # asyncio would tell of each slow step
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_every_example_has_a_test():
    """By `run`, or, of a server, as the module that the server is given."""
    tested = re.findall(r'run\("(\w+)\.py"|"(\w+):\w+"', Path(__file__).read_text("utf-8"))
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {a or b for a, b in tested}


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
    assert lines[9:] == ["the display's subscription has ended"]


def test_an_embedded_store_survives_crashes():
    lines = run("embedded_survives_crashes.py")
    assert lines[0].startswith("12 crashes, ")
    assert lines[0].endswith("the store is running")
    assert lines[1:] == ["every confirmed batch is in the log, whole, and once"]


def test_feature_flags_web_answers_from_its_workers_what_the_writer_wrote():
    assert run("feature_flags_web.py") == [
        "before there is a log: None",
        "beta is 50% in each of 20 answers, dark is None",
        "beta is 100% in each of 20 answers, after a compaction",
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
        "changed: Put eu/4",
        "changed: Delete eu/1",
        "caught up: {'eu/2': b'10.0.0.2', 'eu/4': b'10.0.0.4'}",
        "refused: only its upstream writes to a mirror",
    ]


def test_plain_keys_needs_no_cursor(tmp_path):
    expected = ["theme is light", "['theme'] no font"]
    assert run("plain_keys.py") == expected
    assert run("plain_keys.py", tmp_path / "settings.log") == expected


def test_eight_readers_read_beside_a_feeder():
    assert run("eight_readers.py") == ["8 threads read, all right: True; at 200"]


def test_asyncio_feed_watches_and_waits_for_what_it_put():
    assert run("asyncio_feed.py") == ["price/0 is 100", "the follower has 6 keys; closed: b'yes'"]


def test_longest_prefix_routes_are_in_step_and_do_not_change_under_their_readers():
    assert run("longest_prefix_routes.py") == [
        "site default",
        "rack and before: site",
        "default at batch 3",
    ]


@contextlib.contextmanager
def served(command: list[str], log: Path, ready: str) -> Iterator[str]:
    """A server on loopback, until its probe answers; ended by SIGTERM, and its end is waited
    for."""
    port = servers.free_port()
    env = os.environ | {"FLAGS_LOG": str(log), "PYTHONPATH": str(EXAMPLES)}
    server = subprocess.Popen(
        [sys.executable, "-m", *(each.format(port=port) for each in command)],
        cwd=log.parent,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, server.stderr.read()
            with contextlib.suppress(OSError), urllib.request.urlopen(url + ready, timeout=5):
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield url
    finally:
        server.terminate()
        _, complaints = server.communicate(timeout=120)
        assert "Traceback" not in complaints, complaints


def fetched(url: str, method: str = "GET", body: bytes | None = None, **headers: str):
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_flags_over_sse_serves_and_pushes_over_real_http(tmp_path):
    pytest.importorskip("starlette")
    command = [
        *("uvicorn", "--factory", "flags_over_sse:create_app", "--port", "{port}"),
        *("--timeout-graceful-shutdown", "2"),
    ]
    with served(command, tmp_path / "flags.log", "/healthz") as url:
        assert json.loads(fetched(url + "/healthz")[2]) == {"status": "ready", "reasons": []}
        assert fetched(url + "/flags/beta")[0] == 404
        status, headers, _ = fetched(url + "/flags/beta", "PUT", b'{"percent": 5}')
        assert (status, headers["ETag"]) == (204, '"1"')
        with urllib.request.urlopen(url + "/events", timeout=60) as stream:
            lines = iter(stream)

            def event() -> tuple[str, dict]:
                kind = data = None
                for line in lines:
                    if line.startswith(b"event: "):
                        kind = line[7:].strip().decode()
                    elif line.startswith(b"data: "):
                        data = json.loads(line[6:])
                    elif line == b"\n":
                        return kind, data
                raise EOFError

            assert event() == ("flag", {"name": "beta", "flag": {"percent": 5}})
            assert event() == ("synced", {})
            tag = {"If-Match": '"1"'}
            assert fetched(url + "/flags/beta", "PUT", b'{"percent": 50}', **tag)[0] == 204
            assert event() == ("flag", {"name": "beta", "flag": {"percent": 50}})
            assert fetched(url + "/flags/beta", "PUT", b'{"percent": 1}', **tag)[0] == 412
            assert fetched(url + "/flags/beta", "PUT", b'{"percent": "x"}')[0] == 422
        assert fetched(url + "/flags/beta")[2] == b'{"percent": 50}'
    with foldlog.open(tmp_path / "flags.log") as store:
        assert store.report.sealed, "the server closed it as it ended"


def test_gunicorn_flags_are_followed_by_each_of_four_workers(tmp_path):
    log = tmp_path / "flags.log"
    with foldlog.open(log) as store:
        flags = foldlog.view(store, "json", "flags/")
        flags["flags/beta"] = {"percent": 5}
        command = ["gunicorn", "-w", "4", "-b", "127.0.0.1:{port}", "gunicorn_flags:app"]
        with served(command, log, "/healthz") as url:
            assert json.loads(fetched(url + "/beta")[2]) == {"percent": 5}
            assert fetched(url + "/dark")[0] == 404
            flags["flags/beta"] = {"percent": 100}
            deadline = time.monotonic() + 120
            right = 0
            while right < 20:  # in a row: each of the workers has seen it
                answer = json.loads(fetched(url + "/beta")[2])
                right = right + 1 if answer == {"percent": 100} else 0
                assert time.monotonic() < deadline
