"""Charts, in any format that matplotlib writes; text in SVG stays text, which readers of a screen can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from structprune.backends.benchmark import Comparison
from structprune.errors import InputError


def front(rows: Sequence[Mapping[str, Any]], path: Path, name: str) -> None:
    """Latency (or multiply-accumulates, where it was not measured) against importance kept, and accuracy where there is one."""
    measured = all(row["latency"] for row in rows)
    cost = [row["latency"]["median"] if measured else row["macs"] for row in rows]
    with _axes(path) as axes:
        for key, label, marker in (("importance_kept", "importance kept", "o"), ("accuracy", "accuracy", "s")):
            if all(row[key] is not None for row in rows):
                axes.plot(cost, [row[key] for row in rows], marker=marker, label=label)
        axes.set(xlabel=f"{'latency' if measured else 'multiply-accumulates'}, share of the original's", ylabel="share", title=name)
        axes.grid(alpha=0.3)


def latencies(compared: Mapping[str, Comparison], path: Path) -> None:
    """compared: by what was the same for all candidates (threads, inputs). A bar for each candidate in each, with its interval of 95 %."""
    names = [latency.name for latency in next(iter(compared.values())).latencies]
    width = 0.8 / len(names)
    with _axes(path) as axes:
        for number, name in enumerate(names):
            mine = [c.latencies[number] for c in compared.values()]
            middle = [m.median_ms for m in mine]
            interval = [[m.median_ms - m.low_ms for m in mine], [m.high_ms - m.median_ms for m in mine]]
            bars = axes.bar(np.arange(len(mine)) + (number - (len(names) - 1) / 2) * width, middle, width, yerr=interval, capsize=3, label=name)
            if number:
                axes.bar_label(bars, [f"{c.ratios[name].median:.2f}×" for c in compared.values()], padding=3)
        axes.set_xticks(range(len(compared)), list(compared))
        axes.set(ylabel="milliseconds a run")


def check(path: Path) -> None:
    """InputError unless a chart can be such a file: before hours of measuring, not after."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix.removeprefix(".") not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise InputError(f"{path}: a chart cannot be a '{path.suffix}' file; use one of {', '.join(sorted(known))}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")


@contextmanager
def _axes(path: Path) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    try:
        yield axes
        axes.legend()
        figure.savefig(path)
    finally:
        pyplot.close(figure)
