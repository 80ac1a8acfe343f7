"""Random histories of a bucket, with the server and the client dying in between: at rest, the
mirror is equal to the bucket.

    python tests/kits/histories.py --count 1000                    prints a line for each failure
    python tests/kits/histories.py --count 200 --cluster           in a cluster of three
    python tests/kits/histories.py --server /path/to/nats-server   of another version
    python tests/kits/histories.py --seed 1234 --count 1           one of them again

A history's seed decides everything but the timing. Exits with 1 if any was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from nats_cluster import Cluster, ClusterSource
from upstream_kit import NatsSource, opened, same, until

import foldlog
from foldlog.storage.log.files import Files

PATIENCE_S = 120.0
"""How long a mirror may take to be in step at the end: histories run beside other work."""
KEYS = [f"k.{number}" for number in range(12)]
STEPS = ("put", "put", "put", "delete", "purge", "forget", "purge all", "away", "back")
RARE = ("kill", "recreate", "restore", "kill client")
CLUSTER_STEPS = ("put", "put", "put", "delete", "purge", "forget", "away", "back")
CLUSTER_RARE = ("kill", "pause", "recreate")
VARIANTS = ("plain", "age", "limits", "message ttl", "slow store", "plain")
"""What else happens: all messages expire; only so many, or so many bytes, are kept; single messages
expire, with a marker; the disk is slow."""


class SlowFiles(Files):
    """Each write takes up to 30 ms."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        time.sleep(self._random.uniform(0, 0.03))
        return super().write(fd, data, offset)


class History:
    """One bucket and one mirror, and what happens to them."""

    def __init__(self, folder: Path, path: Path, seed: int, cluster: Cluster | None = None) -> None:
        self.random, self.path, self.folder = random.Random(seed), path, folder
        self.seed, self.variant = seed, VARIANTS[seed // 2 % len(VARIANTS)]
        config = {"history": 1 + seed % 2 * 2}
        if self.variant == "age":
            config["ttl"] = 1
        self.source: NatsSource = (
            NatsSource(folder, **config)
            if cluster is None
            else ClusterSource(cluster, f"b{seed}", **config)
        )
        self.configure()
        self.mirror: foldlog.Mirror | None = None
        self.copied = False
        self.turn = 0

    def configure(self) -> None:
        if self.variant == "limits":
            self.source.configure(discard="old", max_msgs=self.random.choice((5, 20)))
            self.source.configure(max_bytes=2000)
        elif self.variant == "message ttl":  # older servers refuse, and keep the message
            marker_ns = 1_000_000_000
            self.source.configure(allow_msg_ttl=True, subject_delete_marker_ttl=marker_ns)

    def step(self, name: str) -> None:
        source, key = self.source, self.random.choice(KEYS)
        self.turn += 1
        if name == "put":
            source.put_many(dict.fromkeys(self.random.sample(KEYS, 3), b"%d" % self.turn))
            if self.variant == "message ttl":
                with contextlib.suppress(Exception):
                    source.put_for(key, b"short-lived", 1)
        elif name in ("delete", "purge", "forget", "kill"):
            getattr(source, name)(*(() if name in ("forget", "kill") else (key,)))
        elif name == "purge all":
            source.api(f"STREAM.PURGE.KV_{source.bucket}")
        elif name == "recreate":
            source.recreate()
            self.configure()
        elif name == "restore":
            self.restore()
        elif name == "kill client":
            self.kill_client()
        elif name == "pause":
            assert isinstance(source, ClusterSource)
            with source.cluster.paused(source.leader()):
                source.put(key, b"%d" % self.turn)
        elif name == "away":
            self.leave()
        else:
            self.attach()

    def restore(self) -> None:
        """The first time, take a copy of the server's files; the next time, put it back."""
        source, files, copy = self.source, self.folder / "js", self.folder / "copy"
        source.disconnect()
        source.server.kill()
        if self.copied:
            shutil.rmtree(files)
            shutil.copytree(copy, files)
        else:
            shutil.copytree(files, copy)
            self.copied = True
        source.server.start()
        source.connect()

    def kill_client(self) -> None:
        """A mirror in a process of its own, killed at some moment."""
        self.leave()
        command = [str(Path(sys.executable).parent / "foldlog"), "mirror", str(self.path)]
        command += [f"{self.source.url}/{self.source.bucket}", "--quiet"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.random.uniform(0.2, 0.8))
        process.kill()
        process.wait()

    def leave(self) -> None:
        if self.mirror is not None:
            self.mirror.close()
            self.mirror = None

    def attach(self) -> None:
        if self.mirror is None:
            options = {"files": SlowFiles(self.seed)} if self.variant == "slow store" else {}
            upstream = self.source.upstream()
            self.mirror = foldlog.mirror(self.path, upstream, audit_interval_s=0.5, **options)

    def end(self) -> None:
        """At rest: in step, and equal."""
        self.attach()
        assert self.mirror is not None
        self.source.put("last", b"%d" % self.turn)
        until(
            lambda: same(self.mirror, self.source),  # type: ignore[arg-type]
            lambda: f"{self.mirror}: {self.mirror.stats().link}",  # type: ignore[union-attr]
            PATIENCE_S,
        )
        self.mirror.wait_synced(PATIENCE_S)
        assert self.mirror.verify().ok

    def close(self) -> None:
        self.leave()
        if isinstance(self.source, ClusterSource):
            self.source.drop()
        self.source.close()


def run(folder: Path, path: Path, seed: int, cluster: Cluster | None = None) -> str:
    """One history. AssertionError if the mirror is not equal at rest."""
    with opened(History(folder, path, seed, cluster)) as history:
        history.attach()
        common, rare = (STEPS, RARE) if cluster is None else (CLUSTER_STEPS, CLUSTER_RARE)
        steps = history.random.choices(common, k=10) + history.random.choices(rare, k=3)
        history.random.shuffle(steps)
        try:
            for name in steps:
                history.step(name)
            history.end()
        except BaseException as error:
            error.add_note(f"seed {seed}, {history.variant}: {', '.join(steps)}")
            raise
        return " ".join(steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--server", type=Path, help="a nats-server")
    options = parser.parse_args()
    if options.server is not None:
        os.environ["PATH"] = f"{options.server.resolve().parent}{os.pathsep}{os.environ['PATH']}"
    logging.disable(logging.CRITICAL)
    failed, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="foldlog-histories-") as scratch:
        cluster = Cluster(Path(scratch) / "cluster") if options.cluster else None
        for number, seed in enumerate(range(options.seed, options.seed + options.count), 1):
            folder = Path(scratch) / str(seed)
            folder.mkdir()
            try:
                run(folder / "nats", folder / "state.log", seed, cluster)
            except Exception:
                failed.append(seed)
                traceback.print_exc()
            shutil.rmtree(folder, ignore_errors=True)
            if number % (2 if options.cluster else 20) == 0 or number == options.count:
                took = time.monotonic() - began
                print(f"{number} histories, {len(failed)} wrong {failed}, {took:.0f} s", flush=True)
        if cluster is not None:
            cluster.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
