"""Feature flags in a web service: one process writes; each worker follows and answers from memory.

In production, the writer is a separate program, and the service runs under any pre-fork server:

    FLAGS_LOG=flags.log gunicorn --workers 4 feature_flags_web:app

    GET /flags/NAME            the flag; 404 if there is none
    GET /flags/NAME?at=CURSOR  the same, no older than CURSOR: for a client that just changed it

To see it work, with three forked workers and a writer on one machine:

    python examples/feature_flags_web.py
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import foldlog
from foldlog import Delete, Put, RequestTimeout, WatchCursor

WORKERS = 3
FRESH_TIMEOUT_S = 5.0

_lock = threading.Lock()
_followers: dict[int, foldlog.Follower] = {}


def flags() -> foldlog.Follower:
    """This process's follower, opened on first use, so that each worker starts its own after the
    fork."""
    with _lock:
        if os.getpid() not in _followers:
            _followers.clear()
            _followers[os.getpid()] = foldlog.follow(os.environ["FLAGS_LOG"])
        return _followers[os.getpid()]


def app(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]
) -> Iterable[bytes]:
    """The WSGI application."""
    follower = flags()
    at = parse_qs(environ.get("QUERY_STRING", "")).get("at")
    if at:
        try:
            follower.wait_for(WatchCursor.from_u64(int(at[0])), FRESH_TIMEOUT_S)
        except RequestTimeout:
            return answer(start_response, "503 Service Unavailable", {"error": "not here yet"})
        except ValueError:
            return answer(start_response, "400 Bad Request", {"error": "at is a number"})
    snapshot = follower.snapshot()  # all of one answer is of one moment
    entry = snapshot.get(environ["PATH_INFO"].removeprefix("/"))
    if entry is None:
        return answer(start_response, "404 Not Found", {"error": "no such flag"})
    fields = {
        "value": entry.value.decode(),
        "cursor": snapshot.cursor().as_u64(),
        "worker": os.getpid(),
    }
    return answer(start_response, "200 OK", fields)


def answer(
    start_response: Callable[[str, list[tuple[str, str]]], Any], status: str, fields: dict[str, Any]
) -> Iterable[bytes]:
    body = json.dumps(fields).encode()
    start_response(
        status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    )
    return [body]


# The rest stands in for a pre-fork server and a client.


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def work(listener: socket.socket) -> None:
    """A worker: serves on the socket inherited from its parent, until it is killed."""
    server = WSGIServer(listener.getsockname()[:2], Quiet, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_name, server.server_port = listener.getsockname()[:2]
    server.setup_environ()
    server.set_app(app)
    server.serve_forever()


def ask(port: int, path: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as response:
            found: dict[str, Any] = json.load(response)
            return found
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 404:
                raise
            return None


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0), backlog=64) as listener,
    ):
        os.environ["FLAGS_LOG"] = str(Path(folder) / "flags.log")
        port = listener.getsockname()[1]
        workers = []
        for _ in range(WORKERS):
            pid = os.fork()
            if pid == 0:
                try:
                    work(listener)
                finally:
                    os._exit(0)
            workers.append(pid)
        try:
            play(port)
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)


def play(port: int) -> None:
    print("before there is a log:", ask(port, "flags/beta"))
    with foldlog.open(os.environ["FLAGS_LOG"]) as store:
        changes = [
            [Put("flags/beta", b"5%"), Put("flags/dark", b"on")],
            [Put("flags/beta", b"50%")],
            [Delete("flags/dark")],
        ]
        for number, updates in enumerate(changes, 1):
            store.apply(updates, WatchCursor.from_u64(number))
        found = [ask(port, "flags/beta?at=3") for _ in range(20)]
        assert all(one is not None and one["value"] == "50%" for one in found)
        print(f"beta is 50% in each of {len(found)} answers, dark is", ask(port, "flags/dark?at=3"))
        store.compact()
        store.apply([Put("flags/beta", b"100%")], WatchCursor.from_u64(4))
        found = [ask(port, "flags/beta?at=4") for _ in range(20)]
        assert all(
            one is not None and (one["value"], one["cursor"]) == ("100%", 4) for one in found
        )
        print(f"beta is 100% in each of {len(found)} answers, after a compaction")
    last = ask(port, "flags/beta")
    assert last is not None
    print("and without a writer:", last["value"])


if __name__ == "__main__":
    main()
