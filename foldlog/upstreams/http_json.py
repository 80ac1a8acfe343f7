"""JSON over HTTP/1.1, as far as a gRPC gateway needs it: one POST per connection, answered as a
whole or as a stream of lines."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any

MAX_LINE_BYTES = 256 * 1024 * 1024
_LIMIT = 1024 * 1024


class HttpError(Exception):
    """The answer has a status other than 200, or is not valid HTTP or JSON."""

    def __init__(self, reason: str, body: bytes = b"", status: int = 0) -> None:
        super().__init__(reason)
        self.body, self.status = body, status


class Stream:
    """A streamed answer: one JSON value per line."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int | None
    ) -> None:
        self._reader, self._writer, self._rest = reader, writer, length
        self._buffer = bytearray()
        self._searched = 0

    async def next(self) -> Any:
        """The next value; None at the end. HttpError, OSError or EOFError."""
        while (at := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if self._searched > MAX_LINE_BYTES:
                raise HttpError("a line is too long")
            chunk = await self.chunk()
            if not chunk:
                return None
            self._buffer += chunk
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        self._searched = 0
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise HttpError("a line is not JSON") from None

    async def chunk(self) -> bytes:
        """The next bytes of the body; empty at its end."""
        try:
            if self._rest is not None:
                data = await self._reader.read(min(self._rest, _LIMIT))
                if self._rest and not data:
                    raise HttpError("the answer broke off")
                self._rest -= len(data)
                return data
            size = int((await self._reader.readline()).split(b";")[0] or b"0", 16)
            data = await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        except (ValueError, asyncio.IncompleteReadError, ConnectionError) as error:
            raise HttpError(f"the answer broke off: {error}") from None
        return data

    async def read(self) -> bytes:
        """The whole body."""
        parts = []
        while part := await self.chunk():
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


async def stream(
    host: str, port: int, path: str, body: object, token: str, tls: ssl.SSLContext | None
) -> Stream:
    """POST `body`, and return the answer as a stream. HttpError unless its status is 200; OSError
    if the connection fails."""
    reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=_LIMIT)
    try:
        data = json.dumps(body).encode()
        authorization = f"Authorization: {token}\r\n" if token else ""
        name = f"[{host}]" if ":" in host else host
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {name}:{port}\r\nContent-Type: application/json\r\n"
            f"{authorization}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
            + data
        )
        await writer.drain()
        status, headers = await _read_headers(reader)
        chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise HttpError("the answer is not HTTP")
        answer = Stream(reader, writer, None if chunked else int(length))
        if status != 200:
            raise HttpError(f"HTTP status {status}", await answer.read(), status)
    except BaseException:
        writer.close()
        raise
    return answer


async def post(
    host: str, port: int, path: str, body: object, token: str, tls: ssl.SSLContext | None
) -> Any:
    """POST `body`, and return the answer's JSON value. Errors as for `stream`."""
    answer = await stream(host, port, path, body, token, tls)
    try:
        return json.loads(await answer.read())
    except (ValueError, RecursionError):
        raise HttpError("the answer is not JSON") from None
    finally:
        answer.close()


async def _read_headers(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")
        status = int(first.split(" ", 2)[1])
    except (ValueError, IndexError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise HttpError("the answer is not HTTP") from None
    fields = (line.partition(":") for line in lines)
    return status, {name.strip().lower(): value.strip() for name, _, value in fields}
