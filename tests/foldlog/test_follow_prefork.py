"""A real pre-fork server: one process writes and is killed, four workers read from followers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, in_thread, results

from foldlog import AppendLogSnapshot, Put, WatchCursor

gunicorn = pytest.importorskip("gunicorn", reason="gunicorn does not run on this platform")

WORKERS = 4
CLIENTS = 2
KILLS = 3

SERVICE = """
    import json, os, foldlog

    follower = None
    served = 0

    def open_follower():
        global follower
        follower = foldlog.follow(os.environ["FOLLOWED_LOG"])

    def app(environ, start_response):
        global served
        served += 1
        snapshot = follower.snapshot()  # one for the whole response
        body = json.dumps({
            "pid": os.getpid(),
            "served": served,
            "state": str(follower.state),
            "cursor": snapshot.cursor().as_u64(),
            "twins": [entry.value.decode() for entry in snapshot.range("twin/")],
            "row": None if snapshot.cursor().is_none else snapshot.get(f"row/{snapshot.cursor().as_u64() % 20}").value.decode(),
            "newest": list(snapshot.keys("newest/")),
        }).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]
"""

CONFIG = """
    import os

    wsgi_app = "service:app"
    bind = "fd://" + os.environ["LISTEN_FD_OF_TEST"]
    workers = %d
    preload_app = True  # the program is loaded before the fork, as services do to save memory
    control_socket_disable = True

    def post_fork(server, worker):
        import service
        service.open_follower()

    def worker_exit(server, worker):
        import service
        if service.follower is not None:
            service.follower.close()
"""

WRITER = """
    import sys, foldlog
    from foldlog import Delete, Put, WatchCursor

    with foldlog.open(sys.argv[1], sync="never", compact_threshold=20_000) as store:
        number = store.cursor().as_u64() or 0
        while True:
            number += 1
            value = str(number).encode()
            store.apply(
                [Put("twin/a", value), Put("twin/b", value), Put(f"row/{number % 20}", value * 10),
                 Put(f"newest/{number}", b""), Delete(f"newest/{number - 1}")],
                WatchCursor.from_u64(number),
            )
            if number % 50 == 0:
                print(number, store.stats().compactions, flush=True)
"""


class Service:
    """gunicorn, with the program above."""

    def __init__(self, folder: Path, log: Path, *, preloaded: bool = False) -> None:
        service, config = textwrap.dedent(SERVICE), textwrap.dedent(CONFIG % WORKERS)
        if preloaded:
            service += "\nopen_follower()\n"
            config = config.replace("service.open_follower()", "pass")
        (folder / "service.py").write_text(service, encoding="utf-8")
        (folder / "gunicorn.conf.py").write_text(config, encoding="utf-8")
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        fd = self.listener.fileno()
        self.output = (folder / "gunicorn.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn"],
            cwd=folder,
            env={**os.environ, "FOLLOWED_LOG": str(log), "LISTEN_FD_OF_TEST": str(fd)},
            pass_fds=[fd],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def ask(self) -> dict[str, Any]:
        """One request, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request("GET", "/")
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, f"{response.status}: {body!r}\n{self.said()}"
            answer: dict[str, Any] = json.loads(body)
            return answer
        finally:
            connection.close()

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait(DEADLINE_S)
            self.listener.close()


@pytest.fixture
def service(tmp_path: Path, path: Path) -> Iterator[Service]:
    service = Service(tmp_path, path)
    yield service
    service.stop()
    service.output.close()


def test_a_follower_that_was_opened_before_the_fork_goes_on_in_each_worker(
    tmp_path: Path, path: Path
) -> None:
    """With preload_app, the follower opened before the fork: workers served old data for ever."""
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("newest/1", b""), Put("row/1", b"1")], WatchCursor.from_u64(1))
        service = Service(tmp_path, path, preloaded=True)
        try:
            assert service.ask()["newest"] == ["newest/1"]
            snap.apply([Put("newest/2", b""), Put("row/2", b"2")], WatchCursor.from_u64(2))
            pids: dict[int, int] = {}
            deadline = time.monotonic() + DEADLINE_S
            while len(pids) < WORKERS or set(pids.values()) != {2}:
                assert time.monotonic() < deadline, f"workers are at {pids}, the log at 2"
                answer = service.ask()
                assert answer["state"] == "following"
                pids[answer["pid"]] = answer["cursor"]
        finally:
            service.stop()
            said = service.said()
            service.output.close()
    assert service.process.returncode == 0, said
    assert "Traceback" not in said


def assert_consistent(answer: dict[str, Any]) -> None:
    """All of an answer is of one moment."""
    cursor = answer["cursor"]
    if cursor is None:
        assert (answer["twins"], answer["newest"]) == ([], [])
        return
    assert answer["twins"] == [str(cursor)] * 2
    assert answer["row"] == str(cursor) * 10
    assert answer["newest"] == [f"newest/{cursor}"]


def ask_until(service: Service, done: threading.Event) -> list[dict[str, Any]]:
    answers = []
    while not done.is_set():
        answers.append(service.ask())
        assert_consistent(answers[-1])
    return answers


def test_four_workers_serve_whole_states_and_never_an_older_one_while_the_writer_is_killed_and_compacts(
    service: Service, path: Path
):
    begun = time.monotonic()
    assert service.ask()["state"] == "waiting", "the workers are up before there is a log"
    done = threading.Event()
    clients = [in_thread(ask_until, service, done) for _ in range(CLIENTS)]
    compactions = 0
    try:
        for _ in range(KILLS):
            command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
                assert writer.stdout is not None
                lines, compacted = 0, 0
                while lines < 6 or compacted < 2:
                    line = writer.stdout.readline()
                    assert line, "the writer works"
                    assert not any(client.done() for client in clients), "and all clients"
                    lines, compacted = lines + 1, int(line.split()[1])
                compactions += compacted
                writer.send_signal(signal.SIGKILL)
    finally:
        done.set()
    answers = [answer for client in results(clients) for answer in client]
    with AppendLogSnapshot.open(path)[1] as snap:
        last = snap.cursor().as_u64()

    # Each worker comes to where the log ends, though nothing more is written.
    pids: dict[int, int] = {}
    deadline = time.monotonic() + DEADLINE_S
    while len(pids) < WORKERS or set(pids.values()) != {last}:
        assert time.monotonic() < deadline, f"workers stand at {pids}, the log at {last}"
        answer = service.ask()
        assert_consistent(answer)
        answers.append(answer)
        pids[answer["pid"]] = answer["cursor"]

    by_worker: dict[int, list[dict[str, Any]]] = {}
    for answer in answers:
        by_worker.setdefault(answer["pid"], []).append(answer)
    assert len(by_worker) == WORKERS, "no worker died"
    for of_one in by_worker.values():
        of_one.sort(key=lambda answer: answer["served"])
        cursors = [answer["cursor"] or 0 for answer in of_one]
        assert cursors == sorted(cursors), "never an older state than before on the same worker"
    assert {answer["state"] for answer in answers} <= {"waiting", "following"}
    assert len({answer["cursor"] for answer in answers}) > 20, "they saw the log move"
    assert compactions > KILLS
    print(
        f"{len(answers)} answers, {compactions} compactions, {KILLS} kills, "
        f"up to {last} in {time.monotonic() - begun:.1f} s"
    )

    service.stop()
    assert service.process.returncode == 0, service.said()
    for pid in by_worker:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert "Traceback" not in service.said()
    assert "Error" not in service.said()
