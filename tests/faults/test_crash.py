"""Power loss after every change the engine makes to the disk: promises hold, nothing is half there.

And the gate: switching off any one durability rule makes the campaign fail, so the campaign can
be believed.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faultkit import CrashCampaign, Model, batch, fold_of, view

from foldlog import AppendLogSnapshot, FoldlogError, LogPoisonedError, WatchCursor
from foldlog.protocol.updates import encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.log.log import Log
from foldlog.storage.log.sidecars.lock import WriterLock
from foldlog.testing import Fault, FaultyFiles

pytestmark = pytest.mark.exhaustive

Script = Callable[[CrashCampaign, str], None]


def opened(campaign: CrashCampaign, sync: str) -> AppendLogSnapshot:
    """Open the campaign's log; what it shows has been promised from here on, if each batch is."""
    _, snap = AppendLogSnapshot.open(
        campaign.path,
        files=campaign.files,
        sync=sync,  # type: ignore[arg-type]
    )
    if sync == "always":
        campaign.model.all_durable()
    return snap


def a_whole_life(campaign: CrashCampaign, sync: str) -> None:
    model, always = campaign.model, sync == "always"
    snap = opened(campaign, sync)
    for number in (1, 2, 3):
        model.apply(snap, number, durable=always)
    snap.sync()
    model.all_durable()
    model.apply(snap, 4, durable=always)
    snap.compact()
    model.all_durable()
    model.apply(snap, 5, durable=always)
    snap.close()
    model.all_durable()
    snap = opened(campaign, sync)
    model.apply(snap, 6, durable=always)
    model.apply(snap, 7, durable=always)
    snap._engine.log.abandon()  # killed
    snap = opened(campaign, sync)
    model.apply(snap, 8, durable=always)
    snap.close()
    model.all_durable()
    campaign.look("at the end")
    with AppendLogSnapshot.load(campaign.path)[1] as snap:
        if view(snap) != fold_of(model.acked):
            campaign.faults.append("not all is there at the end")


def groups(campaign: CrashCampaign, sync: str) -> None:
    engine = Engine(campaign.path, files=campaign.files, sync_each=sync == "always")

    class Group:
        def apply_group(self, numbers: tuple[int, ...]) -> None:
            engine.commit(
                [encode_batch(batch(number), WatchCursor.from_u64(number)) for number in numbers]
            )

    model = campaign.model
    # A group is one frame: in doubt is all of it or nothing.
    real = Model.in_process
    model.in_process = lambda: [
        s for i, s in enumerate(real(model)) if i in (0, len(model.in_doubt))
    ]  # type: ignore[method-assign]
    for numbers in ((1, 2, 3), (4, 5), (6, 7, 8)):
        model.apply(Group(), *numbers, durable=sync == "always")
    engine.close()
    model.all_durable()
    campaign.look("at the end")


def a_killed_writer(campaign: CrashCampaign, sync: str) -> None:
    snap = opened(campaign, "never")
    campaign.model.apply(snap, 1, durable=False)
    campaign.model.apply(snap, 2, durable=False)
    snap._engine.log.abandon()
    engine = Engine(campaign.path, files=campaign.files, sync_each=True)
    campaign.model.all_durable()  # it is shown as durable, so it must be
    campaign.look("after the open")
    engine.log.abandon()


def a_failed_write(campaign: CrashCampaign, sync: str) -> None:
    """A write of several sectors falls short and is undone; other batches take its place."""
    snap = opened(campaign, sync)
    campaign.model.apply(snap, 1, durable=sync == "always")
    campaign.files.arm(Fault("write", 1, errno.ENOSPC, takes=1500))
    with contextlib.suppress(OSError):
        campaign.model.apply(snap, 3, durable=sync == "always")
    campaign.files.arm()
    for number in (5, 2):
        campaign.model.apply(snap, number, durable=sync == "always")
    snap.close()
    campaign.model.all_durable()
    campaign.look("at the end")


