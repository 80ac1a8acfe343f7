"""Results as Markdown: `report.py DOCUMENT RESULTS.json ...` writes the tables of runs into a
document.

Each table replaces the text between `<!-- NAME -->` and `<!-- end -->`. NAME is goals, figures,
ratios, threads or large.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """How a figure is displayed."""

    title: str
    unit: str

    @property
    def scale(self) -> float:
        """Units per second (or per MB)."""
        return {"µs": 1e6, "ms": 1e3}.get(self.unit, 1)


FIGURES: dict[str, Figure] = {
    "open": Figure("open, to the first get", "ms"),
    "open_batches": Figure(
        "open 1000-record batches, to the first get (engine below `AppendLogSnapshot`, not "
        "compacted)",
        "s",
    ),
    "open_batches_compacted": Figure("open 1000-record batches, compacted, to the first get", "s"),
    "memory_start": Figure("private memory before open", "MB"),
    "memory_open": Figure("private memory after open", "MB"),
    "memory_gets": Figure("private memory after 100,000 random gets", "MB"),
    "memory_open_batches": Figure("private memory after open, not compacted", "MB"),
    "get_hot": Figure("get, 1,000 keys over and over", "µs"),
    "get_hot_changed": Figure("get, 1,000 keys over and over, with changes above the base", "µs"),
    "get_first": Figure("get, random over all keys, first pass", "µs"),
    "get_steady": Figure("get, random over all keys, later passes", "µs"),
    "get_absent": Figure("get, absent keys", "µs"),
    "range_100": Figure("range of 100", "ms"),
    "range_10000": Figure("range of 10,000", "ms"),
    "range_all": Figure("range of all", "ms"),
    **{
        f"apply_{kind}_{size}": Figure(f"apply, {title}, batches of {size}, a record", "µs")
        for kind, title in (("fresh", "fresh keys"), ("overwrite", "existing keys"))
        for size in (1, 10, 100, 1000)
    },
    "publish_median": Figure("one apply of 100 existing keys, median", "µs"),
    "publish_p99": Figure("one apply of 100 existing keys, 99th percentile", "µs"),
    "publish_max": Figure("one apply of 100 existing keys, longest", "µs"),
    "load": Figure("load into an empty store, batches of 1000, a record", "µs"),
    "load_compacting": Figure("the same with compactions as they fall due, a record", "µs"),
    "compact_all": Figure("compact, all touched", "s"),
    "compact_contiguous": Figure("compact, 1 % touched, neighbours", "s"),
    "compact_random": Figure("compact, 1 % touched, at random", "s"),
    "export": Figure("export", "s"),
    "import": Figure("import, to the first get", "s"),
    "commits_1": Figure("commits of one update, 1 thread", "1/s"),
    "commits_4": Figure("commits of one update, 4 threads", "1/s"),
    "commits_16": Figure("commits of one update, 16 threads", "1/s"),
    **{
        f"reads_{threads}": Figure(f"gets of hot keys, threads: {threads}", "1/s")
        for threads in (1, 2, 4, 8)
    },
    "reads_4_writing": Figure("the same, threads: 4, while a fifth applies batches of 100", "1/s"),
    **{
        f"store_apply_{size}": Figure(f"apply through the store, batches of {size}, a record", "µs")
        for size in (1, 10, 100, 1000)
    },
    "store_apply_async_1": Figure("apply_async, batches of 1, a record", "µs"),
    "ask_get": Figure("ask a reader to get", "µs"),
    "ask_range_100": Figure("ask a reader for a range of 100", "ms"),
    "disk_write": Figure("write and fsync of as many bytes, nothing else", "s"),
}


class Goal(NamedTuple):
    """A goal for 1,000,000 entries."""

    crate: str
    """The Rust crate's figure: a release build, called natively, on a similar machine."""
    limit: float
    """The goal, in the figure's unit: at most this, or at least for a rate."""


GOAL_ENTRIES = "1000000"
GOALS: dict[str, Goal] = {
    "apply_overwrite_1": Goal("1.52", 6),
    "apply_overwrite_10": Goal("0.93", 1.5),
    "apply_overwrite_100": Goal("0.74", 1.0),
    "apply_overwrite_1000": Goal("0.79", 0.9),
    "load": Goal("", 1.8),
    "open": Goal("1,060", 30),
    "open_batches": Goal("1.98", 1),
    "get_first": Goal("0.59", 2.0),
    "get_steady": Goal("0.56", 1.0),
    "get_hot": Goal("0.058", 0.25),
    "get_hot_changed": Goal("", 0.35),
    "get_absent": Goal("0.037", 1.0),
    "range_100": Goal("35", 0.04),
    "range_10000": Goal("37", 3),
    "range_all": Goal("602", 500),
    "compact_all": Goal("2.76", 1.5),
    "compact_contiguous": Goal("2.22", 0.2),
    "compact_random": Goal("2.22", 0.2),
    "export": Goal("2.76", 0.15),
    "import": Goal("2.88", 0.45),
    "memory_open": Goal("364", 25),
    "memory_gets": Goal("364", 140),
    "commits_1": Goal("", 50_000),
    "store_apply_1": Goal("", 20),
    "ask_get": Goal("", 45),
}

THREADED = ("commits", "reads", "store", "ask")
"""Prefixes of the names of multithreaded figures."""

Samples = dict[str, dict[str, dict[str, list[float]]]]
"""entries -> subject -> figure -> samples."""


