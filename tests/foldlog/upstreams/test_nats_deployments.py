"""NATS as it is deployed: with TLS, permissions, domains, limits, and members that do not answer."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
import servers
from upstream_kit import NatsSource, mirrored, opened, same, until

import foldlog
from foldlog import LinkState
from foldlog.upstreams import Etcd, NatsKv, from_url, nats_connection, nats_pull

pytest.importorskip("nats", reason="nats-py is not installed: the extra `nats`")


# TLS.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with an authority, and a certificate of it for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificates, is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "extensions").write_text(  # all that Python 3.13 checks
        "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\nsubjectKeyIdentifier=hash\n"
        "authorityKeyIdentifier=keyid\nkeyUsage=digitalSignature,keyEncipherment\n"
    )
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca "
        "-addext keyUsage=critical,keyCertSign,cRLSign",
        "req -newkey rsa:2048 -nodes -keyout key.pem -out request -subj /CN=127.0.0.1",
        "x509 -req -in request -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -days 2 "
        "-extfile extensions",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def secured(certificates, tmp_path):
    """A bucket on a server that requires TLS."""
    files = f'cert_file: "{certificates}/cert.pem", key_file: "{certificates}/key.pem"'
    trusted = ssl.create_default_context(cafile=certificates / "ca.pem")
    source = NatsSource(
        tmp_path / "nats", server_config=f"tls {{ {files} }}\n", client={"tls": trusted}
    )
    with opened(source):
        yield source, trusted


def test_a_mirror_over_tls_keeps_up_and_comes_back(secured, path):
    source, trusted = secured
    source.put_many({f"k.{number}": b"v" * 500 for number in range(3000)})
    with mirrored(path, source.upstream(tls=trusted)) as mirror:
        assert len(mirror) == 3000
        source.kill()
        source.put("k.1", b"new")
        until(lambda: mirror.get("k.1").value == b"new")


@pytest.fixture
def no_timeout(monkeypatch):
    """Whoever waits for a timeout of the connection waits in vain."""
    monkeypatch.setattr(nats_connection, "CONNECT_S", 600.0)
    monkeypatch.setattr(nats_connection, "REQUEST_S", 600.0)
    monkeypatch.setattr(nats_pull, "SILENCE_S", 600.0)


def test_a_certificate_that_is_not_trusted_is_refused_at_once(secured, path, no_timeout):
    source, _ = secured
    with pytest.raises(foldlog.UpstreamRefused, match="certificate"):
        mirrored(path, source.upstream(tls=ssl.create_default_context()))


# Permissions, and what must not be shown.


@pytest.mark.parametrize(
    ("denied", "reason"),
    [
        ('publish: {deny: "$JS.API.STREAM.INFO.>"}', "stream.info"),
        ('publish: {deny: "$JS.API.CONSUMER.CREATE.>"}', "consumer.create"),
        ('publish: {deny: "$JS.API.CONSUMER.MSG.NEXT.>"}', "consumer.msg.next"),
        ('subscribe: {deny: "_INBOX.>"}', "_inbox"),
    ],
)
def test_a_permission_that_is_denied_is_told_at_once(tmp_path, path, denied, reason, no_timeout):
    """The server tells of it aside; the request itself is never answered. The link took that for a
    server that is lost, and tried for ever."""
    config = f"""authorization {{ users = [
        {{user: "admin", password: "a"}}
        {{user: "u", password: "s3cret", permissions: {{ {denied} }}}}
    ] }}
    """
    client = {"user": "admin", "password": "a"}
    with opened(NatsSource(tmp_path / "nats", server_config=config, client=client)) as source:
        source.put("k", b"1")
        with pytest.raises(foldlog.UpstreamRefused, match=r"(?i)permissions violation") as caught:
            mirrored(path, source.upstream(user="u", password="s3cret"))
        assert reason in str(caught.value).lower()


def test_the_permissions_on_the_page_about_fleets_are_all_that_a_mirror_needs(tmp_path, path):
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "fleet.md").read_text()
    (allowed,) = [block for block in page.split("```") if block.startswith("text\npublish:")]
    permissions = allowed.removeprefix("text\n").replace("KV_routes", "KV_b")
    config = f"""authorization {{ users = [
        {{user: "admin", password: "a"}}
        {{user: "u", password: "s3cret", permissions: {{ {permissions} }}}}
    ] }}
    """
    client = {"user": "admin", "password": "a"}
    with opened(NatsSource(tmp_path / "nats", server_config=config, client=client)) as source:
        source.put("k", b"1")
        for value in (b"2", b"3"):
            upstream = source.upstream(user="u", password="s3cret")
            with mirrored(path, upstream) as mirror:
                source.put("k", value)
                until(lambda: same(mirror, source))
                assert mirror.stats().link.attaches == 1
        until(lambda: source.consumers() == 0)


def test_a_client_that_may_not_delete_its_consumers_works_all_the_same(tmp_path, path):
    config = """authorization { users = [
        {user: "admin", password: "a"}
        {user: "u", password: "s3cret", permissions: {publish: {deny: "$JS.API.CONSUMER.DELETE.>"}}}
    ] }
    """
    client = {"user": "admin", "password": "a"}
    with opened(NatsSource(tmp_path / "nats", server_config=config, client=client)) as source:
        source.put("k", b"1")
        upstream = source.upstream(user="u", password="s3cret")
        with mirrored(path, upstream, audit_interval_s=0.01) as mirror:
            until(lambda: mirror.stats().link.audits > 2)
            source.put("k", b"2")
            until(lambda: same(mirror, source))
            assert mirror.stats().link.attaches == 1


@pytest.mark.parametrize(
    "url", ["nats://u:s3cret/x@h:4222", "nats://u:s3cret#x@h:4222", "nats://u:s3cret?x@h"]
)
def test_a_password_that_is_not_quoted_is_not_shown_by_the_error(url):
    """The port that was not a number was the password."""
    for make in (
        lambda: NatsKv(url, bucket="b"),
        lambda: Etcd(url.replace("nats", "http")),
        lambda: from_url(url),
    ):
        with pytest.raises(ValueError, match=r"an address is|bucket") as caught:
            make()
        assert "s3cret" not in str(caught.value)


# What a server sets, and what it stores.


def test_a_key_that_is_not_utf8_is_refused_by_name(tmp_path, path):
    """It ended nats-py's reading; the link heard silence, and tried for ever."""
    with opened(NatsSource(tmp_path / "nats")) as source:
        source.put("k", b"1")
        with socket.create_connection(("127.0.0.1", source.server.port)) as connection:
            connection.sendall(b'CONNECT {"verbose":false}\r\nPUB $KV.b.\xff 1\r\nv\r\nPING\r\n')
            with connection.makefile("rb") as lines:
                while not lines.readline().startswith(b"PONG"):
                    pass
        with pytest.raises(foldlog.UpstreamRefused, match=r"key b'\\xff' is not UTF-8"):
            mirrored(path, source.upstream())


