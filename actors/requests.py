"""What is asked of the writer, and the futures that the askers wait on.

A request is made on the caller's thread, checked and encoded there, and lives until its future is done: in the mailbox, or
in what the writer has taken. It carries what decides its fate after a crash: the sequence that it was written under.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, InvalidStateError
from typing import Any

from foldlog.actors.adapter import Mail, log, reply
from foldlog.protocol.errors import FoldlogError, KeyExists, VersionMismatch
from foldlog.protocol.messages import Apply, Compact, Export
from foldlog.protocol.options import UNSET, Unset
from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import VersionToken, WatchCursor
from foldlog.protocol.updates import Batch, Delete, Put, encode_batch
from foldlog.storage.fold.snapshot import FoldSnapshot


class Request:
    """Something asked of the writer. `future` always ends: with the answer, or with a typed error."""

    __slots__ = ("attempts", "created", "future", "weight")

    def __init__(self) -> None:
        self.future: Future[Any] = Future()
        self.created = time.monotonic()
        self.attempts = 0
        """Times that the writer died with it in hand."""
        self.weight = 0
        """Bytes that it holds, as the mailbox counts them."""

    def start(self) -> bool:
        """Whether to go on with it: False if its caller has withdrawn it. From here on it cannot be withdrawn."""
        future = self.future
        try:
            return future.running() or (not future.done() and future.set_running_or_notify_cancel())
        except RuntimeError:  # the supervisor, which gave up, and the writer, which was only stuck, came to it at once
            return future.running()

    def succeed(self, result: Any) -> None:
        """Answer it. One that has ended otherwise by now (the store gave up on a stuck writer) stays as it is."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(result)

    def fail(self, error: Exception | None) -> None:
        """End it with an error. One that was withdrawn stays so."""
        with contextlib.suppress(InvalidStateError):
            if self.start():
                self.future.set_exception(error or FoldlogError("was not served"))


class WriteRequest(Request):
    """A batch to be written; the future gives its sequence."""

    __slots__ = ("batch", "seq")

    def __init__(self, batch: Batch | None) -> None:
        super().__init__()
        self.batch = batch
        self.seq: int | None = None
        """The sequence that it was tried under: after a crash it tells whether the batch is in the log."""
        if batch is not None:
            self.weight = len(batch.item)

    def decide(self, fold: FoldSnapshot) -> Batch:
        """The batch to write on top of `fold`. Raises if it must not be written."""
        assert self.batch is not None
        return self.batch


class ToldBatch(WriteRequest):
    """An `Apply` that came as a message: the writer checks and encodes it."""

    __slots__ = ("_apply",)

    def __init__(self, apply: Apply) -> None:
        super().__init__(None)
        self._apply: Apply | None = apply

    def decide(self, fold: FoldSnapshot) -> Batch:
        if self.batch is None:
            apply, self._apply = self._apply, None
            if apply is None:  # an iterator may have lost some of them by now
                raise ValueError(
                    "the updates could not be read to their end, and are not read twice"
                )
            self.batch = encode_batch(apply.updates, apply.cursor)
        return self.batch


class LocalWrite(WriteRequest):
    """A write of a program that is its own source: its version is its sequence, the cursor stays where it is.

    Check and write are one step, since the writer decides, with everything before it folded.
    """

    __slots__ = ("_expected", "_key", "_must_be_new", "_value")

    def __init__(
        self,
        key: str,
        value: bytes | Unset,
        *,
        must_be_new: bool = False,
        expected: VersionToken | Unset = UNSET,
    ) -> None:
        """Put `value`, or delete if it is UNSET; only if the key is new, or at version `expected`."""
        update = Delete(key) if value is UNSET else Put(key, value)
        checked = encode_batch((update,), WatchCursor.none())  # to complain in the caller's thread
        if expected is not UNSET and type(expected) is not VersionToken:
            raise TypeError(f"expected is a VersionToken, not {type(expected).__name__}")
        super().__init__(None)
        self.weight = len(checked.item)
        self._key, self._value, self._must_be_new, self._expected = (
            key,
            value,
            must_be_new,
            expected,
        )

    def decide(self, fold: FoldSnapshot) -> Batch:
        if self._must_be_new or self._expected is not UNSET:
            entry = fold.get(self._key)
            if self._must_be_new and entry is not None:
                raise KeyExists(self._key, entry.version)
            if self._expected is not UNSET and (entry is None or entry.version != self._expected):
                raise VersionMismatch(
                    self._key, self._expected, None if entry is None else entry.version
                )
        version = VersionToken.from_u64(fold.seq + 1)
        update = (
            Delete(self._key, version)
            if self._value is UNSET
            else Put(self._key, self._value, version)
        )
        return encode_batch((update,), fold.cursor())


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
        super().__init__()
        self.dest_dir, self.format = dest_dir, format


def as_request(mail: Mail) -> Mail:
    """A message that a user's actor sent, as mail with the request that stands for it, which answers the asker."""
    message = mail.message
    request: Request
    if type(message) is Apply:
        request = ToldBatch(message)
    elif type(message) is Compact:
        request = CompactRequest()
    elif type(message) is Export:
        request = ExportRequest(message.dest_dir, message.format)
    else:
        return mail

    def answer(future: Future[Any]) -> None:
        error = future.exception()
        if mail.reply_to is not None:
            reply(
                mail,
                None if error else future.result(),
                error if isinstance(error, Exception) else None,
            )
        elif error is not None:
            log.error("%s was told to the writer and failed: %s", type(message).__name__, error)

    request.future.add_done_callback(answer)
    return Mail(request)
