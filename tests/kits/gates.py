"""A network that a test can cut: connections through gates, on loopback."""

from __future__ import annotations

import asyncio
import contextlib

from upstream_kit import Loop


class Gate:
    """Forwards connections to a port, while it is open."""

    def __init__(self, loop: Loop, target: int) -> None:
        self._loop, self._target = loop, target
        self._is_open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = loop.run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there: asyncio.StreamWriter | None = None
        self._writers.add(writer)
        try:
            if self._is_open:
                answers, there = await asyncio.open_connection("127.0.0.1", self._target)
                self._writers.add(there)
                await asyncio.gather(_pump(reader, there), _pump(answers, writer))
        except OSError:
            pass
        finally:
            for each in (writer, there):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort()

    def cut(self) -> None:
        """Break all connections, and let none through."""

        async def run() -> None:
            self._is_open = False
            for writer in list(self._writers):
                writer.transport.abort()

        self._loop.run(run())

    def mend(self) -> None:
        """Let connections through again."""
        self._is_open = True

    def close(self) -> None:
        self.cut()

        async def run() -> None:
            self._server.close()

        self._loop.run(run())


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()
