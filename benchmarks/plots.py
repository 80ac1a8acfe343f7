"""Plots of the results: foldlog and its peers, and how each figure grows with the store."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from report import FIGURES, GOAL_ENTRIES, number

BESIDE = {
    "open": "open",
    "get_hot": "get, hot keys",
    "get_steady": "get, random",
    "range_100": "range of 100",
    "range_10000": "range of 10,000",
    "apply_overwrite_1": "apply, batches of 1",
    "apply_overwrite_100": "apply, batches of 100",
    "apply_overwrite_1000": "apply, batches of 1000",
}
GROWTH = ("open", "get_steady", "range_100", "publish_median", "compact_all", "memory_gets")


def plot(run: dict[str, Any], folder: Path) -> list[Path]:
    """Write `peers.png` and `growth.png` if there are figures for them. Does nothing without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    sizes = sorted(run["samples"], key=int)
    beside = GOAL_ENTRIES if GOAL_ENTRIES in sizes else sizes[-1]
    paths = [_peers(run["samples"][beside], int(beside), folder / "peers.png")]
    if len(sizes) > 1:
        paths.append(_growth(run["samples"], sizes, folder / "growth.png"))
    return paths


def _color(subjects: list[str], subject: str) -> Any:
    import matplotlib.pyplot as plt

    return "black" if subject == "foldlog" else plt.get_cmap("tab10")(subjects.index(subject) % 10)


def _peers(samples: dict[str, dict[str, list[float]]], entries: int, path: Path) -> Path:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    subjects = [subject for subject in samples if not subject.endswith("-synced")]
    figure, grid = plt.subplots(2, 4, figsize=(15, 6))
    for axes, (name, title) in zip(grid.flat, BESIDE.items(), strict=True):
        shown = [subject for subject in subjects if name in samples[subject]]
        if not shown:
            axes.set_axis_off()
            continue
        scale = FIGURES[name].scale
        values = [median(samples[subject][name]) * scale for subject in shown]
        for subject, value in zip(shown, values, strict=True):
            axes.plot(value, subject, "o", color=_color(subjects, subject))
            axes.annotate(
                f" {number(value)}",
                (value, subject),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
        axes.grid(axis="x", alpha=0.3)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.25, y=0.15)
        axes.invert_yaxis()
        axes.set_title(f"{title}, {FIGURES[name].unit}", fontsize=10)
        axes.tick_params(labelsize=8)
    figure.suptitle(f"{entries:,} entries of 100 bytes; less is better; logarithmic")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _growth(samples: dict[str, Any], sizes: list[str], path: Path) -> Path:
    import matplotlib.pyplot as plt

    subjects = [
        subject
        for subject in samples[sizes[0]]
        if not subject.startswith("foldlog-") and not subject.endswith("-synced")
    ]
    figure, grid = plt.subplots(2, 3, figsize=(14, 7))
    for axes, name in zip(grid.flat, GROWTH, strict=True):
        if not any(
            name in samples[size].get(subject, {}) for size in sizes for subject in subjects
        ):
            axes.set_axis_off()
            continue
        scale = FIGURES[name].scale
        for subject in subjects:
            points = [
                (int(size), samples[size][subject][name])
                for size in sizes
                if name in samples[size].get(subject, {})
            ]
            if points:
                middle = [median(values) * scale for _, values in points]
                color = _color(subjects, subject)
                axes.plot(
                    [size for size, _ in points],
                    middle,
                    marker="o",
                    markersize=3,
                    label=subject,
                    color=color,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{FIGURES[name].title}, {FIGURES[name].unit}", fontsize=9)
        axes.grid(alpha=0.3)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels))
    figure.suptitle("Growth with the entries in the store")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
