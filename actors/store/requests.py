"""What is asked of the writer, and the futures that the askers wait on.

A request is created, checked and encoded on the caller's thread, also when an actor sends it as a
message. It lives until its future is done: in the mailbox, or in what the writer has taken. It
carries what decides its fate after a crash: the sequence that it was written under.
"""

from __future__ import annotations

import time
from typing import Any

from pykka._envelope import Envelope
from pykka.messages import _ActorStop

from foldlog.actors.base.adapter import Inbox, Mail, reply
from foldlog.actors.base.answers import Answer
from foldlog.protocol.engine import Snapshot
from foldlog.protocol.errors import FoldlogError, KeyExists, VersionMismatch, check_forward
from foldlog.protocol.logger import log
from foldlog.protocol.messages import Apply, Compact, Export
from foldlog.protocol.options import FORMAT, UNSET, Unset
from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import VersionToken
from foldlog.protocol.updates import Batch, Delete, Put, checked_weight, encode_batch
from foldlog.storage.log.files import path_text


class Request:
    """Something asked of the writer. `future` always ends, with the answer or with a typed
    error."""

    __slots__ = ("asker", "attempts", "created", "future", "weight")

    def __init__(self) -> None:
        self.future: Answer[Any] = Answer()
        self.created = time.monotonic()
        self.attempts = 0
        """Times that the writer died with it in hand."""
        self.weight = 0
        """Bytes that it holds, as the mailbox counts them."""
        self.asker: Mail | None = None
        """The kind of message it came as, and where the reply goes, if an actor sent it. Without
        one to reply to, a failure is logged."""

    def start(self) -> bool:
        """True if work on it may begin; False if its caller has cancelled it. From here on it
        cannot be cancelled."""
        return self.future.start()

    def succeed(self, result: Any) -> None:
        """Answer it. One that has already ended (the store gave up on a stuck writer) is left as it
        is."""
        if self.future.finish(result) and self.asker is not None:
            reply(self.asker, result)

    def fail(self, error: Exception | None) -> None:
        """End it with an error. One that was cancelled stays cancelled."""
        error = error or FoldlogError("was not served")
        if self.future.finish(None, error) and self.asker is not None:
            _tell_failure(self.asker, error)

    def tell(self) -> None:
        """Pass the answer on again: whoever gave it may have been interrupted before that."""
        self.future.tell()
        if self.asker is not None and self.future.done():
            error = self.future.exception()
            reply(self.asker, None if error else self.future.result(), error)


def _tell_failure(asker: Mail, error: Exception) -> None:
    """Tell it to who sent the message; the log, if nobody waits."""
    if asker.reply_to is None:
        log.error("%s was told to the writer and failed: %s", asker.message, error)
    reply(asker, error=error)


class WriteRequest(Request):
    """A batch to be written; the future gives its sequence."""

    __slots__ = ("batch", "rewound", "seq")

    def __init__(self, batch: Batch | None, rewound: str = "", weight: int = 0) -> None:
        # Sets what `Request.__init__` sets: a call less for each write.
        self.future = Answer()
        self.created = time.monotonic()
        self.attempts = 0
        self.weight = weight if batch is None else len(batch.item)
        self.asker = None
        self.batch = batch
        self.rewound = rewound
        """Why watchers are told that the state went back; empty if it did not."""
        self.seq: int | None = None
        """The sequence it was tried under: after a crash, this tells whether the batch is in the
        log."""

    def decide(self, fold: Snapshot) -> Batch:
        """The batch to write on top of `fold`. Raises if it must not be written."""
        assert self.batch is not None
        return self.batch


class ForwardWrite(WriteRequest):
    """A batch whose cursor must not be before the last one: the writer decides, with everything
    before it folded."""

    __slots__ = ("_checked",)

    def __init__(self, batch: Batch) -> None:
        super().__init__(None, weight=len(batch.item))
        self._checked = batch

    def decide(self, fold: Snapshot) -> Batch:
        check_forward(self._checked.cursor, fold.cursor())
        return self._checked


def check_version(expected: object) -> None:
    """TypeError unless it is a VersionToken."""
    if type(expected) is not VersionToken:
        raise TypeError(f"expected is a VersionToken, not {type(expected).__name__}")


class LocalWrite(WriteRequest):
    """A write by a program that is its own source: its version is its sequence, and the cursor does
    not move.

    Check and write are one step, since the writer decides, with everything before it folded.
    """

    __slots__ = ("_expected", "_must_be_new", "_update")

    def __init__(
        self,
        update: Put | Delete,
        *,
        must_be_new: bool = False,
        expected: VersionToken | Unset = UNSET,
    ) -> None:
        """Only if the key is new, or at version `expected`."""
        weight = checked_weight(update)  # raises in the caller's thread
        if expected is not UNSET:
            check_version(expected)
        super().__init__(None, weight=weight)
        self._update, self._must_be_new, self._expected = update, must_be_new, expected

    def decide(self, fold: Snapshot) -> Batch:
        if self._must_be_new or self._expected is not UNSET:
            key = self._update.key
            entry = fold.get(key)
            if self._must_be_new and entry is not None:
                raise KeyExists(key, entry.version)
            if self._expected is not UNSET and (entry is None or entry.version != self._expected):
                raise VersionMismatch(key, self._expected, None if entry is None else entry.version)
        update = self._update._replace(version=VersionToken.from_u64(fold.seq + 1))
        return encode_batch((update,), fold.cursor(), fold.origin)


class SyncRequest(Request):
    """Make everything before this survive a power loss; the future gives None."""

    __slots__ = ()


class CompactRequest(Request):
    """Rewrite the log; the future gives None."""

    __slots__ = ("seq",)

    def __init__(self) -> None:
        super().__init__()
        self.seq: int | None = None
        """The last batch when it was taken: only a rewrite that holds this answers it."""


class ExportRequest(Request):
    """Export the fold; the future gives the ExportManifest."""

    __slots__ = ("dest_dir", "format")

    def __init__(self, dest_dir: str, format: FormatName | None = None) -> None:
        """TypeError or ValueError for what is no path or format. Here, on the caller's thread."""
        super().__init__()
        FORMAT.check(format)
        self.dest_dir, self.format = path_text(dest_dir), format


class WriterInbox(Inbox):
    """The writer's mailbox: a message becomes a request on its sender's thread, where it is
    checked, encoded and weighed."""

    def put(self, envelope: Envelope[Any] | Mail) -> None:
        """Called by actor references. An invalid message is an error for an asker, and a log line
        for a tell."""
        message, reply_to = envelope.message, envelope.reply_to
        if isinstance(message, _ActorStop):
            super().put(envelope)
            return
        asker = Mail(type(message).__name__, reply_to)
        try:
            request = as_request(message)
        except Exception as error:
            _tell_failure(asker, error)
            return
        request.asker = asker
        super().put(Mail(request, reply_to))


def as_request(message: Any) -> Request:
    """The request for a user's message. TypeError or ValueError if the message is invalid."""
    if type(message) is Apply:
        return WriteRequest(encode_batch(message.updates, message.cursor))
    if type(message) is Compact:
        return CompactRequest()
    if type(message) is Export:
        return ExportRequest(message.dest_dir, message.format)
    raise TypeError(f"the writer takes Apply, Compact and Export, not {type(message).__name__}")
