"""Faults on purpose: a disk that fails at the n-th call, what a power loss may leave, actors that die at a named step.

For the tests of programs that use foldlog, as foldlog's own are written. Nothing here is imported by the rest of the package.

    faults.py   FaultyFiles: calls that fail, fall short, or are told to a hook; counted
    crashes.py  CrashFiles: which files a power loss now could leave, one image after the other
    steps.py    crash_at and STEPS: an actor of a store dies between two lines
    damage.py   flips, truncations, splices: bytes that rot

Files doubles go where `files=` is taken (`foldlog.open`, `AppendLogSnapshot.open`), steps where `step=` is:

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
