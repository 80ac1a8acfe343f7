"""The writer: owns the log and the newest fold, and serializes all changes to them.

It commits the mail that waits in its mailbox in groups. For each group it writes, then publishes,
then answers. Nothing is visible before it is written, and nothing is answered before it is visible.

Requests it has taken survive a crash of the writer. After a restart it replays the log and settles
each request by the sequence under which it was tried. A request in the log is answered as done. One
that is not in the log is tried once more, alone. If it crashes the writer again, it is answered
with WriterCrashed and the others continue.
"""

from __future__ import annotations

import copy
import time

from foldlog.actors.base.adapter import Inbox, Mail, Post, SharedActor
from foldlog.actors.base.memory import insist
from foldlog.actors.store.compactor import Compactor
from foldlog.actors.store.core import Core, no_step
from foldlog.actors.store.internal import CheckFile, ExportJob, Heal, Rewritten
from foldlog.actors.store.requests import (
    CompactRequest,
    ExportRequest,
    Request,
    SyncRequest,
    WriteRequest,
    WriterInbox,
)
from foldlog.protocol.engine import Engine, Seat, Snapshot, check_failure
from foldlog.protocol.errors import (
    Backpressure,
    FoldlogError,
    LogChangedError,
    LogPoisonedError,
    StoreClosed,
    WriterCrashed,
    is_own_fault,
)
from foldlog.protocol.frames import MAX_GROUP
from foldlog.protocol.logger import log
from foldlog.protocol.updates import Batch
from foldlog.storage.engines.options import EngineOptions
from foldlog.storage.engines.registry import SEATS

GROUP_BYTES = 16 * 1024 * 1024
"""The most that a commit group of several batches holds: it is built in memory before it is
written.

A group is also no larger than the compaction threshold, so that the log stays bounded."""
MIN_GROUP_BYTES = 1024 * 1024

TURN_BATCHES = 64
"""The most batches that a caller holding the turn writes for others before it gets its answer."""


def let_others_run() -> None:
    """Release the interpreter lock to the threads that wait for it now."""
    time.sleep(0)


def is_refusal(error: Exception) -> bool:
    """True if a request that raised this is answered with it; False if the writer dies of it."""
    return isinstance(error, (OSError, FoldlogError, TypeError, ValueError))


