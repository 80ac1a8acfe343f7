"""Long work that must not stop the writer: the passes of a compaction, and exports."""

from __future__ import annotations

import time

from foldlog.actors.base.adapter import Inbox, Mail, Post, SupervisedActor, stop_only
from foldlog.actors.store.core import Core
from foldlog.actors.store.internal import CompactJob, ExportJob, LetGo, Rewritten
from foldlog.protocol.engine import Cancelled, Compaction, Snapshot
from foldlog.protocol.errors import FoldlogError, WriterCrashed
from foldlog.protocol.logger import log


def _let_others_run(done: int, total: int) -> None:
    """Yield the interpreter lock between leaves, rather than lose it after 5 ms."""
    time.sleep(0)


def _free(folds: list[Snapshot]) -> None:
    parts: list[object] = []
    while folds:
        parts += folds.pop().parts()
    while parts:
        parts.pop()
        time.sleep(0)


class Maintenance(SupervisedActor):
    """Runs compactions and exports, one at a time, from immutable folds."""

    def __init__(self, core: Core, post: Post, writer_inbox: Inbox) -> None:
        super().__init__("maintenance", post)
        self._core, self._step = core, core.config.step
        self._writer_inbox = writer_inbox
        self._handed_over: Compaction | None = None
        """During a job: the rewrite of which the writer was told, and which is the writer's now."""

    def on_start(self) -> None:
        self._step("maintenance.start")
        crashed = WriterCrashed("maintenance died while it worked on this")
        for mail in self.taken:
            if isinstance(mail.message, CompactJob):
                self._end_compaction(mail.message.rewrite, crashed)
            elif isinstance(mail.message, ExportJob):
                mail.message.fail(crashed)
        self.taken[:] = stop_only(self.taken)
        self._handed_over = None

    def _end_compaction(self, rewrite: Compaction, crashed: WriterCrashed) -> None:
        """After a crash. The file of a rewrite that was handed over is not touched."""
        if rewrite is not self._handed_over:
            rewrite.discard()
            self._tell_writer(Rewritten(rewrite, crashed))
        elif isinstance(rewrite.outcome, Rewritten):
            self._tell_writer(rewrite.outcome)  # again: the first may not have arrived

    def handle(self, mails: list[Mail]) -> None:
        job = mails[0].message
        if isinstance(job, CompactJob):
            self._compact(job.rewrite)
            del mails[:]  # first: a restart would discard what is the writer's
            self._handed_over = None  # or it would keep a replaced file open
        elif isinstance(job, ExportJob):
            self._export(job)
        elif isinstance(job, LetGo):
            _free(job.folds)
        else:
            log.error("maintenance cannot serve %s", type(job).__name__)

    def _compact(self, rewrite: Compaction) -> None:
        try:
            first = not rewrite.written
            if first:
                self._step("compact.write")
            rewrite.run(_let_others_run)
            if first:
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
            manifest = job.export(job.request.dest_dir, _let_others_run)
            self._step("export.written")
        except (OSError, FoldlogError, ValueError, TypeError) as error:
            job.fail(error)
        else:
            job.request.succeed(manifest)

    def _tell_writer(self, message: Rewritten) -> None:
        message.rewrite.outcome = message  # for a writer that waits for exactly this
        self._handed_over = message.rewrite
        if not self._writer_inbox.tell(message):  # nobody finishes it
            message.rewrite.cancelled = True
            message.rewrite.discard()

    def on_stop(self) -> None:
        self._step("maintenance.stop")
