"""A NATS server with one bucket, as much of it as a mirror asks for, that misbehaves as a test's
script says."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

Faults = Callable[[int, list[bytes]], list[bytes]]
"""Of a request for messages, counted over the life of the server, and the frames it would be
answered with: those it is."""


class FakeNats:
    """Serves `entries` as messages 1, 2, ... of the bucket b. Faults apply to the tail's requests,
    not to passes of the state."""

    def __init__(self, entries: dict[str, bytes], faults: Faults) -> None:
        self.entries, self._faults = entries, faults
        self.created = "2026-01-01T00:00:00Z"
        self.consumers_made = 0
        self.muted = False
        """No heartbeats, until somebody connects again."""
        self.drift = ""
        """Counts messages as pending that there are not: instead of telling a pass that it is over,
        it "refuses" its requests, or is "silent"."""
        self.refusals = 0
        """Requests of passes before one is served: the first stays open, the others are refused."""
        self._tail_requests = 0
        self._paused = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"nats://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> FakeNats:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                self.muted = False
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        info = {"server_id": "F", "version": "2.11.0", "headers": True, "max_payload": 1 << 20}
        sids: dict[str, str] = {}
        consumers: dict[str, Any] = {}
        beat = threading.Thread(target=self._beat, args=(connection, consumers), daemon=True)
        beat.start()
        with contextlib.suppress(OSError, ValueError):
            connection.sendall(f"INFO {json.dumps(info)}\r\n".encode())
            for command, body in _commands(connection):
                if command[0] == "PING":
                    connection.sendall(b"PONG\r\n")
                elif command[0] == "SUB":
                    sids[command[1]] = command[-1]
                elif command[0] in ("PUB", "HPUB") and len(command) >= 4:
                    subject, reply = command[1], command[2]
                    sid = next(
                        (s for p, s in sids.items() if reply.startswith(p.rstrip("*>"))), "1"
                    )
                    answer = self._answer(subject, reply, sid, body, consumers)
                    connection.sendall(b"".join(answer))

    def _beat(self, connection: socket.socket, consumers: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._paused.wait(0.1)
                for consumer in list(consumers.values()):
                    if "inbox" in consumer and not self.muted:
                        told = f"Nats-Last-Consumer: {consumer['delivered']}\r\n"
                        reply, sid = consumer["inbox"]
                        connection.sendall(status(reply, sid, "100 Idle Heartbeat", told))

    def _answer(
        self, subject: str, reply: str, sid: str, body: bytes, consumers: dict[str, Any]
    ) -> list[bytes]:
        last = len(self.entries)
        if ".STREAM.INFO." in subject:
            fields = {"created": self.created, "state": {"last_seq": last, "first_seq": 1}}
            return [_msg(reply, sid, json.dumps(fields).encode())]
        if ".STREAM.MSG.GET." in subject:
            fields = {"message": {"seq": json.loads(body)["seq"], "time": "1970-01-01T00:00:00Z"}}
            return [_msg(reply, sid, json.dumps(fields).encode())]
        name = subject.rpartition(".")[2]
        if ".CONSUMER.CREATE." in subject:
            config = json.loads(body)["config"]
            self.consumers_made += 1
            start = config.get("opt_start_seq", 1)
            consumers[name] = {"next": start, "delivered": 0}
            pending = max(last + 1 - start, 0)
            return [_msg(reply, sid, json.dumps({"num_pending": pending}).encode())]
        if ".CONSUMER.INFO." in subject:
            consumer = consumers[name]
            where = {"consumer_seq": consumer["delivered"], "stream_seq": consumer["next"] - 1}
            return [_msg(reply, sid, json.dumps({"delivered": where}).encode())]
        if ".CONSUMER.MSG.NEXT." not in subject or name not in consumers:
            return []
        request = json.loads(body)
        if request.get("no_wait") and self.refusals:
            self.refusals -= 1
            is_first = consumers[name].setdefault("open", reply) == reply
            return [] if is_first else [status(reply, sid, "408 Requests Pending")]
        frames = self._frames(sid, consumers[name], last, int(request["batch"]))
        if request.get("no_wait"):
            if not self.drift:
                return [*frames, status(reply, sid, "404 No Messages")]
            is_refused = self.drift == "refuses" and not frames
            return [status(reply, sid, "408 Requests Pending")] if is_refused else frames
        self._tail_requests += 1
        consumers[name]["inbox"] = reply, sid
        return self._faults(self._tail_requests, frames)

    def _frames(self, sid: str, consumer: dict[str, int], last: int, count: int) -> list[bytes]:
        frames = []
        for sequence in range(consumer["next"], min(last, consumer["next"] + count - 1) + 1):
            consumer["delivered"] += 1
            key = list(self.entries)[sequence - 1]
            ack = f"$JS.ACK.KV_b.c.1.{sequence}.{consumer['delivered']}.0.{last - sequence}"
            frames.append(_msg(f"$KV.b.{key} {sid} {ack}", "", self.entries[key]))
        consumer["next"] += len(frames)
        return frames


def _msg(subject: str, sid: str, body: bytes) -> bytes:
    header = f"MSG {subject} {sid}".rstrip()
    return f"{header} {len(body)}\r\n".encode() + body + b"\r\n"


def status(subject: str, sid: str, line: str, headers: str = "") -> bytes:
    """An answer without a message: `line` is the status, as "409 Consumer Deleted"."""
    raw = f"NATS/1.0 {line}\r\n{headers}\r\n".encode()
    return f"HMSG {subject} {sid} {len(raw)} {len(raw)}\r\n".encode() + raw + b"\r\n"


def _commands(connection: socket.socket) -> Iterator[tuple[list[str], bytes]]:
    with connection.makefile("rb") as lines:
        for line in lines:
            command = line.decode().split()
            body = b""
            if command and command[0] in ("PUB", "HPUB"):
                body = lines.read(int(command[-1]) + 2)[:-2]
            if command:
                yield command, body
