"""Work that takes long and must not stop the writer: the bulk of a compaction, exports, and background syncs."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from watchdog.events import FileCreatedEvent, FileDeletedEvent, FileMovedEvent

from foldlog.actors.adapter import Inbox, Mail, Post, SupervisedActor, log, stop_only
from foldlog.actors.core import Core
from foldlog.actors.filewatch import FileWatch
from foldlog.actors.requests import ExportRequest
from foldlog.protocol.errors import FoldlogError, LogChangedError, LogPoisonedError, WriterCrashed
from foldlog.protocol.store import FormatName
from foldlog.storage.artifacts.artifact import export_fold
from foldlog.storage.fold.snapshot import ClosedFold, FoldSnapshot, parts_of
from foldlog.storage.formats.rewrite import Cancelled, Rewrite


class CompactJob(NamedTuple):
    """The writer asks for the next pass of a compaction: the fold, or what came meanwhile. It is told `Rewritten`."""

    rewrite: Rewrite

    def fail(self, error: Exception | None) -> None:
        """It will not be served."""
        self.rewrite.cancelled = True
        self.rewrite.discard()


class ExportJob(NamedTuple):
    """The writer asks for an export of `fold`. The answer goes to the request's future."""

    request: ExportRequest
    fold: FoldSnapshot
    format: FormatName

    def fail(self, error: Exception | None) -> None:
        """It will not be served."""
        self.request.fail(error)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """To the writer: a pass of a compaction is done, or has failed."""

    urgent: ClassVar[bool] = True

    rewrite: Rewrite
    error: Exception | None

    def fail(self, error: Exception | None) -> None:
        """Nobody is left to finish it."""
        self.rewrite.discard()


class LetGo(NamedTuple):
    """The writer has no more use for these folds: freeing them takes long, and shall stop nobody."""

    folds: list[FoldSnapshot]
    """Emptied by maintenance."""


@dataclass(frozen=True, slots=True)
class Heal:
    """To the writer: a background fsync failed, so the fold is to be written to a new file."""

    urgent: ClassVar[bool] = True

    def fail(self, error: Exception | None) -> None:
        """Nobody is left to do it: the next to open the log will."""


@dataclass(frozen=True, slots=True)
class CheckFile:
    """To the writer: the log's file seems to have been changed by someone else."""

    urgent: ClassVar[bool] = True

    def fail(self, error: Exception | None) -> None:
        """Nobody is left to look."""


class Look(NamedTuple):
    """To the syncer: something happened to the name of the log."""


def _let_others_run(done: int, total: int) -> None:
    """Give the interpreter lock away between leaves, rather than have it taken away after 5 ms."""
    time.sleep(0)


def _free(folds: list[FoldSnapshot]) -> None:
    parts: list[object] = []
    while folds:
        parts += parts_of(folds.pop())
    while parts:
        parts.pop()
        time.sleep(0)


