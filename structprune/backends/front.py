"""Several compressions side by side: latency against what was lost, as a table, a chart and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from structprune.backends import charts, page
from structprune.backends.report import Report
from structprune.backends.wording import passed
from structprune.errors import InputError


def rows_of(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """reports: by the directory that each describes. One row each: shares of the dense model, and the accuracy where it was measured."""
    rows = []
    for directory, report in reports.items():
        data = report.to_dict()
        measured = next(iter((data.get("latency_ms") or {}).values()), None)
        rows.append(
            {
                "directory": directory,
                "model": data.get("model", ""),
                "target": data["target"],
                "latency": measured["ratio"] if measured else None,
                "macs": data["macs"]["after"] / data["macs"]["before"],
                "params": data["params"]["after"] / data["params"]["before"],
                "importance_kept": data.get("importance_kept"),
                "predicted_loss": data.get("predicted_loss"),
                "accuracy": (data.get("accuracy") or {}).get("after"),
                "verified": passed(data.get("verification") or {}),
            }
        )
    return rows


def read(directories: Sequence[Path]) -> dict[str, Report]:
    """The reports of output directories, by the name of each; the directory of a front stands for all of its own.

    Raises InputError for one that holds no report.
    """
    found: dict[str, Report] = {}
    for directory in directories:
        within = sorted(p.parent for p in directory.glob("*/report.json")) if (directory / "front.json").is_file() else [directory]
        for one in within:
            if not (one / "report.json").is_file():
                raise InputError(f"{one}: no report.json; give output directories of `structprune compress`")
            found[str(one)] = Report.load(one / "report.json")
    return found


def save_page(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A page of all rows, which links to the reports from where it lies. Raises InputError where it cannot be written."""
    linked = [{**row, "page": quote(os.path.relpath(Path(row["directory"]) / "report.html", path.parent))} for row in rows]
    try:
        page.write(page.of_runs(linked, title), path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def save(rows: Sequence[Mapping[str, Any]], directory: Path, name: str) -> None:
    """Write front.json, front.svg and front.html, which links to the reports."""
    name = name.encode("utf-8", "replace").decode()  # of a file: whatever bytes the system allows
    (directory / "front.json").write_text(json.dumps(list(rows), indent=1) + "\n")
    charts.save(charts.front(rows, name, 560), directory / "front.svg")
    page.write(
        page.of_runs([{**row, "page": f"{row['directory']}/report.html"} for row in rows], f"{name}: {len(rows)} targets"), directory / "front.html"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each compression; what none of them has measured is left out."""
    head = ("target", "latency", "95 %", "MACs", "parameters", "importance kept", "predicted loss", "accuracy", "directory")
    cells = [head]
    for row in rows:
        ratio = row["latency"]
        cells.append((
            row["target"],
            f"{ratio['median']:.3f}" if ratio else "–",
            f"{ratio['low']:.3f}–{ratio['high']:.3f}" if ratio else "–",
            f"{row['macs']:.3f}",
            f"{row['params']:.3f}",
            _shown(row["importance_kept"]),
            _shown(row["predicted_loss"]),
            _shown(row["accuracy"]),
            row["directory"],
        ))  # fmt: skip
    told = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"–"}]
    cells = list(zip(*told, strict=True))
    widths = [max(map(len, column)) for column in told]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
