"""Readers: actors that serve Get, Range and RangePage messages from the published snapshot.

They share one mailbox, and whichever is free takes the next message. So a long range delays only
its own reader, and any reader's reference reaches all of them. They keep no state. So a crashed one
is replaced, and what it had in hand is tried once more.

An `ask` for one key costs less than waking a thread. So the asker's thread takes the turn of a
reader that is idle, as `SharedActor` explains. Ranges are left to the readers' own threads.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

from pykka._envelope import Envelope

from foldlog.actors.base.adapter import Inbox, Mail, Post, SharedActor, reply, stop_only
from foldlog.actors.store.core import Core, no_step
from foldlog.protocol.errors import FoldlogError, WriterCrashed
from foldlog.protocol.logger import log
from foldlog.protocol.messages import Get, Page, Range, RangePage, plain
from foldlog.protocol.options import Count
from foldlog.protocol.updates import KvEntry
from foldlog.storage.fold.reading import SnapshotReads

_LIMIT = Count("limit", 1000, 1)


class ReaderInbox(Inbox):
    """The mailbox of all readers of a store."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[Reader] = []

    def put(self, envelope: Envelope[Any] | Mail) -> None:
        """Called by actor references. Serves it on this thread, if it is for one key and a reader
        is idle. An invalid message is an error for an asker, and a log line for a tell."""
        reply_to = envelope.reply_to
        try:
            message = _checked(envelope.message)
        except Exception as error:
            _answer_error(Mail(None, reply_to), error)
            return
        if message is not envelope.message:
            envelope = Mail(message, reply_to)
        if reply_to is None or not self._is_served_here(Mail(message, reply_to)):
            super().put(envelope)

    def _is_served_here(self, mail: Mail) -> bool:
        for reader in self.readers:
            if not reader.turn:
                if type(mail.message) is Get:
                    return self._is_served_by(reader, mail)
            elif reader.is_in_turn():  # a signal handler, say: it would wait for itself
                reader.answer(mail)
                return True
        return False

    def _is_served_by(self, reader: Reader, mail: Mail) -> bool:
        try:
            return reader.work_in_turn(mail)
        except BaseException as error:
            for _ in self.readers:
                self.wake()  # each looks after its own turn
            if not reader.is_own_fault(error):
                raise
            return True  # the reader died of it, and answers when it restarts


class Reader(SharedActor):
    """See the module."""

    def __init__(self, core: Core, post: Post, inbox: ReaderInbox, number: int) -> None:
        super().__init__(f"reader-{number}", post, inbox)
        inbox.readers.append(self)
        step = core.config.step
        self._core, self._step = core, no_step if step is no_step else self.hooked(step)
        self._retried: Mail | None = None

    def on_start(self) -> None:
        self._step("reader.start")
        stops = stop_only(self.taken)
        for mail in self.taken:
            if mail in stops:
                continue
            if mail is self._retried:
                reply(mail, error=WriterCrashed("a reader died twice of this message"))
            else:
                self._retried = mail
                self.inbox.return_taken([mail])
        self.taken[:] = stops

    def handle(self, mails: list[Mail]) -> None:
        self._step("reader.handle")
        self.answer(mails[0])

    def answer(self, mail: Mail) -> None:
        """Answer it from the published snapshot."""
        try:
            value = self._answer(mail.message)
        except (FoldlogError, OSError, TypeError, ValueError) as error:
            _answer_error(mail, error)
        else:
            reply(mail, value)

    def _answer(self, message: Any) -> Any:
        snapshot = self._core.snapshot
        if type(message) is Get:
            return snapshot.get(message.key)
        if type(message) is Range:
            entries: list[KvEntry] = []
            for block in snapshot.blocks(message.prefix):
                entries += block
                time.sleep(0)  # yield the interpreter lock between leaves
            return entries
        if type(message) is RangePage:
            return _page(message, snapshot if message.snapshot is None else message.snapshot)
        raise TypeError(f"a reader takes Get, Range and RangePage, not {type(message).__name__}")

    def on_stop(self) -> None:
        self._step("reader.stop")


def _answer_error(mail: Mail, error: Exception) -> None:
    if mail.reply_to is None:
        log.error("a message told to a reader failed: %s", error)
    reply(mail, error=error)


def _checked(message: Any) -> Any:
    """The message with plain strings. TypeError or ValueError for what no reader could serve. On
    its sender's thread: see `plain`."""
    if type(message) is Get:
        key = message.key
        return message if type(key) is str else Get(_text("a key", key))
    if type(message) is Range:
        return Range(_text("a prefix", message.prefix))
    if type(message) is RangePage:
        prefix, limit, after, snapshot = message
        if snapshot is not None and not isinstance(snapshot, SnapshotReads):
            raise TypeError(f"snapshot is a FoldSnapshot, not {type(snapshot).__name__}")
        return RangePage(
            _text("a prefix", prefix),
            _LIMIT.check(limit),
            None if after is None else _text("after", after),
            snapshot,
        )
    return message


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is a str, not {type(value).__name__}")
    return plain(value)


def _page(ask: RangePage, snapshot: Any) -> Page:
    rest = snapshot.entries_after(ask.prefix, ask.after)
    entries = list(islice(rest, ask.limit))
    if next(rest, None) is None:
        return Page(entries, None)
    return Page(entries, ask._replace(after=entries[-1].key, snapshot=snapshot))
