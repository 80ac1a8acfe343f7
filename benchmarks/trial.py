"""One trial in its own process: `trial.py CASE SUBJECT ENTRIES PREPARED SCRATCH SEED` prints its
figures as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cases import CASES, Trial, prepare
from subjects import SUBJECTS


def main(case: str, subject: str, entries: str, prepared: str, scratch: str, seed: str) -> None:
    trial = Trial(SUBJECTS[subject], int(entries), Path(prepared), Path(scratch), seed)
    if case == "prepare":
        prepare(trial.subject, trial.entries, trial.prepared)
        figures = {}
    else:
        figures = CASES[case].run(trial)
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