def test_a_servers_limit_on_requests_is_kept(tmp_path, path):
    """Every request was refused, and the link tried for ever."""
    config = "jetstream { limits: { max_request_batch: 100 } }\n"
    with opened(NatsSource(tmp_path / "nats", server_config=config)) as source:
        source.put_many({f"k.{number}": b"" for number in range(1000)})
        with mirrored(path, source.upstream()) as mirror:
            assert len(mirror) == 1000
            source.put_many({f"k.{number}": b"x" for number in range(1000)})
            until(lambda: mirror.get("k.999").value == b"x")
            assert {entry.value for entry in mirror.range("")} == {b"x"}
            assert mirror.stats().link.attaches == 1


def test_requests_that_share_what_comes_do_not_run_dry(tmp_path, path, monkeypatch):
    """A server serves open requests in turn, not one after the other. Whoever counts otherwise
    believes at last that requests are open which are not, and hears silence."""
    from foldlog.upstreams import nats_pull

    monkeypatch.setattr(nats_pull, "REQUEST_MESSAGES", 10)
    monkeypatch.setattr(nats_pull, "EXPIRES_S", 0.05)
    monkeypatch.setattr(nats_pull, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(nats_pull, "SILENCE_S", 2.0)
    with (
        opened(NatsSource(tmp_path / "nats")) as source,
        mirrored(path, source.upstream()) as mirror,
    ):
        for turn in range(60):
            source.put_many({f"k.{number}": b"%d" % turn for number in range(turn % 17)})
            until(lambda: mirror.lag() == 0)
        source.put("last", b"1")
        until(lambda: same(mirror, source))
        assert mirror.stats().link.attaches == 1


# Domains.


def test_a_domain_is_reached_through_a_leaf_node(tmp_path, path):
    """The replies' subjects have other tokens in front; and the bucket of the same name in the leaf
    is another one."""
    leaf_port = servers.free_port()
    hub = servers.nats(
        tmp_path / "hub",
        config=f"jetstream {{ domain: hub }}\nleafnodes {{ listen: 127.0.0.1:{leaf_port} }}\n",
    )
    leaf_config = (
        "jetstream { domain: leaf }\n"
        f'leafnodes {{ remotes: [{{ url: "nats://127.0.0.1:{leaf_port}" }}] }}\n'
    )
    with (
        opened(NatsSource(tmp_path / "hub", server=hub.__enter__())) as there,
        opened(NatsSource(tmp_path / "leaf", server_config=leaf_config)) as here,
    ):
        try:
            there.put_many({f"k.{number}": b"hub" for number in range(50)})
            here.put("k.1", b"leaf")
            upstream = here.upstream(domain="hub")
            with mirrored(path, upstream) as mirror:
                assert same(mirror, there)
                there.put("k.1", b"new")
                until(lambda: same(mirror, there))
                there.delete("k.2")
                until(lambda: "k.2" not in mirror)
                assert mirror.stats().link.attaches <= 2  # the leaf may have come up later
            with foldlog.mirror(path, here.upstream(domain="leaf")) as mirror:
                until(lambda: mirror.link.state is LinkState.FAILED)
                assert "another upstream" in mirror.link.reason
        finally:
            with contextlib.suppress(Exception):
                hub.kill()
