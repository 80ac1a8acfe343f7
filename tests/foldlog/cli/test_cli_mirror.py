"""`foldlog mirror`: a log that is kept a copy of an upstream."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import servers
from cli_kit import run
from upstream_kit import until

import foldlog


@pytest.fixture
def source(tmp_path):
    with foldlog.open(tmp_path / "a.log") as store:
        for number in range(5):
            store.put(f"k{number}", b"%d" % number)
        yield store


def entries(log: Path) -> dict[str, bytes]:
    with foldlog.follow(log) as follower:
        return dict(follower.snapshot().items())


def test_once_makes_an_exact_copy_deletes_included_and_ends(source, tmp_path):
    copy = tmp_path / "copy.log"
    for _ in range(2):
        result = run("mirror", copy, source.path, "--once")
        assert (result.exit_code, result.output.partition(",")[0]) == (0, "live")
        assert entries(copy) == dict(source.snapshot().items())
        source.delete("k3")


def test_a_prefix_selects(source, tmp_path):
    copy = tmp_path / "copy.log"
    assert run("mirror", copy, source.path, "--once", "--prefix", "k1").exit_code == 0
    assert entries(copy) == {"k1": b"1"}


def test_it_runs_until_it_is_told_to_end_and_ends_with_0(source, tmp_path):
    copy = tmp_path / "copy.log"
    command = [str(Path(sys.executable).parent / "foldlog"), "mirror", str(copy), str(source.path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stderr is not None
        until(lambda: "live" in process.stderr.readline())
        source.put("new", b"1")
        with foldlog.follow(copy) as follower:
            until(lambda: "new" in follower)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_once_ends_when_it_is_told_to_though_no_upstream_comes(tmp_path):
    """SIGTERM was ignored until the timeout."""
    copy, upstream = tmp_path / "copy.log", f"etcd://127.0.0.1:{servers.free_port()}/b/"
    command = [str(Path(sys.executable).parent / "foldlog"), "mirror", str(copy), upstream]
    process = subprocess.Popen([*command, "--once"], stderr=subprocess.PIPE, text=True)
    try:
        until(copy.exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.communicate()


def test_a_log_of_another_upstream_is_held_and_accepted_on_demand(source, tmp_path):
    copy = tmp_path / "copy.log"
    with foldlog.open(copy) as store:
        store.put("ours", b"")
    refused = run("mirror", copy, source.path, "--once")
    assert refused.exit_code == 1
    assert "fed by an unknown upstream" in refused.output
    assert entries(copy) == {"ours": b""}
    assert run("mirror", copy, source.path, "--once", "--accept-reset").exit_code == 0
    assert entries(copy) == dict(source.snapshot().items())


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\nsecret", b"s3cret\xff", b"x" * 4097])
def test_a_password_file_holds_a_password_in_its_first_line(source, tmp_path, content):
    """An empty one ended with an IndexError, and of one that is not UTF-8 a byte was shown."""
    (tmp_path / "password").write_bytes(content)
    arguments = ("--once", "--password-file", tmp_path / "password")
    result = run("mirror", tmp_path / "copy.log", "etcd://u@127.0.0.1:1/x", *arguments)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True)
    assert "--password-file" in result.output
    assert "0xff" not in result.output
    assert not (tmp_path / "copy.log").exists()


@pytest.mark.parametrize("upstream", ["etcd://127.0.0.1:1/x", "a.log"])
def test_an_option_of_another_kind_of_upstream_is_misuse(tmp_path, upstream):
    """It ended with a TypeError, or was ignored."""
    result = run("mirror", tmp_path / "copy.log", upstream, "--once", "--domain", "hub")
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True)
    assert "domain is no option of" in result.output
    assert not (tmp_path / "copy.log").exists()


@pytest.mark.parametrize("upstream", ["ftp://host/x", "nats://host:1/a.b", "nats://:4222/b"])
def test_what_is_no_upstream_is_misuse(tmp_path, upstream):
    result = run("mirror", tmp_path / "copy.log", upstream, "--once")
    assert result.exit_code == 2
    assert not (tmp_path / "copy.log").exists()


def test_an_upstream_that_does_not_come_ends_once_with_1(tmp_path):
    pytest.importorskip("nats")  # here, since it takes a while: the time is for the attempts
    address = f"nats://127.0.0.1:{servers.free_port()}/b"
    result = run("mirror", tmp_path / "copy.log", address, "--once", "--timeout", "2")
    assert result.exit_code == 1
    assert "cannot be reached" in result.output
