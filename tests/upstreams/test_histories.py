"""Random histories of a bucket, with the server and the client dying in between: at rest, the
mirror is equal to it.

A sample runs each time; `pytest -m slow -rP tests/upstreams` runs the campaign and prints its
counts.
"""

from __future__ import annotations

import random
import shutil
import time

import pytest
from upstream_kit import NatsSource, opened, same, until

import foldlog

CAMPAIGN_S = 240.0
KEYS = [f"k.{number}" for number in range(12)]
STEPS = ("put", "put", "put", "delete", "purge", "forget", "purge all", "away", "back")
RARE = ("kill", "recreate", "restore")


class History:
    """One bucket and one mirror, and what happens to them."""

    def __init__(self, folder, path, seed: int, history: int) -> None:
        self.random, self.path, self.folder = random.Random(seed), path, folder
        self.source = NatsSource(folder, history=history)
        self.mirror: foldlog.Mirror | None = None
        self.copied = False
        self.turn = 0
        self.ahead = 0

    def step(self, name: str) -> None:
        source, key = self.source, self.random.choice(KEYS)
        self.turn += 1
        if name == "put":
            source.put_many(dict.fromkeys(self.random.sample(KEYS, 3), b"%d" % self.turn))
        elif name in ("delete", "purge"):
            getattr(source, name)(key)
        elif name == "forget":
            source.forget()
        elif name == "purge all":
            source.loop.run(source.js.purge_stream(f"KV_{source.bucket}"))
        elif name == "recreate":
            source.recreate()
        elif name == "kill":
            source.kill()
        elif name == "restore":
            self.restore()
        elif name == "away":
            self.leave()
        else:
            self.attach()

    def restore(self) -> None:
        """The first time, take a copy of the server's files; the next time, put it back."""
        source, files, copy = self.source, self.folder / "js", self.folder / "copy"
        source.loop.run(source.client.close())
        source.server.kill()
        if self.copied:
            shutil.rmtree(files)
            shutil.copytree(copy, files)
        else:
            shutil.copytree(files, copy)
            self.copied = True
        source.server.start()
        source.connect()

    def leave(self) -> None:
        if self.mirror is not None:
            self.mirror.close()
            self.mirror = None

    def attach(self) -> None:
        if self.mirror is None:
            self.mirror = foldlog.mirror(self.path, self.source.upstream(), audit_interval_s=0.5)

    def end(self) -> None:
        """At rest: in step, and equal."""
        self.attach()
        assert self.mirror is not None
        self.source.put("last", b"%d" % self.turn)
        until(lambda: same(self.mirror, self.source), f"{self.mirror}: {self.mirror.stats().link}")
        self.mirror.wait_synced(30)
        assert self.mirror.verify().ok

    def close(self) -> None:
        self.leave()
        self.source.close()


def run(folder, path, seed: int) -> str:
    with opened(History(folder, path, seed, history=1 + seed % 2 * 2)) as history:
        history.attach()
        steps = history.random.choices(STEPS, k=10) + history.random.choices(RARE, k=3)
        history.random.shuffle(steps)
        for name in steps:
            history.step(name)
        history.end()
        return " ".join(steps)


def test_a_mirror_is_equal_to_its_bucket_after_a_random_history(tmp_path, path):
    run(tmp_path / "nats", path, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(CAMPAIGN_S + 60)
def test_a_mirror_is_equal_to_its_bucket_after_every_random_history(tmp_path):
    deadline, seed = time.monotonic() + CAMPAIGN_S, 100
    while time.monotonic() < deadline and seed < 1100:
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            run(folder / "nats", folder / "state.log", seed)
        except BaseException:
            print("seed", seed)
            raise
        shutil.rmtree(folder)
        seed += 1
    print(f"{seed - 100} random histories, 0 of them wrong at rest")
