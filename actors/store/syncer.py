"""The syncer: syncs the log in the background, and checks its file."""

from __future__ import annotations

from watchdog.events import FileCreatedEvent, FileDeletedEvent, FileMovedEvent

from foldlog.actors.base.adapter import Inbox, Mail, Post, SupervisedActor, stop_only
from foldlog.actors.following.filewatch import FileWatch
from foldlog.actors.store.core import Core
from foldlog.actors.store.internal import CheckFile, Heal, Look
from foldlog.protocol.errors import FoldlogError, LogChangedError, LogPoisonedError
from foldlog.protocol.logger import log
from foldlog.storage.fold.snapshot import ClosedFold


class Syncer(SupervisedActor):
    """Beside the writer: syncs the log every interval, and checks that the file is still the
    store's.

    A log that was deleted, replaced or cut by another program is noticed at once where there are
    file events, within an interval elsewhere, and before each write in any case. The writer decides
    what to do about it.
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
            self._watch = FileWatch(self._core.config.path, kinds, lambda: self.inbox.tell(Look()))
            self._look()  # for changes before the watch began

    def handle(self, mails: list[Mail]) -> None:
        self._look()

    def on_tick(self) -> None:
        if self._watch is not None:
            self._watch.refresh()
        self._look()
        if self._core.config.sync == "interval":
            self._sync()

    def _look(self) -> None:
        """Check if the file seems to be another one. Only the writer can be certain, since it may
        be writing or renaming right now."""
        engine = self._core.engine
        if engine is None or engine.closed:
            return
        try:
            engine.check_file()
        except LogChangedError:
            self._writer_inbox.tell(CheckFile())
        except OSError as error:
            self._warn_once(f"{engine.path}: {error}")

    def _warn_once(self, text: str) -> None:
        """Log once what each tick may meet again."""
        if text != self._warned:
            log.warning("%s", text)
        self._warned = text

    def _sync(self) -> None:
        fold, engine = self._core.snapshot, self._core.engine
        if engine is None or isinstance(fold, ClosedFold) or fold.seq <= self._core.synced[0]:
            return
        self._step("syncer.sync")
        try:
            engine.sync()
        except (OSError, LogPoisonedError) as error:
            if engine.failure is None:
                raise
            self._warn_once(str(error))
            self._writer_inbox.tell(Heal())
        except FoldlogError:
            return  # closed meanwhile: its successor is synced on the next tick
        else:
            if not engine.closed:
                self._core.note_synced(fold, by_syncer=True)

    def on_stop(self) -> None:
        self.close_watch()
        self._step("syncer.stop")

    def close_watch(self) -> None:
        """Stop watchdog's threads."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