def opened_until_an_fsync_failed(campaign: CrashCampaign) -> AppendLogSnapshot:
    """Open the campaign's log, and apply two batches. The fsync of the second fails."""
    snap = opened(campaign, "always")
    campaign.model.apply(snap, 1, durable=True)
    campaign.files.arm(Fault("sync", 1, errno.EIO))
    with contextlib.suppress(LogPoisonedError):
        campaign.model.apply(snap, 2, durable=True)
    campaign.files.arm()
    return snap


def a_failed_fsync(campaign: CrashCampaign, sync: str) -> None:
    """An fsync fails once. The disk has lost the data, and reports it only this once."""
    snap = opened_until_an_fsync_failed(campaign)
    with contextlib.suppress(LogPoisonedError):
        campaign.model.apply(snap, 3, durable=True)
    snap.compact()
    campaign.model.all_durable()
    for number in (4, 5):
        campaign.model.apply(snap, number, durable=True)
    snap.close()
    campaign.model.all_durable()
    campaign.look("at the end")


def a_failed_fsync_and_a_new_process(campaign: CrashCampaign, sync: str) -> None:
    snap = opened_until_an_fsync_failed(campaign)
    snap._engine.log.abandon()
    _, snap = AppendLogSnapshot.open(campaign.path, files=campaign.files, sync="always")
    campaign.model.acked = [1, 2] if "key2" in view(snap) else [1]
    campaign.model.all_durable()
    campaign.model.apply(snap, 4, durable=True)
    snap.close()
    campaign.look("at the end")


def a_torn_tail_that_is_cut(campaign: CrashCampaign, sync: str) -> None:
    """The process dies in its first write, of several sectors.

    The next process cuts it off and writes in its place.
    """
    snap = opened(campaign, "never")
    campaign.files.arm(
        Fault("write", 2, errno.EIO, takes=1800), Fault("truncate", 1), Fault("sync", 1)
    )
    with contextlib.suppress(OSError, FoldlogError):
        campaign.model.apply(snap, 3, durable=False)
    campaign.files.arm()
    snap._engine.log._lock.write_poison(None)  # it was the process that died, not the disk
    snap._engine.log.abandon()
    engine = Engine(campaign.path, files=campaign.files)
    campaign.model.in_doubt = []
    for number in (5, 2):
        campaign.model.in_doubt = [number]
        engine.commit([encode_batch(batch(number), WatchCursor.from_u64(number))])
        campaign.model.acked.append(number)
    engine.close()
    campaign.model.all_durable()
    campaign.look("at the end")


SCRIPTS: list[Script] = [a_whole_life, groups, a_killed_writer, a_failed_write, a_failed_fsync]
SCRIPTS += [a_failed_fsync_and_a_new_process, a_torn_tail_that_is_cut]


