"""AppendLogSnapshot where the log is good, and what is around it is not."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from foldlog import AppendLogSnapshot, LogPoisonedError, Put, WatchCursor
from foldlog.testing import Fault, FaultyFiles
from foldlog.testing.faults import Call

NEVER = 1 << 40


def filled(path: Path) -> None:
    with AppendLogSnapshot.open(path, NEVER)[1] as snap:
        for number in range(1, 11):
            snap.apply([Put("k", b"%d" % number)], WatchCursor.from_u64(number))


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        ("create", errno.ENOSPC),  # a full disk
        ("create", errno.EACCES),  # a directory that must not be written to
        ("create", errno.EROFS),
        ("write", errno.EDQUOT),
        ("replace", errno.EBUSY),  # a file that is bind-mounted
        ("open_read", errno.EMFILE),
    ],
)
def test_a_good_log_that_cannot_be_compacted_is_opened_and_the_report_says_so(
    tmp_path: Path, operation: str, error: int
) -> None:
    """Opening demanded room for a second copy, and the right to make one."""
    path = tmp_path / "log"
    filled(path)
    before = path.read_bytes()

    def fail_for_the_copy(call: Call) -> None:
        if call.operation != operation:
            return
        name = str(call.args[0])
        if operation == "write":
            name = str(Path(f"/proc/self/fd/{name}").readlink())
        if ".tmp-" in name:
            raise OSError(error, "no")

    files = FaultyFiles(hook=fail_for_the_copy)
    at, snap = AppendLogSnapshot.open(path, files=files)
    with snap:
        assert at == WatchCursor.from_u64(10)
        assert snap.get("k").value == b"10"
        assert not snap.report.compacted
        assert snap.report.compaction_error.startswith(type(OSError(error, "")).__name__)
        assert path.read_bytes() == before
        assert snap.apply([Put("k", b"11")], WatchCursor.from_u64(11)) == 11
        files.disarm()
        snap.compact()
    assert {file.name.split(".")[0] for file in tmp_path.iterdir()} == {"log"}
    with AppendLogSnapshot.open(path)[1] as again:
        assert again.get("k").value == b"11"
        assert again.report.compaction_error == ""


def test_a_poisoned_log_that_cannot_be_rewritten_is_not_opened(tmp_path: Path) -> None:
    """Nothing could be acknowledged through it."""
    path = tmp_path / "log"
    filled(path)
    files = FaultyFiles()
    _, snap = AppendLogSnapshot.open(path, NEVER, files=files)
    snap.apply([Put("k", b"11")], WatchCursor.from_u64(11))
    files.arm(Fault("sync"))
    with pytest.raises(LogPoisonedError):
        snap.sync()
    snap.close()
    files.arm(Fault("replace", error=errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        AppendLogSnapshot.open(path, files=files)