class Writer(SharedActor):
    """See the module."""

    group = (WriteRequest,)
    group_limit = MAX_GROUP
    tick_s = 1.0

    def __init__(self, core: Core, post: Post, inbox: WriterInbox, maintenance: Inbox) -> None:
        config = core.config
        super().__init__("writer", post, inbox)
        self._core = core
        self._step = no_step if config.step is no_step else self.hooked(config.step)
        self._maintenance = maintenance
        self._seat: Seat = SEATS[config.backend](
            EngineOptions(
                config.path,
                config.format,
                config.on_damage,
                config.sync == "always",
                config.cache_bytes,
                config.files,
            )
        )
        self._engine: Engine | None = None
        self._in_hand: list[Request] = []
        """Requests in progress: those of `taken` that a crash can be blamed on."""
        self._has_company = False
        """True under sync="always" while several callers write: they share fsyncs."""
        self._compactor = Compactor(core, self._step, maintenance, self._made_progress)
        self.stop_error: Exception | None = None
        """The error raised while sealing the log, if any."""

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "the writer has not started"
        return self._engine

    def _made_progress(self) -> None:
        """It waits for work that makes progress: it is not stuck."""
        self.busy_since = time.monotonic()

    # Starting and restarting.

    def on_start(self) -> None:
        self._step("writer.start")
        self._compactor.drop()
        crashed = self._engine
        if crashed is not None and crashed.failure is None and not crashed.closed:
            # Else the replay would start a new log.
            crashed.mark_deleted("was deleted while the writer was down")
        if crashed is None or crashed.failure is None:
            self._replay()
        if self.engine.failure is not None:
            self._heal()
        core, fold = self._core, self.engine.snapshot
        core.note_synced(fold)  # opening syncs what it finds
        core.engine, core.report = self.engine, self.engine.report
        core.feeds.past = self.engine
        core.publish(fold)
        # The crashed writer may have written some of it without publishing it.
        core.feeds.jump(fold, self._untold_rewind(fold.seq))
        self._settle_taken()
        self._compactor.begin_if_due()

    def _replay(self) -> None:
        """Rebuild the fold from the log. The log is the truth; a crashed writer's memory is not."""
        config = self._core.config
        engine = self._seat.open(self._engine)
        self._engine = engine
        if engine.report.cut_bytes:
            log.warning(
                "%s: cut %d bytes off: %s",
                config.path,
                engine.report.cut_bytes,
                engine.report.cut_reason,
            )
        if engine.report.missing_batches:
            log.warning(
                "%s: is a copy, taken while the log was written to: it lacks the last %d batches",
                config.path,
                engine.report.missing_batches,
            )

    def _heal(self) -> None:
        """After a failed fsync the old file can be neither trusted nor replayed. An append log
        writes the fold to a new file."""
        engine = self.engine
        log.warning("%s: healing the store: %s", engine.path, engine.failure)
        self._step("writer.heal")
        engine.heal()

    def _untold_rewind(self, seq: int) -> str:
        """Why the state went back in a batch up to `seq` that the crashed writer wrote, and of
        which it may have told nobody; "" if there is none."""
        for mail in self.taken:
            request = mail.message
            if isinstance(request, WriteRequest) and request.seq and request.seq <= seq:
                rewound, request.rewound = request.rewound, ""
                if rewound:
                    return rewound
        return ""

    def _settle_taken(self) -> None:
        """Give each request the crashed writer had in hand its true answer, or retry it."""
        again: list[Mail] = []
        in_hand = set(self._in_hand)
        for mail in self.taken:
            request = mail.message
            if not isinstance(request, Request):
                again.append(mail)
            elif request.future.done():
                request.tell()  # the turn may have ended before its callers were woken
                continue
            elif (
                isinstance(request, WriteRequest)
                and request.seq is not None
                and request.seq <= self.engine.snapshot.seq
            ):
                request.succeed(request.seq)
            elif request not in in_hand:
                again.append(mail)
            elif request.attempts:
                request.fail(
                    WriterCrashed("the writer died twice with this in hand; it was not applied")
                )
            else:
                request.attempts += 1
                again.append(mail)
            if isinstance(request, WriteRequest):
                request.seq = None
        self._in_hand = []
        self.taken[:] = again
        self.inbox.return_taken(self.taken)

    # Serving.

    def work_in_turn(self, mail: Mail) -> bool:
        """See `SharedActor`. While writes are held back for a compaction, the writer's own thread
        waits, so that each caller can keep its deadline. While several callers share
        fsyncs, none of them takes one for itself."""
        if self._has_company:
            return False
        if self._compactor.running is not None and self._compactor.holds_back(mail.weight):
            return False
        return SharedActor.work_in_turn(self, mail)  # half the time of `super`

    def work_for_others(self) -> None:
        """Serve a few batches that arrived while a caller had the turn. Under sync="always" they
        wait and form a larger group."""
        first = self.inbox.mails[0]
        if (
            self._core.config.sync == "always"
            or not isinstance(first.message, WriteRequest)
            or self._compactor.holds_back(GROUP_BYTES)
        ):
            return
        self.inbox.move(self.taken, self.group, TURN_BATCHES)
        self.handle(self.taken)
        self.taken.clear()

    def handle(self, mails: list[Mail]) -> None:
        first = mails[0].message
        if isinstance(first, WriteRequest):
            if self._has_company:
                self._take_along(mails)
            if len(mails) == 1:
                self._commit([first])
            else:
                self._apply([mail.message for mail in mails])
            self._compactor.begin_if_due()
            if self._core.config.sync == "always":
                self._has_company = len(mails) > 1 or self._write_waits()
        elif isinstance(first, CompactRequest):
            self._compactor.want(first)
        elif isinstance(first, SyncRequest):
            self._in_hand = [first]
            self._sync(first)
        elif isinstance(first, ExportRequest):
            self._in_hand = [first]
            self._step("export.begin")
            if first.start():
                self._begin_export(first)
        elif isinstance(first, Rewritten):
            self._compactor.pass_ended(first)
        elif isinstance(first, Heal):
            check_failure(self.engine)  # the restart heals
        elif isinstance(first, CheckFile):
            self._check_file()
        self._in_hand = []

    def _take_along(self, mails: list[Mail]) -> None:
        """Let the callers that the last turn answered write again, and add their mail to `mails`.

        Otherwise whoever comes back first is synced alone, or those who come back during an fsync
        form the next group, and each fsync serves half of the callers. Cost: releases the
        interpreter lock once.
        """
        let_others_run()
        if not self._compactor.holds_back(GROUP_BYTES):
            self.inbox.move(mails, self.group, self.group_limit)

    def _write_waits(self) -> bool:
        """True if the next mail is a write."""
        try:
            return isinstance(self.inbox.mails[0].message, WriteRequest)
        except IndexError:
            return False

    def _sync(self, request: SyncRequest) -> None:
        """Sync the log. If the disk refuses, a restart heals the log and the sync is retried
        once."""
        core, fold = self._core, self.engine.snapshot
        if core.synced[0] < fold.seq:
            self.engine.sync()
            core.note_synced(fold)
        if request.start():
            request.succeed(None)

    def _begin_export(self, request: ExportRequest) -> None:
        try:
            export = self.engine.begin_export(request.format)
        except (OSError, FoldlogError, ValueError) as error:
            request.fail(error)
        else:
            self._maintenance.put(Mail(ExportJob(request, export)))

    def _apply(self, requests: list[WriteRequest]) -> None:
        """Commit the requests in groups. One that was in hand at a crash is committed alone, so
        that it cannot harm another again."""
        group: list[WriteRequest] = []
        size = 0
        most = min(GROUP_BYTES, max(self._core.config.compact_threshold, MIN_GROUP_BYTES))
        for request in requests:
            if request.attempts or size + request.weight > most:
                self._commit(group)
                group, size = [], 0
            group.append(request)
            size += request.weight
            if request.attempts:
                self._commit(group)
                group, size = [], 0
        self._commit(group)

    def _commit(self, requests: list[WriteRequest]) -> None:
        """Write the requests as one group, or as several where a refusal depends on a write."""
        while requests:
            size, compactor = requests[0].weight, self._compactor
            if len(requests) > 1:
                size = sum([request.weight for request in requests])
            if compactor.running is not None:
                compactor.hold_back(size)
            if compactor.failures and compactor.is_log_full(size):
                self._refuse(requests)
                return
            if len(requests) == 1:
                self._commit_alone(requests[0])
                return
            requests = self._commit_up_to_a_refusal(requests)

    def _commit_alone(self, request: WriteRequest) -> None:
        self._in_hand = [request]
        if not request.future.start():
            return
        engine, batch = self._engine, request.batch
        assert engine is not None
        if batch is None:
            try:
                batch = request.decide(engine.snapshot)
            except Exception as error:
                if not is_refusal(error):
                    raise
                request.fail(error)
                return
        request.seq = engine.snapshot.seq + 1
        self._write(engine, [request], [batch])

    def _commit_up_to_a_refusal(self, requests: list[WriteRequest]) -> list[WriteRequest]:
        """Write the requests as one group. Returns those still to be decided.

        Only written and published state may refuse a request. So a request that the group's earlier
        batches would refuse ends the group, and is decided again once the group is published.
        """
        engine = self.engine
        self._in_hand = [*requests]
        undecided: list[WriteRequest] = []
        staged, folded = engine.snapshot, 0  # with the first `folded` batches applied
        written: list[WriteRequest] = []
        batches: list[Batch] = []
        for number, request in enumerate(requests):
            if not request.start():
                continue
            if request.batch is None and folded < len(batches):  # it decides by what is folded
                staged, folded = engine.stage(batches[folded:], staged), len(batches)
            try:
                batch = request.decide(staged)
            except Exception as error:
                if not is_refusal(error):
                    raise
                if batches:
                    undecided = requests[number:]
                    self._in_hand = [*requests[:number]]
                    break
                request.fail(error)
                continue
            written.append(request)
            batches.append(batch)
            request.seq = engine.snapshot.seq + len(batches)
        if not batches:
            return undecided
        if folded and folded < len(batches):
            staged = engine.stage(batches[folded:], staged)
        self._write(engine, written, batches, staged if folded else None)
        return undecided

    def _write(
        self,
        engine: Engine,
        requests: list[WriteRequest],
        batches: list[Batch],
        staged: Snapshot | None = None,
    ) -> None:
        """Write, publish and answer one commit group: the batches of the requests."""
        core, step = self._core, self._step
        if step is not no_step:
            step("writer.before_write")
        try:
            fold = engine.commit(batches, staged)
        except (OSError, FoldlogError) as error:
            if not is_own_fault(error):
                raise  # it struck the thread, perhaps after the write: the restart settles it
            self._write_failed(requests, error)
            return
        if step is not no_step:
            step("writer.after_write")
        now = core.publish(fold)
        if core.config.sync == "always":
            core.note_synced(fold)
        rewound = requests[0].rewound
        if len(requests) > 1:
            rewound = next((request.rewound for request in requests if request.rewound), "")
        if rewound:
            core.feeds.jump(fold, rewound)
            for request in requests:
                request.rewound = ""  # told: a restart does not tell it again
        else:
            core.feeds.publish(fold, fold.seq - len(batches) + 1, batches)
        if step is not no_step:
            step("writer.after_publish")
        if len(requests) == 1:
            request = requests[0]
            core.statistics.note_group((now - request.created,))
            request.succeed(request.seq)
            return
        core.statistics.note_group([now - request.created for request in requests])
        for request in requests:
            request.succeed(request.seq)

    def _write_failed(self, requests: list[WriteRequest], error: OSError | FoldlogError) -> None:
        """Nothing of the group is in the log: tell its callers. Raises what this writer cannot
        recover from without a restart."""
        if isinstance(error, LogChangedError):
            self._poison_if_deleted(error)
        if self.engine.failure is not None:
            raise error  # the restart heals, then retries these
        for request in requests:
            request.seq = None
            # One each: raising one object in many threads would mix their tracebacks.
            request.fail(copy.copy(error))
        if isinstance(error, LogChangedError):
            raise error

    def _check_file(self) -> None:
        """Check that the log is still ours. Raises if it is not: the restart heals or gives up."""
        try:
            self.engine.confirm_file()
        except LogChangedError as error:
            self._poison_if_deleted(error)
            raise

    def _poison_if_deleted(self, error: LogChangedError) -> None:
        """If the log was deleted and its name is free, let the store be written anew. A file that
        was replaced or cut is left alone."""
        engine = self.engine
        if engine.mark_deleted(error.reason):
            raise LogPoisonedError(engine.path, error.reason) from error

    def _refuse(self, requests: list[WriteRequest]) -> None:
        """Stop the log from growing, rather than fill the disk with what cannot be compacted."""
        size, reason = self.engine.size_bytes, self._core.statistics.compaction_error
        for request in requests:
            request.fail(
                Backpressure(f"the log has {size} bytes and cannot be compacted ({reason})")
            )

    def on_tick(self) -> None:
        """Let an idle store compact too, and retry what failed."""
        self._compactor.begin_if_due()

    # Ending.

    def on_stop(self) -> None:
        engine = self.engine
        self._compactor.drop()
        closed = StoreClosed(f"{engine.path} was closed before it was compacted")
        self._compactor.answer_wanted(closed)
        self._step("writer.stop")
        if engine.failure is None:
            engine.sync()  # if this fails, the restart heals while the lock is still held
        try:
            insist(engine.close)
        except (OSError, FoldlogError) as error:
            # Only the seal is missing, and the lock is released: nothing may be retried.
            self.stop_error = error

    def let_go(self) -> None:
        """Release the log as a killed process would. Called by the supervisor once the thread has
        ended for good."""
        # Dropping the engine frees its read descriptor too, unless a snapshot holds it.
        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                engine.abandon()
        finally:
            self._seat.release()

    def abandon_requests(self, error: Exception, not_begun: Exception | None = None) -> None:
        """Fail all requests that are taken or wait for a compaction, when the supervisor gives up.

        `not_begun`: the error for those never tried, if no thread can still reach them.
        """
        for mail in self.taken:
            request = mail.message
            if isinstance(request, Request):
                begun = not isinstance(request, WriteRequest) or request.seq is not None
                request.fail(copy.copy(error if begun or not_begun is None else not_begun))
                request.tell()
        self._compactor.answer_wanted(error)
