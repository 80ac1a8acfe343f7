"""JSON over HTTP, as a gateway answers it: whole or in lines, in chunks or not, and broken."""

from __future__ import annotations

import asyncio
import json

import pytest

from foldlog.upstreams import http_json
from foldlog.upstreams.http_json import HttpError, post, stream


class Writer:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.sent, self.drained, self.closed = b"", 0, 0

    def write(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None:
        assert self.sent
        self.drained += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def writer(monkeypatch):
    """Of the connection that is made. What it is answered with: `writer.answer`."""
    writer = Writer()

    async def connect(host, port, ssl, limit):
        reader = asyncio.StreamReader(limit=limit)
        reader.feed_data(writer.answer)
        reader.feed_eof()
        return reader, writer

    monkeypatch.setattr(http_json.asyncio, "open_connection", connect)
    return writer


def answer(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> bytes:
    headers = headers or b"Content-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 " + status + b"\r\n" + headers + b"\r\n" + body


def chunks(*parts: bytes) -> bytes:
    body = b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))
    return answer(body, headers=b"TRANSFER-Encoding:  Chunked \r\n")


def asked(host="h", token=""):
    return asyncio.run(post(host, 2379, "/p", {"a": 1}, token, None))


def lines(count):
    """The first values of a streamed answer, and None at its end."""

    async def read():
        answered = await stream("h", 1, "/p", {}, "", None)
        try:
            return [await answered.next() for _ in range(count)]
        finally:
            answered.close()

    return asyncio.run(read())


@pytest.mark.parametrize(("host", "name"), [("h", b"h"), ("::1", b"[::1]")])
@pytest.mark.parametrize("token", ["", "secret"])
def test_a_request_says_where_it_goes_and_shows_its_token(writer, host, name, token):
    writer.answer = answer(b'{"b": 2}')
    assert asked(host, token) == {"b": 2}
    head, _, body = writer.sent.partition(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    assert first == b"POST /p HTTP/1.1"
    assert b"Host: " + name + b":2379" in fields
    authorizations = [field for field in fields if field.startswith(b"Authorization")]
    assert authorizations == ([b"Authorization: secret"] if token else [])
    assert b"Content-Length: %d" % len(body) in fields
    assert json.loads(body) == {"a": 1}
    assert (writer.drained, writer.closed) == (1, 1)


def test_a_body_ends_at_its_length_though_more_follows(writer):
    writer.answer = answer(b"[1]") + b"HTTP/1.1"
    assert asked() == [1]


def test_a_body_in_chunks_is_put_together(writer):
    writer.answer = chunks(b"[1,", b"2", b"]" + b" " * 20)
    assert asked() == [1, 2]


@pytest.mark.parametrize("parts", [(b"1\n2\n", b"3\n"), (b"1", b"\n2", b"\n3\n"), (b"1\n2\n3\n",)])
def test_a_streamed_answer_is_a_value_a_line_however_it_is_cut(writer, parts):
    writer.answer = chunks(*parts)
    assert lines(4) == [1, 2, 3, None]
    assert writer.closed == 1


def test_a_line_in_many_chunks_is_searched_once(writer):
    writer.answer = chunks(*[b'"' + b"x" * 9, *[b"x" * 10] * 50, b'"\n7\n'])
    assert lines(3) == ["x" * 509, 7, None]


def test_a_status_other_than_200_is_an_error_with_its_body(writer):
    writer.answer = answer(b'{"code": 5}', b"404 Not Found")
    with pytest.raises(HttpError, match="HTTP status 404") as caught:
        asked()
    assert caught.value.body == b'{"code": 5}'
    assert writer.closed == 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not HTTP"),
        (b"SSH-2.0\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 ok\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n", "not HTTP"),
        (answer(b"<html>"), "not JSON"),
        (answer(b"[" * 100_000), "not JSON"),
        (answer(b"{}", headers=b"Content-Length: two\r\n"), "not HTTP"),
        (answer(b"{}", headers=b"Content-Length: -1\r\n"), "not HTTP"),
        (answer(b"{}", headers=b"Content-Length: 3\r\n"), "broke off"),
        (answer(b"", headers=b"A: b\r\n"), "not JSON"),
        (answer(b"zz\r\n[1]\r\n0\r\n\r\n", headers=b"Transfer-Encoding: chunked\r\n"), "broke off"),
        (answer(b"9\r\n[1]", headers=b"Transfer-Encoding: chunked\r\n"), "broke off"),
        (chunks(b"[1]")[:-9], "broke off"),
    ],
)
def test_what_is_not_http_or_not_json_is_an_error(writer, raw, reason):
    writer.answer = raw
    with pytest.raises(HttpError, match=reason):
        asked()
    assert writer.closed == 1


@pytest.mark.parametrize("line", [b"x\n", b"\n", b"[" * 100_000 + b"\n"])
def test_a_line_that_is_not_json_is_an_error(writer, line):
    writer.answer = chunks(b"1\n" + line)
    with pytest.raises(HttpError, match="a line is not JSON"):
        lines(2)


@pytest.mark.parametrize(("size", "good"), [(10, True), (11, False)])
def test_a_line_without_end_is_an_error(writer, monkeypatch, size, good):
    monkeypatch.setattr(http_json, "MAX_LINE_BYTES", 10)
    writer.answer = chunks(b"1" * size, b"\n")
    if good:
        assert lines(1) == [int("1" * size)]
    else:
        with pytest.raises(HttpError, match="a line is too long"):
            lines(1)
