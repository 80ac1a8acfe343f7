"""Measure foldlog, a plain dict, and the stores that a user would pick instead.

    python benchmarks/run.py                 everything, 10,000 to 10,000,000 entries: 1 to 2 hours
    python benchmarks/run.py --quick         1,000,000 entries, once, no diskcache: 10 minutes
    python benchmarks/run.py --only get range --peers dict lmdb --entries 100000
    python benchmarks/run.py --peers         foldlog alone

Writes results.json, results.md, peers.png and growth.png to --out, and prints the tables.

Each trial runs in its own process. Subjects take turns within each repeat, so that a busy machine
disturbs all of them alike. With --attempts, a trial disturbed by other load is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

from cases import CASES, LARGE
from harness import parser_of
from plots import plot
from report import compact_json, markdown
from subjects import PEERS, SLOW

HERE = Path(__file__).parent
DISTURBED = 0.15
"""The fraction of all processors that others may use during a trial before it is run again. A
guess."""


def busy_s() -> float:
    """Busy CPU seconds of all processors since boot, including stolen time; 0 if the system does
    not report it."""
    try:
        ticks = [
            int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        ]
    except OSError:
        return 0.0
    busy = sum(ticks) - ticks[3] - ticks[4]  # without idle and iowait
    return busy / os.sysconf("SC_CLK_TCK")


def quiet_trial(
    case: str, subject: str, entries: int, prepared: Path, seed: str, attempts: int
) -> tuple[dict[str, float], float]:
    """The least disturbed of up to `attempts` trials, and the fraction of all processors that
    others used."""
    best: tuple[dict[str, float], float] = ({}, 2.0)
    for attempt in range(attempts):
        if attempt:
            time.sleep(5)
        before, spent, start = busy_s(), os.times(), time.perf_counter()
        figures = trial(case, subject, entries, prepared, seed)
        after, now = busy_s(), os.times()
        ours = now.children_user + now.children_system - spent.children_user - spent.children_system
        others = (
            max(0.0, after - before - ours) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        )
        best = min(best, (figures, others), key=itemgetter(1))
        if others <= DISTURBED:
            break
    return best


def trial(case: str, subject: str, entries: int, prepared: Path, seed: str) -> dict[str, float]:
    """Run one case in a new process. Returns its figures."""
    scratch = Path(tempfile.mkdtemp(dir=prepared.parent))
    try:
        where = (str(entries), str(prepared), str(scratch))
        command = [sys.executable, str(HERE / "trial.py"), case, subject, *where, seed]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures: dict[str, float] = json.loads(done.stdout)
        return figures
    finally:
        shutil.rmtree(scratch)


def plan(only: list[str], peers: list[str], entries: int) -> list[tuple[str, str]]:
    """The (case, subject) pairs of one repeat."""
    large = entries > LARGE
    return [
        (name, subject.name)
        for name, case in CASES.items()
        for subject in case.subjects
        if name in only and (case.large or not large)
        if (subject.name in peers or subject.name not in PEERS)
        and not (large and subject.name in SLOW)
    ]


def machine() -> str:
    """A general description of the machine."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()}, {python}"


def filesystem(path: Path) -> str:
    """The type of the file system that holds `path`, such as "ext4" or "tmpfs"."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "an unknown file system"
    holding = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


def parse_args() -> argparse.Namespace:
    """The options of the command line."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(CASES),
        default=list(CASES),
        metavar="NAME",
        help=f"cases to run, from {', '.join(CASES)}",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"unless given: --entries {LARGE} --repeat 1, and all peers but {', '.join(SLOW)}",
    )
    parser.add_argument("--entries", nargs="+", type=int)
    parser.add_argument("--repeat", type=int)
    parser.add_argument(
        "--attempts", type=int, default=1, help="trials at most, if other load disturbs them"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--work", type=Path, help="directory to keep prepared stores in, for reuse")
    args = parser.parse_args()
    if args.entries is None:
        args.entries = [LARGE] if args.quick else [10_000, 100_000, LARGE, 10_000_000]
    if args.repeat is None:
        args.repeat = 1 if args.quick else 3
    if args.peers is None:
        args.peers = [peer for peer in PEERS if not (args.quick and peer in SLOW)]
    return args


def measure(args: argparse.Namespace, run: dict[str, Any], entries: int, work: Path) -> None:
    """Run all trials at one size. Adds the samples to `run`, and writes the results so far."""
    prepared = work / str(entries)
    prepared.mkdir(parents=True, exist_ok=True)
    steps = plan(args.only, args.peers, entries)
    subjects = list(dict.fromkeys(subject for _, subject in steps))
    at_size = run["samples"][str(entries)] = {subject: {} for subject in subjects}
    for subject in subjects:
        trial("prepare", subject, entries, prepared, "prepare")
    for repeat in range(args.repeat):
        for case, subject in steps:
            figures, others = quiet_trial(
                case, subject, entries, prepared, f"{case}-{repeat}", args.attempts
            )
            for name, value in figures.items():
                at_size[subject].setdefault(name, []).append(value)
            run["disturbed"].append(others)
            where = f"{entries:,} entries, {repeat + 1}"
            print(f"{where}: {case} of {subject}; others used {others:.0%}", file=sys.stderr)
        (args.out / "results.json").write_text(compact_json(run))
        (args.out / "results.md").write_text(markdown(run))


def main() -> None:
    args = parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="foldlog-benchmark-"))
    args.out.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {
        "machine": machine(),
        "filesystem": filesystem(work),
        "repeat": args.repeat,
        "disturbed": [],
        "samples": {},
    }
    try:
        for entries in args.entries:
            measure(args, run, entries, work)
    finally:
        if args.work is None:
            shutil.rmtree(work)
    plot(run, args.out)
    print(markdown(run))


if __name__ == "__main__":
    main()
