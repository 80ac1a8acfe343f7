"""Deliberate faults: a disk that fails at the n-th call, what a power loss may leave, actors that
die at a named step.

For the tests of foldlog and of programs that use it. The rest of the package imports nothing from
here.

    faults.py   FaultyFiles: calls that fail or are cut short, or call a hook first; all are counted
    crashes.py  CrashFiles: the files that a power loss could leave now, one image at a time
    steps.py    crash_at and STEPS: an actor of a store dies at a chosen step
    damage.py   flips, truncations, splices: damaged copies of a file's bytes

Pass file doubles as `files=` (to `foldlog.open` or `AppendLogSnapshot.open`) and steps as `step=`:

    files = FaultyFiles(Fault("sync", nth=3, error=errno.EIO))
    store = foldlog.open(path, files=files, step=crash_at("writer.after_write"))
"""

from foldlog.testing.crashes import CrashFiles, Image
from foldlog.testing.damage import flips, sampled_flips, splices, truncations
from foldlog.testing.faults import OPERATIONS, Call, Fault, FaultyFiles, UnsyncedFiles
from foldlog.testing.steps import STEPS, CrashAt, crash_at

__all__ = [
    "OPERATIONS",
    "STEPS",
    "Call",
    "CrashAt",
    "CrashFiles",
    "Fault",
    "FaultyFiles",
    "Image",
    "UnsyncedFiles",
    "crash_at",
    "flips",
    "sampled_flips",
    "splices",
    "truncations",
]