def number(value: float) -> str:
    """`value` with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(name: str, samples: list[float]) -> str:
    """The median, with the minimum and maximum in brackets."""
    scale = FIGURES[name].scale
    low, middle, high = (number(pick(samples) * scale) for pick in (min, median, max))
    return middle if low == high else f"{middle} ({low}–{high})"


def table(samples: dict[str, dict[str, list[float]]]) -> str:
    """All figures for one number of entries, with a column for each subject."""
    subjects = list(samples)
    rows = ["| | unit | " + " | ".join(subjects) + " |", "|---|---|" + "---:|" * len(subjects)]
    for name, figure in FIGURES.items():
        cells = [
            cell(name, samples[subject][name]) if name in samples[subject] else ""
            for subject in subjects
        ]
        if any(cells):
            rows.append(f"| {figure.title} | {figure.unit} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


RATIOS = (
    *("open", "get_hot", "get_first", "get_steady", "get_absent"),
    *("range_100", "range_10000", "range_all"),
    *(f"apply_{kind}_{n}" for kind in ("fresh", "overwrite") for n in (1, 10, 100, 1000)),
    "load",
)


def ratios(samples: dict[str, dict[str, list[float]]]) -> str:
    """Each peer's times as multiples of foldlog's in the same run."""
    ours = samples.get("foldlog", {})
    peers = [
        subject
        for subject in samples
        if not subject.startswith("foldlog") and samples[subject].keys() & set(RATIOS)
    ]
    rows = []
    for name in RATIOS:
        cells = [
            f"{median(samples[peer][name]) / median(ours[name]):.2g}"
            if name in samples[peer] and name in ours
            else ""
            for peer in peers
        ]
        if any(cells):
            rows.append(f"| {FIGURES[name].title} | " + " | ".join(cells) + " |")
    if not rows:
        return ""
    head = [
        "| time, in multiples of foldlog's | " + " | ".join(peers) + " |",
        "|---|" + "---:|" * len(peers),
    ]
    return "\n".join([*head, *rows])


def goals(samples: dict[str, dict[str, list[float]]]) -> str:
    """The goals and foldlog's figures."""
    rows = []
    for name, goal in GOALS.items():
        figure = FIGURES[name]
        measured = next(
            (samples[s][name] for s in ("foldlog", "foldlog-store") if name in samples.get(s, {})),
            None,
        )
        if measured is not None:
            reached = median(measured) * figure.scale
            is_met = reached >= goal.limit if figure.unit == "1/s" else reached <= goal.limit
            rows.append(
                f"| {figure.title} | {figure.unit} | {goal.crate} | {goal.limit:g} "
                f"| {cell(name, measured)} | {'met' if is_met else '**missed**'} |"
            )
    return (
        "\n".join(
            ["| | unit | Rust crate | goal | measured | |", "|---|---|---:|---:|---:|---|", *rows]
        )
        if rows
        else ""
    )


def markdown(run: dict[str, Any]) -> str:
    """The whole report of a run."""
    where = f", stores on {run['filesystem']}" if "filesystem" in run else ""
    parts = [f"{run['machine']}{where}. Median of the repeats (least–greatest)."]
    for entries, samples in run["samples"].items():
        parts += [f"## {int(entries):,} entries", table(samples), ratios(samples)]
        if entries == GOAL_ENTRIES:
            parts += ["### Goals", goals(samples)]
    return "\n\n".join(part for part in parts if part) + "\n"


def compact_json(run: dict[str, Any]) -> str:
    """A run as JSON: one line per figure, with four significant digits."""
    lines = []
    for entries, subjects in run["samples"].items():
        rows = [
            f'"{subject}": {{\n'
            + ",\n".join(
                f'"{name}": [{", ".join(f"{value:.4g}" for value in values)}]'
                for name, values in figures.items()
            )
            + "\n}"
            for subject, figures in subjects.items()
        ]
        lines.append(f'"{entries}": {{\n' + ",\n".join(rows) + "\n}")
    rest = {
        key: [float(f"{share:.2g}") for share in value] if key == "disturbed" else value
        for key, value in run.items()
        if key != "samples"
    }
    opening = json.dumps(rest)[:-1]
    return opening + ',\n"samples": {\n' + ",\n".join(lines) + "\n}}\n"


def merged(runs: list[dict[str, Any]]) -> Samples:
    """The samples of several runs. If two have the same figure of a subject, the later run
    counts."""
    samples: Samples = {}
    for run in runs:
        for entries, subjects in run["samples"].items():
            for subject, figures in subjects.items():
                samples.setdefault(entries, {}).setdefault(subject, {}).update(figures)
    return samples


def refresh(document: Path, runs: list[dict[str, Any]]) -> None:
    """Write the tables of the runs into a document: for the goals' number of entries, and for the
    largest."""
    every = merged(runs)
    samples = every[GOAL_ENTRIES]
    threaded = {
        s: {n: v for n, v in f.items() if n.startswith(THREADED)} for s, f in samples.items()
    }
    engines = {subject: figures for subject, figures in samples.items() if "get_hot" in figures}
    tables = {
        "goals": goals(samples),
        "figures": table(
            {
                s: {n: v for n, v in f.items() if not n.startswith(THREADED)}
                for s, f in engines.items()
            }
        ),
        "ratios": ratios(samples),
        "threads": table({subject: figures for subject, figures in threaded.items() if figures}),
        "large": table(every[max(every, key=int)]),
    }
    text = document.read_text(encoding="utf-8")
    for name, rows in tables.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(rf"\g<1>{rows}\n\g<2>", text)
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    refresh(
        Path(sys.argv[1]),
        [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[2:]],
    )
