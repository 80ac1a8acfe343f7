"""A server that loses, repeats and reorders messages, or ends requests for every reason: the mirror
lets go, and is exact."""

from __future__ import annotations

import pytest
from fake_nats import FakeNats, status
from upstream_kit import mirrored, until

import foldlog
from foldlog.upstreams import NatsKv

pytest.importorskip("nats", reason="nats-py is not installed: the extra `nats`")

ENTRIES = {f"k.{number}": b"%d" % number for number in range(8)}


def first(damage):
    """Faults that hit the first answer that brings messages to a tail, and none after it."""
    done = []

    def faults(number, frames):
        if done or not frames:
            return frames
        done.append(number)
        return damage(frames)

    return faults


DAMAGE = {
    "the first is lost": lambda frames: frames[1:],
    "one in the middle is lost": lambda frames: frames[:3] + frames[4:],
    "one is repeated": lambda frames: frames[:3] + frames[2:],
    "two are reordered": lambda frames: [frames[1], frames[0], *frames[2:]],
    "the last is lost, and a heartbeat tells of it": lambda frames: frames[:-1],
}
REASONS = [
    "409 Consumer Deleted",
    "409 Consumer is push based",
    "409 Leadership Change",
    "409 Server Shutdown",
    "409 Exceeded MaxRequestBatch of 1",
    "409 Exceeded MaxRequestExpires of 1ms",
    "409 Exceeded MaxRequestMaxBytes of 1",
    "409 Exceeded MaxWaiting",
    "409 Message Size Exceeds MaxBytes",
    "408 Request Timeout",
    "503 No Responders",
    "400 Bad Request",
]


def _status(frames, line, headers=""):
    sid = frames[0].split()[2].decode()
    return status("_INBOX.x.1", sid, line, headers)


def half_mirrored(path, server):
    """Make a mirror that holds the first 4 entries."""
    everything, server.entries = server.entries, dict(list(server.entries.items())[:4])
    with mirrored(path, NatsKv(server.url, bucket="b")) as mirror:
        assert len(mirror) == 4
    server.entries = everything


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_what_is_lost_repeated_or_reordered_is_noticed_and_read_again(path, damage):
    with FakeNats(ENTRIES, first(DAMAGE[damage])) as server:
        half_mirrored(path, server)
        with foldlog.mirror(path, NatsKv(server.url, bucket="b")) as mirror:
            until(lambda: mirror.cursor().as_u64() == 8)
            mirror.wait_synced(30)
            assert dict(mirror.snapshot().items()) == ENTRIES
            assert mirror.stats().link.attaches >= 2
            assert mirror.stats().link.resets == 0


@pytest.mark.parametrize("reason", REASONS)
def test_a_request_that_ends_for_any_reason_loses_nothing(path, reason):
    def cut(frames):
        return [*frames[:2], _status(frames, reason)]

    with FakeNats(ENTRIES, first(cut)) as server:
        half_mirrored(path, server)
        with foldlog.mirror(path, NatsKv(server.url, bucket="b")) as mirror:
            until(lambda: mirror.cursor().as_u64() == 8)
            assert dict(mirror.snapshot().items()) == ENTRIES


@pytest.mark.parametrize("drift", ["refuses", "silent"])
def test_a_pass_ends_though_the_server_counts_messages_that_there_are_not(path, monkeypatch, drift):
    """NATS 2.9 counted messages twice that were written during a pass. It then never said that
    nothing was pending, and the mirror asked again and again without end."""
    from foldlog.upstreams import nats_pull

    monkeypatch.setattr(nats_pull, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(nats_pull, "SILENCE_S", 1.0)
    with FakeNats(ENTRIES, first(lambda frames: frames)) as server:
        server.drift = drift
        with mirrored(path, NatsKv(server.url, bucket="b")) as mirror:
            assert dict(mirror.snapshot().items()) == ENTRIES


def test_a_pass_whose_requests_are_refused_for_a_while_is_complete_all_the_same(path):
    """What does not answer yet is not at its end."""
    with FakeNats(ENTRIES, first(lambda frames: frames)) as server:
        server.refusals, server.drift = 30, "refuses"
        with mirrored(path, NatsKv(server.url, bucket="b")) as mirror:
            assert server.refusals == 0
            assert dict(mirror.snapshot().items()) == ENTRIES
            assert mirror.stats().link.mended == 0


def test_a_server_that_falls_silent_is_let_go_of(path, monkeypatch):
    from foldlog.upstreams import nats_pull

    monkeypatch.setattr(nats_pull, "SILENCE_S", 0.2)

    def mute(frames):
        server.muted = True
        return []

    with FakeNats(ENTRIES, first(mute)) as server:
        half_mirrored(path, server)
        with foldlog.mirror(path, NatsKv(server.url, bucket="b")) as mirror:
            until(lambda: mirror.cursor().as_u64() == 8)
            assert mirror.stats().link.attaches >= 2