class Maintenance(SupervisedActor):
    """Runs compactions and exports, one at a time, from immutable folds."""

    def __init__(self, core: Core, post: Post) -> None:
        super().__init__("maintenance", post)
        self._core, self._step = core, core.config.step
        self.writer_inbox: Inbox | None = None

    def on_start(self) -> None:
        self._step("maintenance.start")
        crashed = WriterCrashed("maintenance died while it worked on this")
        for mail in self.taken:
            if isinstance(mail.message, CompactJob):
                mail.message.rewrite.discard()
                self._tell_writer(Rewritten(mail.message.rewrite, crashed))
            elif isinstance(mail.message, ExportJob):
                mail.message.fail(crashed)
        self.taken[:] = stop_only(self.taken)

    def handle(self, mails: list[Mail]) -> None:
        job = mails[0].message
        if isinstance(job, CompactJob):
            self._compact(job.rewrite)
        elif isinstance(job, ExportJob):
            self._export(job)
        elif isinstance(job, LetGo):
            _free(job.folds)
        else:
            log.error("maintenance cannot serve %s", type(job).__name__)

    def _compact(self, rewrite: Rewrite) -> None:
        try:
            if rewrite.written:
                rewrite.catch_up()
            else:
                self._step("compact.write")
                rewrite.write(_let_others_run)
                self._step("compact.written")
        except (OSError, FoldlogError, Cancelled) as error:
            rewrite.discard()
            rewrite.measure_live(_let_others_run)
            self._tell_writer(Rewritten(rewrite, error))
        else:
            self._tell_writer(Rewritten(rewrite, None))

    def _export(self, job: ExportJob) -> None:
        try:
            self._step("export.write")
            manifest = export_fold(
                job.fold,
                job.request.dest_dir,
                format=job.format,
                files=self._core.config.files,
                progress=_let_others_run,
            )
            self._step("export.written")
        except (OSError, FoldlogError, ValueError, TypeError) as error:
            job.fail(error)
        else:
            job.request.succeed(manifest)

    def _tell_writer(self, message: Rewritten) -> None:
        assert self.writer_inbox is not None
        message.rewrite.outcome = message  # for a writer that waits for just this
        try:
            self.writer_inbox.offer(Mail(message))
        except FoldlogError:  # the store failed or closes: nobody finishes it
            message.rewrite.cancelled = True
            message.rewrite.discard()

    def on_stop(self) -> None:
        self._step("maintenance.stop")


class Syncer(SupervisedActor):
    """Beside the writer: syncs the log every interval, and sees to it that the file is still the store's.

    A log that was deleted, replaced or cut by someone else is noticed at once where there are file events, within an
    interval elsewhere, and before each write in any case. The writer decides what to do about it.
    """

    def __init__(self, core: Core, post: Post, writer_inbox: Inbox) -> None:
        super().__init__("syncer", post)
        self.tick_s = core.config.sync_interval_s
        self._core, self._step = core, core.config.step
        self._writer_inbox = writer_inbox
        self._watch: FileWatch | None = None
        self._warned = ""

    def on_start(self) -> None:
        self._step("syncer.start")
        self.taken[:] = stop_only(self.taken)
        if self._watch is None:
            kinds = (FileDeletedEvent, FileMovedEvent, FileCreatedEvent)
            self._watch = FileWatch(
                self._core.config.path, kinds, lambda: self.inbox.offer(Mail(Look()))
            )
            self._look()  # what happened before there were events

    def handle(self, mails: list[Mail]) -> None:
        self._look()

    def on_tick(self) -> None:
        if self._watch is not None:
            self._watch.refresh()
        self._look()
        if self._core.config.sync == "interval":
            self._sync()

    def _look(self) -> None:
        """Whether the file seems another; only the writer knows for certain, since it may be writing or renaming just now."""
        journal = self._core.log
        if journal is None or journal.closed:
            return
        try:
            journal.check_unchanged()
        except LogChangedError:
            self._tell_writer(CheckFile())
        except OSError as error:
            self._warn_once(f"{journal.path}: {error}")

    def _tell_writer(self, message: Heal | CheckFile) -> None:
        with contextlib.suppress(FoldlogError):  # the store failed, or closes
            self._writer_inbox.offer(Mail(message))

    def _warn_once(self, text: str) -> None:
        """Log what each tick may meet again, once."""
        if text != self._warned:
            log.warning("%s", text)
        self._warned = text

    def _sync(self) -> None:
        fold, journal = self._core.snapshot, self._core.log
        if journal is None or isinstance(fold, ClosedFold) or fold.seq <= self._core.synced[0]:
            return
        self._step("syncer.sync")
        try:
            journal.sync()
        except LogPoisonedError as error:
            self._warn_once(str(error))
            self._tell_writer(Heal())
        except FoldlogError:
            return  # closed under us: its successor is synced on the next tick
        else:
            if not journal.closed:
                self._core.note_synced(fold, by_syncer=True)

    def on_stop(self) -> None:
        self.close_watch()
        self._step("syncer.stop")

    def close_watch(self) -> None:
        """Stop watchdog's threads."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