@pytest.mark.parametrize(
    "limit",
    [6, pytest.param(256, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
    ids=["some", "many"],
)
@pytest.mark.parametrize("sync", ["never", "always"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_power_loss_after_any_change_loses_nothing_that_was_promised(folder, script, sync, limit):
    campaign = CrashCampaign(folder, limit=limit)
    script(campaign, sync)
    assert campaign.faults == []
    assert campaign.crashes >= 5
    assert campaign.images > campaign.crashes
    print(f"{script.__name__}, sync={sync}: {campaign.crashes} crashes, {campaign.images} images")


# The mutation gate: a rule is switched off, and a script must find out.


def state_of(patch: pytest.MonkeyPatch) -> set[Any]:
    """What a mutant remembers: it is taken off, while an image is looked at, and put on again."""
    remembered: set[Any] = vars(patch).setdefault("remembered", set())
    return remembered


def no_fsync_before_the_rename(patch: pytest.MonkeyPatch) -> None:
    create, sync = FaultyFiles.create, FaultyFiles.sync
    fresh = state_of(patch)

    def created(self: FaultyFiles, path: Path, **options: Any) -> int:
        fd: int = create(self, path, **options)
        fresh.discard(fd)
        if ".tmp" in path.name:
            fresh.add(fd)
        return fd

    def replaced(self: FaultyFiles, source: Path, dest: Path) -> None:
        self.inner.replace(source, dest)
        fresh.clear()

    patch.setattr(FaultyFiles, "create", created)
    patch.setattr(FaultyFiles, "replace", replaced)
    patch.setattr(FaultyFiles, "sync", lambda self, fd: None if fd in fresh else sync(self, fd))


def no_fsync_of_the_folder_after_a_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FaultyFiles, "sync_dir", lambda self, path, opened=None: None)


def no_fsync_before_the_answer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Log, "sync", lambda self: None)


def no_fsync_behind_a_cut(patch: pytest.MonkeyPatch) -> None:
    """No fsync until the next write: neither right after a cut nor as opening ends."""
    truncate, sync, write = FaultyFiles.truncate, FaultyFiles.sync, FaultyFiles.write
    cut = state_of(patch)

    def truncated(self: FaultyFiles, fd: int, size: int) -> None:
        truncate(self, fd, size)
        cut.add(fd)

    def synced(self: FaultyFiles, fd: int) -> None:
        if fd not in cut:
            sync(self, fd)

    def written(self: FaultyFiles, fd: int, data: Any, offset: int) -> int:
        cut.discard(fd)
        return write(self, fd, data, offset)

    patch.setattr(FaultyFiles, "write", written)
    patch.setattr(FaultyFiles, "truncate", truncated)
    patch.setattr(FaultyFiles, "sync", synced)


def nothing_is_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FaultyFiles, "truncate", lambda self, fd, size: None)
    patch.setattr(Log, "check_unchanged", lambda self: None)


def a_failed_fsync_is_tried_again(patch: pytest.MonkeyPatch) -> None:
    def sync(self: Log) -> None:
        try:
            self.files.sync(self.file.fd)
        except OSError:
            self.files.sync(self.file.fd)

    patch.setattr(Log, "sync", sync)


def a_failed_fsync_is_forgotten_by_the_next_process(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WriterLock, "is_poisoned", lambda self, inode: False)


def answers_come_before_the_write(patch: pytest.MonkeyPatch) -> None:
    real = Log.append
    waiting = state_of(patch)

    def append(self: Log, items: Any) -> None:
        if waiting:
            real(self, waiting.pop())
        waiting.add(tuple(items))

    patch.setattr(Log, "append", append)


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], Script, str]] = [
    (no_fsync_before_the_rename, a_whole_life, "never"),
    (no_fsync_of_the_folder_after_a_rename, a_whole_life, "never"),
    (no_fsync_before_the_answer, a_whole_life, "always"),
    (no_fsync_before_the_answer, groups, "always"),
    (no_fsync_before_the_answer, a_killed_writer, "always"),
    (no_fsync_behind_a_cut, a_failed_write, "never"),
    (no_fsync_behind_a_cut, a_torn_tail_that_is_cut, "never"),
    (nothing_is_cut, a_failed_write, "never"),
    (nothing_is_cut, a_torn_tail_that_is_cut, "never"),
    (a_failed_fsync_is_tried_again, a_failed_fsync, "always"),
    (a_failed_fsync_is_forgotten_by_the_next_process, a_failed_fsync_and_a_new_process, "always"),
    (answers_come_before_the_write, a_whole_life, "always"),
]


@pytest.mark.parametrize(
    ("mutant", "script", "sync"), MUTANTS, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_campaign_fails_without_a_rule(folder, mutant, script, sync):
    campaign = CrashCampaign(folder, limit=96, mutant=mutant)  # the states of the note count, too
    try:
        script(campaign, sync)
    except (OSError, FoldlogError) as error:
        campaign.faults.append(f"the script itself: {error}")
    finally:
        campaign.end()
    assert campaign.faults, f"{mutant.__name__} went unnoticed through {campaign.images} images"
    print(campaign.faults[0])
